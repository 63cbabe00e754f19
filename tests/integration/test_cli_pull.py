"""`pull`, `remove` and `verify` against recorded answers: what they print, send and return."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skulk.cli.pull import Pull, progress_line, time_left
from tests.support import fake_gateway as fake
from tests.support.command_line import Outcome, caller

Call = Callable[..., Outcome]
MODEL = "org/model-GGUF:Q8_0"
PATH = f"/store/models/{MODEL}"


def told(status: str = "downloading", **changes: Any) -> dict[str, Any]:
    return {
        "status": status, "model_id": MODEL, "node_id": fake.NODE, "downloaded_bytes": 40 * 2**20,
        "total_bytes": 100 * 2**20, "speed": 10.0 * 2**20, "eta_s": 6.0, "sources": ["hub"], "error": None, **changes,
    }  # fmt: skip


@pytest.fixture
def gateway() -> Iterator[fake.FakeGateway]:
    with fake.FakeGateway() as gateway:
        yield gateway


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], gateway: fake.FakeGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Call:
    monkeypatch.setattr("skulk.cli.pull.POLL_S", 0.001)
    return caller(capsys, {"SKULK_API": gateway.url, "SKULK_HOME": str(tmp_path)})


def test_pull_follows_the_download_to_its_end(call: Call, gateway: fake.FakeGateway) -> None:
    gateway.pulls = [told("queued", speed=0.0, eta_s=None), told(), told(), told("completed")]
    answer = call("pull", MODEL, "--node", "attic", "--pin")
    assert (answer.status, answer.out) == (0, f"{MODEL} is on {fake.NODE}\n")
    bar = "model-GGUF:Q8_0  [#########               ]  40%  40.0 MiB of 100.0 MiB"
    assert answer.err == (f"skulk: {bar}  queued  from hub\nskulk: {bar}  10.0 MiB/s  6 s left  from hub\n")
    assert gateway.body_of(f"POST {PATH}/download") == {"node_id": "attic", "pinned": True}


def test_pull_can_leave_at_once(call: Call, gateway: fake.FakeGateway) -> None:
    gateway.pulls = [told("queued")]
    answer = call("pull", MODEL, "--detach")
    assert (answer.status, "is coming to" in answer.out) == (0, True)
    assert gateway.body_of(f"POST {PATH}/download") == {"node_id": ""}
    assert json.loads(call("pull", MODEL, "--detach", "--json").out)["status"] == "queued"


def test_a_download_that_fails_is_one_line_and_status_1(call: Call, gateway: fake.FakeGateway) -> None:
    gateway.pulls = [
        told("queued"),
        told("failed", error={"code": "disk_full", "message": "needs 5 GiB, 1 GiB is free"}),
    ]
    answer = call("pull", MODEL)
    assert (answer.status, answer.out) == (1, "")
    assert answer.err.endswith("skulk: needs 5 GiB, 1 GiB is free\n")


def test_remove_and_verify(call: Call, gateway: fake.FakeGateway) -> None:
    answer = call("remove", MODEL, "--node", "attic")
    assert answer == (0, f"removed {MODEL} from {fake.NODE} (2.0 MiB freed)\n", "")
    assert gateway.requests[-1].query == [("node_id", "attic")]
    assert call("verify", MODEL) == (0, f"{MODEL} on {fake.NODE}: whole, as its card pins it\n", "")
    gateway.problem = "m.gguf has another hash"
    assert call("verify", MODEL) == (1, f"{MODEL} on {fake.NODE}: m.gguf has another hash\n", "")
    assert json.loads(call("verify", MODEL, "--json").out)["results"][0]["problem"] == "m.gguf has another hash"


def test_pin_and_unpin_exclude_each_other(call: Call) -> None:
    assert call("pull", MODEL, "--pin", "--unpin").status == 2


def test_nothing_in_the_bar_drives_a_terminal() -> None:
    line = progress_line(Pull(status="downloading", model_id="org/\x1b[2Jm", node_id="a"))
    assert "\x1b" not in line


@pytest.mark.parametrize(("seconds", "text"), [(9.9, "9 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")])
def test_time_left_for_people(seconds: float, text: str) -> None:
    assert time_left(seconds) == text
