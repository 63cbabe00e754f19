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
            SkulkError: what the command raised; ``overloaded`` when too many commands are remembered; ``not_master``
                when the mastership ended before the command.
        """
        self._forget_old()
        known = self._results.get(command_id)
        if known is None:
            if len(self._results) >= KEPT_COMMANDS:
                raise UnavailableError(
                    "overloaded", f"{KEPT_COMMANDS} commands came within 10 minutes", retry_after_s=60
                )
            task = asyncio.create_task(_run(carry_out), name=f"command-{command_id}")
            # nobody may be left who would take the failure
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            known = self._results[command_id] = (self._clock.now(), task)
        try:
            return await asyncio.shield(known[1])
        except UnavailableError:
            self._forget(command_id, known[1])
            raise
        except asyncio.CancelledError:
            if not known[1].cancelled():
                raise
            raise UnavailableError(
                "not_master", "this node is not the master any more; ask again", retry_after_s=1
            ) from None

    def drop_running(self) -> None:
        """Ends what runs, for the mastership is over; whoever waits is told to ask the next master."""
        running = {name: task for name, (_, task) in self._results.items() if not task.done()}
        for name, task in running.items():
            task.cancel()
            self._forget(name, task)

    def _forget(self, command_id: str, task: asyncio.Task[Any]) -> None:
        """Forgets a result, not the one of a later attempt."""
        known = self._results.get(command_id)
        if known is not None and known[1] is task:
            del self._results[command_id]

    def _forget_old(self) -> None:
        limit = self._clock.now() - KEPT_S
        for command_id, (began, task) in tuple(self._results.items()):
            if began >= limit:
                break
            if task.done():
                del self._results[command_id]


async def _run(carry_out: Callable[[], Awaitable[Any]]) -> Any:
    return await carry_out()
