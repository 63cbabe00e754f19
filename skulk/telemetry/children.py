"""Asking another program, with a deadline and a bound on what it says."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from typing import Final

import msgspec

MAX_OUTPUT: Final = 1024 * 1024
_ERROR_TAIL: Final = 2000


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a program said.

    Attributes:
        problem: why there is no answer, a clause for people; empty where it ended with status 0.
    """

    output: bytes = b""
    problem: str = ""


async def ask(argv: Sequence[str], *, timeout_s: float) -> Answer:
    """Runs a program to its end; never raises for what the program does.

    It runs in a session of its own and is killed, with its children, when the time is over, when it says more than
    `MAX_OUTPUT` bytes, and when the caller is cancelled.
    """
    try:
        child = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        return Answer(problem=f"{argv[0]} can't be started: {error.strerror}")
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
            output = group.create_task(_read(child.stdout, child), name=f"read {argv[0]}")
            errors = group.create_task(_read(child.stderr, child), name=f"read errors of {argv[0]}")
            await child.wait()
    except TimeoutError:
        _kill(child)  # also where only a child of the child still holds a pipe open
        return Answer(problem=f"{argv[0]} didn't end within {timeout_s:g} s")
    finally:
        await _end(child)
    if max(len(output.result()), len(errors.result())) > MAX_OUTPUT:
        return Answer(problem=f"{argv[0]} said more than {MAX_OUTPUT} bytes")
    if child.returncode != 0:
        tail = errors.result()[-_ERROR_TAIL:].decode("utf-8", "replace").strip()
        last = tail.splitlines()[-1] if tail else "it said nothing"
        return Answer(problem=f"{argv[0]} {_ended(child.returncode)}: {last}")
    return Answer(output=output.result())


async def _read(stream: asyncio.StreamReader, child: asyncio.subprocess.Process) -> bytes:
    """All that comes, or a little more than the bound; then the child has been killed."""
    said = bytearray()
    while len(said) <= MAX_OUTPUT:
        part = await stream.read(65536)
        if not part:
            return bytes(said)
        said += part
    _kill(child)
    return bytes(said)


async def _end(child: asyncio.subprocess.Process) -> None:
    if child.returncode is None:
        _kill(child)
        await child.wait()


def _kill(child: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _ended(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
