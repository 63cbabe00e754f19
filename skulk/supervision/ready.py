"""The child's side of the hand-shake: take the specification, tell readiness, notice that the parent is gone.

    parent                                  child
      ── one line of JSON on stdin ──────────>  read_spec()
      <── {"ready": {...}} on SKULK_READY_FD ─  announce_ready(fields)
      <── {"error": {"code", "detail"}} ──────  announce_error(error)
      ── end of file on stdin ───────────────>  parent_gone() returns: finish and leave

A program started by hand has no ``SKULK_READY_FD`` and often a terminal as stdin: then announcing does nothing and
`parent_gone` never returns.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Mapping
from typing import Final

import msgspec

from skulk.errors import SkulkError, StartError

READY_FD: Final = "SKULK_READY_FD"
SPEC_LIMIT: Final = 16 * 1024 * 1024
READY_LIMIT: Final = 64 * 1024
_STDIN: Final = 0


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a child can't start, by a code of `skulk.errors`."""

    code: str
    detail: str


class Announcement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The one line a child writes: exactly one of the two is set."""

    ready: dict[str, object] | None = None
    error: Failure | None = None


def announce_ready(fields: Mapping[str, object]) -> None:
    """Tell the parent that this process serves.

    Args:
        fields: what the parent should know, as JSON values; at most 64 KiB encoded.
    """
    _announce(Announcement(ready=dict(fields)))


def announce_error(error: SkulkError) -> None:
    """Tell the parent why this process can't start; its `Child.start` raises the same code. Then exit."""
    _announce(Announcement(error=Failure(code=error.code, detail=error.detail)))


def _announce(message: Announcement) -> None:
    # Taken out of the environment: a process says it once, and its own children have no such descriptor.
    number = os.environ.pop(READY_FD, None)
    if number is None:
        return
    line = msgspec.json.encode(message) + b"\n"
    assert len(line) <= READY_LIMIT, f"an announcement of {len(line)} bytes is over {READY_LIMIT}"
    with os.fdopen(int(number), "wb") as pipe:
        pipe.write(line)


def read_spec() -> bytes:
    """Read the specification: the one line that the parent wrote to stdin. Blocks; call it before the event loop runs.

    Raises:
        StartError: ``config_invalid``; stdin ended, or the line is over 16 MiB.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        part = os.read(_STDIN, 65536)
        line += part
        if not part or len(line) > SPEC_LIMIT:
            raise StartError(
                "config_invalid",
                f"Expected one line of JSON on stdin, got {len(line)} bytes without an end of line. "
                "This program is started by `skulk up`; to run it by hand, pipe its specification into it.",
            )
    return bytes(line[:-1])


class _EndOfFile(asyncio.Protocol):
    def __init__(self, gone: asyncio.Future[None]) -> None:
        self._gone = gone

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._gone.done():
            self._gone.set_result(None)


async def parent_gone() -> None:
    """Return when the parent closed its end of stdin or died. Costs no thread and no polling.

    Never returns where stdin is no pipe (a terminal, ``/dev/null``): such a process has no parent to follow.
    """
    loop = asyncio.get_running_loop()
    gone: asyncio.Future[None] = loop.create_future()
    kind = os.fstat(_STDIN).st_mode
    if not (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
        await gone
        return
    pipe = os.fdopen(os.dup(_STDIN), "rb", buffering=0)
    transport, _ = await loop.connect_read_pipe(lambda: _EndOfFile(gone), pipe)
    try:
        await gone
    finally:
        transport.close()
