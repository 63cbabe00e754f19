"""Logs: one line per record on stderr, for people or for machines; logging itself never fails, never tells a secret.

text  ``2026-01-31T12:00:00.123Z INFO    node skulk.node: 3 runners stopped``
json  ``{"time":"2026-01-31T12:00:00.123Z","level":"info","process":"node","logger":"skulk.node","message":"..."}``
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from typing import IO, Any, Final

import msgspec

from skulk.settings import LogFormat, LogLevel

_STANDARD: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_ESCAPES: Final = {code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160))} | {
    9: "\t",
    10: "\\n",
    13: "\\r",
    0x2028: "\\u2028",
    0x2029: "\\u2029",
}
# What JSON lets stand though a terminal or a reader of lines minds it.
_JSON_ESCAPES: Final = {code: f"\\u{code:04x}" for code in (*range(127, 160), 0x2028, 0x2029)}
# A shorter one would be found inside ordinary words and tear holes in every line.
_LEAST_SECRET: Final = 4
_MASK: Final = "********"


def configure_logging(
    format: LogFormat,  # noqa: A002 - the setting's word
    level: LogLevel,
    name: str,
    *,
    secrets: Iterable[str] = (),
    stream: IO[str] | None = None,
) -> None:
    """Sends all records of this process to ``stream`` (None: stderr); replaces an earlier configuration.

    Args:
        format: ``text`` or ``json``.
        level: the least level that is written.
        name: of this process, in every line (``node``, ``gateway``, a runner's id).
        secrets: texts that are masked wherever they appear, such as keys and tokens.
        stream: where to write.
    """
    kinds: dict[str, type[_LineFormatter]] = {"text": TextFormatter, "json": JsonFormatter}
    handler = _QuietHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(kinds[format](name, secrets))
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, _QuietHandler)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())


class _QuietHandler(logging.StreamHandler[IO[str]]):
    """A full disk or a closed stderr must not disturb the work that is being logged."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        return


class _LineFormatter(logging.Formatter):
    def __init__(self, name: str, secrets: Iterable[str] = ()) -> None:
        super().__init__()
        self._name = name
        plain = {secret for secret in secrets if len(secret) >= _LEAST_SECRET}
        # As it stands in text, and as it stands inside a JSON string.
        both = plain | {msgspec.json.encode(secret)[1:-1].decode() for secret in plain}
        self._secrets = tuple(sorted(both, key=len, reverse=True))

    def format(self, record: logging.LogRecord) -> str:
        line = self._line(record)
        for secret in self._secrets:
            line = line.replace(secret, _MASK)
        return line

    def _line(self, record: logging.LogRecord) -> str:
        raise NotImplementedError

    def _error(self, record: logging.LogRecord) -> str:
        parts = [self.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
        if record.stack_info:
            parts.append(self.formatStack(record.stack_info))
        return "\n".join(parts)


class TextFormatter(_LineFormatter):
    """For people. Control characters are escaped, so that no message can fake a line or drive a terminal."""

    def _line(self, record: logging.LogRecord) -> str:
        extras = "".join(f" {key}={value}" for key, value in _extras(record).items())
        error = self._error(record)
        text = f"{_message(record)}{extras}" + (f" | {error}" if error else "")
        return (
            f"{_time(record)} {record.levelname:<7} {self._name} {record.name}: "
            f"{text.replace(chr(10) + ' ', ' | ').translate(_ESCAPES)}"
        )


class JsonFormatter(_LineFormatter):
    """For machines: one object per line; ``extra`` fields stand beside the fixed ones, a traceback in ``error``."""

    def _line(self, record: logging.LogRecord) -> str:
        error = self._error(record)
        body = {
            **{key: _plain(value) for key, value in _extras(record).items()},
            "time": _time(record),
            "level": record.levelname.lower(),
            "process": self._name,
            "logger": record.name,
            "message": _message(record),
            **({"error": error} if error else {}),
        }
        return msgspec.json.encode(body).decode().translate(_JSON_ESCAPES)


def _time(record: logging.LogRecord) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{whole}.{int(record.created * 1000) % 1000:03d}Z"


def _message(record: logging.LogRecord) -> str:
    """The message; where its arguments don't fit, the template and the arguments, so that the call can be found."""
    try:
        text = record.getMessage()
    except (TypeError, ValueError, KeyError):
        text = f"{record.msg} {record.args!r}"
    return text.encode("utf-8", "backslashreplace").decode()


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in record.__dict__.items() if key not in _STANDARD and not key.startswith("_")}


def _plain(value: object) -> object:
    if value is None or isinstance(value, (bool, float)) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    return str(value).encode("utf-8", "backslashreplace").decode()
