"""``skulk pull MODEL``: has a node fetch a model's files, with a bar that tells rate and time left."""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Final

import msgspec

from skulk.cli.client import ApiClient, connect
from skulk.cli.context import Context, note, print_json, printable
from skulk.cli.interruptible import run_interruptible
from skulk.errors import ServiceError, SkulkError, error_of
from skulk.units import format_bytes

POLL_S: Final = 0.5
RESOLVE_S: Final = 90.0
BAR: Final = 24
ENDED: Final = ("completed", "failed", "cancelled")


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a download failed."""

    code: str
    message: str


class Pull(msgspec.Struct, frozen=True, kw_only=True):
    """A download's status, as ``POST /store/models/{id}/download`` and ``GET …/status`` tell it."""

    status: str
    model_id: str
    node_id: str
    downloaded_bytes: int = 0
    total_bytes: int = 0
    speed: float = 0.0
    eta_s: float | None = None
    sources: tuple[str, ...] = ()
    error: Failure | None = None

    def to_error(self) -> SkulkError:
        """The error that a failed one ends with."""
        if self.error is None:
            return ServiceError("download_failed", f"the download of {self.model_id} ended: {self.status}.")
        return error_of(self.error.code, self.error.message)


def run(context: Context) -> int:
    """Pulls the model."""
    return run_interruptible(_pull(context))


async def _pull(context: Context) -> int:
    given = context.arguments
    body: dict[str, Any] = {"node_id": given.node or ""}
    if given.pin or given.unpin:
        body["pinned"] = bool(given.pin)
    async with connect(context.settings) as client:
        path = f"/store/models/{given.model}/download"
        pull = await client.post(path, body, Pull, timeout_s=RESOLVE_S)
        if not given.detach:
            pull = await follow(client, pull, sys.stderr.isatty() and not context.is_json)
    if context.is_json:
        print_json(msgspec.to_builtins(pull))
    elif pull.status == "completed":
        print(f"{pull.model_id} is on {pull.node_id}")
    else:
        print(f"{pull.model_id} is coming to {pull.node_id}; `skulk pull {given.model}` shows how far it is")
    return 0


async def follow(client: ApiClient, pull: Pull, is_terminal: bool) -> Pull:  # noqa: FBT001 - one flag, named at the call
    """Shows the bar until the download ends.

    Raises:
        SkulkError: why it failed.
    """
    last = ""
    while pull.status not in ENDED:
        line = progress_line(pull)
        if is_terminal:
            sys.stderr.write(f"\r\033[K{line}")
            sys.stderr.flush()
        elif pull.status != last:
            note(line)
        last = pull.status
        await asyncio.sleep(POLL_S)
        status = f"/store/models/{pull.model_id}/download/status"
        pull = await client.get(status, Pull, query={"node_id": pull.node_id})
    if is_terminal:
        sys.stderr.write("\r\033[K")
    if pull.status != "completed":
        raise pull.to_error()
    return pull


def progress_line(pull: Pull) -> str:
    """One line: name, bar, share, bytes, rate and time left. Nothing in it can drive a terminal."""
    share = min(1.0, pull.downloaded_bytes / pull.total_bytes) if pull.total_bytes else 0.0
    bar = "#" * int(share * BAR)
    parts = [
        pull.model_id.rsplit("/", 1)[-1][:40],
        f"[{bar:<{BAR}}] {share:4.0%}",
        f"{format_bytes(pull.downloaded_bytes)} of {format_bytes(pull.total_bytes)}",
    ]
    if pull.status == "downloading" and pull.speed > 0:
        parts.append(f"{format_bytes(int(pull.speed))}/s")
        if pull.eta_s is not None:
            parts.append(f"{time_left(pull.eta_s)} left")
    elif pull.status != "downloading":
        parts.append(pull.status)
    if pull.sources:
        parts.append(f"from {', '.join(pull.sources)}")
    return printable("  ".join(parts))


def time_left(seconds: float) -> str:
    """``45 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
