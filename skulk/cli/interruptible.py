"""Runs a command's coroutine so that Ctrl-C and SIGTERM cancel it: its clean-up runs, and nothing is printed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def run_interruptible(command: Coroutine[Any, Any, int]) -> int:
    """The command's exit status, or 128 + the signal that ended it.

    Each signal cancels once more: clean-up that waits is to take a second one as "at once".
    """

    async def guarded() -> int:
        received: list[int] = []
        task = asyncio.current_task()
        assert task is not None

        def on_signal(number: int) -> None:
            received.append(number)
            task.cancel()

        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, on_signal, number)
        try:
            return await command
        except asyncio.CancelledError:
            if not received:
                raise
            return 128 + received[0]

    return asyncio.run(guarded())
