"""One line per record, in both forms; logging never raises and never tells a secret."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Literal

import pytest

from skulk.logs import configure_logging


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def logged(form: Literal["text", "json"], *, secrets: tuple[str, ...] = ()) -> tuple[logging.Logger, io.StringIO]:
    logging.getLogger().handlers.clear()  # pytest's own handlers raise what ours must not
    stream = io.StringIO()
    configure_logging(form, "info", "node", secrets=secrets, stream=stream)
    return logging.getLogger("skulk.node"), stream


def _fail(text: str) -> None:
    raise RuntimeError(text)


def test_text():
    log, stream = logged("text")
    log.info("%d runners stopped", 3, extra={"runner": "abc-1"})
    log.debug("not this one")
    time, rest = stream.getvalue().split(" ", 1)
    assert time.endswith("Z")
    assert len(time) == len("2026-01-31T12:00:00.123Z")
    assert rest == "INFO    node skulk.node: 3 runners stopped runner=abc-1\n"


def test_json():
    log, stream = logged("json")
    log.warning("%s is full", "disk", extra={"free_bytes": 0, "path": io})
    body = json.loads(stream.getvalue())
    assert body.pop("time").endswith("Z")
    assert body.pop("path").startswith("<module 'io'")
    assert body == {
        "level": "warning", "process": "node", "logger": "skulk.node", "message": "disk is full", "free_bytes": 0,
    }  # fmt: skip


@pytest.mark.parametrize("form", ["text", "json"])
def test_every_record_is_one_line(form: Literal["text", "json"]):
    log, stream = logged(form)
    try:
        _fail("first\nsecond")
    except RuntimeError:
        log.exception("it broke\r\nFAKE line \x1b[31m\x9b \u2028")
    log.info("lone surrogate \udcff %s", "\ud800")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "RuntimeError: first" in lines[0]
    assert "test_logs.py" in lines[0]
    assert "\x1b" not in stream.getvalue()
    assert "lone surrogate" in lines[1]


@pytest.mark.parametrize("form", ["text", "json"])
def test_secrets_are_masked_wherever_they_stand(form: Literal["text", "json"]):
    log, stream = logged(form, secrets=("sk-12345", 'quo"ted\\key', "", "ab"))
    log.info("key sk-12345 %s", 'quo"ted\\key', extra={"header": "Bearer sk-12345"})
    log.info("about cabbages")
    try:
        _fail("sk-12345")
    except RuntimeError:
        log.exception("failed")
    assert "sk-12345" not in stream.getvalue()
    assert "ted" not in stream.getvalue().split("about", 1)[0].replace("started", "")
    assert "about cabbages" in stream.getvalue()


class Unprintable:
    def __str__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize("form", ["text", "json"])
def test_logging_never_raises(form: Literal["text", "json"]):
    log, stream = logged(form)
    log.info("%d apples", "three")  # noqa: PLE1205, RUF100 - the mistake is the point
    log.info("%s", Unprintable())
    log.info("big", extra={"count": 2**80, "nan": float("nan")})
    assert "%d apples ('three',)" in stream.getvalue()
    assert str(2**80) in stream.getvalue()
    stream.close()
    log.info("to nobody")


def test_configuring_again_replaces():
    log, first = logged("text")
    second = io.StringIO()
    configure_logging("json", "info", "node", stream=second)
    log.info("once")
    assert first.getvalue() == ""
    assert json.loads(second.getvalue())["message"] == "once"


def test_the_level_is_obeyed():
    stream = io.StringIO()
    configure_logging("text", "error", "gateway", stream=stream)
    logging.getLogger("x").warning("no")
    logging.getLogger("x").error("yes")
    assert stream.getvalue().endswith("ERROR   gateway x: yes\n")
