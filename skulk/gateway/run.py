"""One accepted generation: its chunks as they come, and the ways it can end early."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable
from typing import Final, TypeVar

import msgspec

from skulk.bus.streams import StreamReader
from skulk.clock import Clock
from skulk.errors import ServiceError, SkulkError
from skulk.wire.beats import RunnerStatus
from skulk.wire.generation import Accepted, Chunk, Limits, Prompt, Sampling, StreamEnd
from skulk.wire.state import Instance

T = TypeVar("T")

# Whole in any reader's JSON numbers.
SEED_BITS: Final = 53


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """What a dialect asks for, in the words of the wire; who serves it is not its business."""

    model_id: str
    prompt: Prompt
    sampling: Sampling
    limits: Limits
    n: int = 1


def seeded(generation: Generation) -> Generation:
    """The generation with a seed: its own, or one drawn here, so that each attempt of it draws alike."""
    if generation.sampling.seed is not None:
        return generation
    sampling = msgspec.structs.replace(generation.sampling, seed=secrets.randbits(SEED_BITS))
    return msgspec.structs.replace(generation, sampling=sampling)


class Run:
    """One attempt of a generation at one runner. Made by `Dispatcher`, read by one handler.

    Args:
        request_id: the same over all attempts; also the command id that cancels.
        deadline: `Clock.now()` seconds.
        status: the runner's when it was chosen.
    """

    def __init__(
        self,
        *,
        request_id: str,
        attempt: int,
        instance: Instance,
        status: RunnerStatus,
        reader: StreamReader,
        deadline: float,
        clock: Clock,
    ) -> None:
        self.request_id = request_id
        self.attempt = attempt
        self.instance = instance
        self.status = status
        self.runner_id = status.runner_id
        self.accepted: Accepted | None = None
        self.end: StreamEnd | None = None
        self.reader = reader
        self.deadline = deadline
        self._clock = clock
        self._stopped: SkulkError | None = None
        self._timer: asyncio.Timeout | None = None

    @property
    def model_id(self) -> str:
        return self.instance.model_id

    def stop(self, error: SkulkError) -> None:
        """Ends the wait of whoever waits for this run now, and every later one, with ``error``."""
        self._stopped = self._stopped or error
        if self._timer is not None and not self._timer.expired():
            self._timer.reschedule(asyncio.get_running_loop().time())

    def raise_if_stopped(self) -> None:
        """Raises what `stop` was told, if it was."""
        if self._stopped is not None:
            raise self._stopped

    async def take(self, timeout_s: float) -> list[Chunk]:
        """All chunks that are ready, in order; waits at most ``timeout_s`` for one; empty where none came.

        The last chunk of the stream carries ``end``, kept in `end`.

        Raises:
            SkulkError: ``deadline_exceeded``; ``stream_lost``, ``runner_failed``; what `stop` was told.
        """
        assert self.end is None, "the stream has ended"
        self.raise_if_stopped()
        left_s = self.deadline - self._clock.now()
        try:
            chunks = await self.within(self.reader.take(), min(timeout_s, left_s))
        except TimeoutError:
            if self._clock.now() >= self.deadline:
                raise self._too_late() from None
            return []
        self.end = chunks[-1].end
        return chunks

    async def within(self, waiting: Awaitable[T], timeout_s: float) -> T:
        """Awaits something of this run; `stop` ends it.

        Raises:
            TimeoutError: the time is up.
            SkulkError: what `stop` was told.
        """
        try:
            async with asyncio.timeout(timeout_s) as self._timer:
                return await waiting
        except TimeoutError:
            if self._stopped is not None:
                raise self._stopped from None
            raise
        finally:
            self._timer = None

    def _too_late(self) -> ServiceError:
        return ServiceError(
            "deadline_exceeded",
            "the answer was not complete when the request's time was up; ask for fewer tokens, or raise "
            "X-Request-Timeout (at most SKULK_REQUEST_TIMEOUT_S)",
        )
