"""``python -m tests.support.stub_launcher MODE up …``: the real command line over a launcher that starts nothing.

The API that it tells is ``STUB_API`` (a `FakeGateway` of the test). What it was given is noted in ``STUB_NOTE``.

    serves    starts at once, stops at once
    drains    stops after a minute, or at once when hurried
    starts    needs a minute to start
    refuses   the port is taken
    fails     starts, then can't go on
    dies      ends without a word
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import types
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from skulk.cli.main import main
from skulk.errors import StartError
from skulk.settings import Settings

MODE: Final = sys.argv[1]
MINUTE_S: Final = 60.0


class StubRunning:
    """As `skulk.cli.launcher.Running`."""

    node_id = "aaaa000000000001"
    nats_sub_line = "nats -s nats://127.0.0.1:4222 sub 'skulk.>'"
    placed: tuple[Any, ...] = ()
    is_restarting = False

    def __init__(self) -> None:
        self.api_url = os.environ.get("STUB_API", "")
        self._ended = asyncio.Event()

    def stop(self) -> None:
        self._ended.set()

    async def wait(self) -> None:
        if MODE == "fails":
            raise StartError("child_failed", "the bus is gone for good")
        await self._ended.wait()


def say(word: str) -> None:
    """A line that the test waits for."""
    print(f"stub: {word}", flush=True)


def take_note(settings: Settings) -> None:
    """Writes down what this process was given."""
    path = os.environ.get("STUB_NOTE")
    if path:
        Path(path).write_text(json.dumps({"pid": os.getpid(), "settings": msgspec.to_builtins(settings)}))


@asynccontextmanager
async def launch(settings: Settings) -> AsyncGenerator[StubRunning]:
    """Starts nothing, as `MODE` says."""
    take_note(settings)
    if MODE == "refuses":
        raise StartError("port_in_use", "port 7 is taken; choose another with --api-port")
    if MODE == "dies":
        print("stub: last words", flush=True)
        os._exit(3)
    try:
        if MODE == "starts":
            say("starting")
            await asyncio.sleep(MINUTE_S)
        yield StubRunning()
        if MODE == "drains":
            say("draining")
            await asyncio.sleep(MINUTE_S)
    except asyncio.CancelledError:
        say("hurried")
        raise
    say("stopped")


if __name__ == "__main__":
    stub: Any = types.ModuleType("skulk.cli.launcher")
    stub.launch = launch
    sys.modules["skulk.cli.launcher"] = stub
    sys.exit(main(sys.argv[2:]))
