"""Commands are carried out once: the result is kept 10 minutes under the client's id and repeated (DESIGN 3)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

from skulk.clock import Clock
from skulk.errors import UnavailableError

KEPT_S: Final = 600.0
KEPT_COMMANDS: Final = 10_000


class Commands:
    """Runs each command id once, also when it is asked twice at the same time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._results: dict[str, tuple[float, asyncio.Task[Any]]] = {}

    async def once(self, command_id: str, carry_out: Callable[[], Awaitable[Any]]) -> Any:
        """The result of a command, carried out now or before.

        A caller that goes away doesn't stop a command that has begun. Failures that may pass are not kept.

        Raises:
            SkulkError: what the command raised; ``overloaded`` when too many commands are remembered.
        """
        self._forget_old()
        known = self._results.get(command_id)
        if known is None:
            if len(self._results) >= KEPT_COMMANDS:
                raise UnavailableError(
                    "overloaded", f"{KEPT_COMMANDS} commands came within 10 minutes", retry_after_s=60
                )
            task = asyncio.ensure_future(_run(carry_out))
            task.set_name(f"command-{command_id}")
            known = self._results[command_id] = (self._clock.now(), task)
        try:
            return await asyncio.shield(known[1])
        except UnavailableError:
            self._results.pop(command_id, None)
            raise

    async def close(self) -> None:
        """Cancels what runs."""
        running = [task for _, task in self._results.values() if not task.done()]
        for task in running:
            task.cancel()
        await asyncio.gather(*(task for _, task in self._results.values()), return_exceptions=True)
        self._results.clear()

    def _forget_old(self) -> None:
        limit = self._clock.now() - KEPT_S
        for command_id, (began, task) in tuple(self._results.items()):
            if began >= limit:
                break
            if task.done():
                del self._results[command_id]


async def _run(carry_out: Callable[[], Awaitable[Any]]) -> Any:
    return await carry_out()
