"""One generation as its handler reads it, over all the runners that had a part in it.

    Run       the generation: its chunks as they come, the ways it can end early, what it needs to go on elsewhere
    Attempt   one runner that was asked for it; the first answers, another one follows where that one is lost

`Run.take` hands out what came; where an attempt is lost it waits for the dispatcher to find the next one, and the
reader of `take` can't tell.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from functools import cached_property
from typing import Any, Final, TypeVar

import msgspec

from skulk.bus.streams import StreamReader
from skulk.clock import Clock
from skulk.errors import ServiceError, SkulkError
from skulk.gateway.progress import Progress
from skulk.placement.prefixes import Prefix, prefix_of
from skulk.wire.beats import RunnerStatus
from skulk.wire.generation import Accepted, Chunk, Limits, Priority, Prompt, Sampling, StreamEnd
from skulk.wire.state import Instance

T = TypeVar("T")

# Whole in any reader's JSON numbers.
SEED_BITS: Final = 53
# Ends of an attempt that say nothing about the request: another runner may go on.
_LOST: Final = ("runner_failed", "stream_lost", "draining")


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """What a dialect asks for, in the words of the wire; who serves it is not its business.

    Attributes:
        key: name of the API key that asks; empty where none is needed.
    """

    model_id: str
    prompt: Prompt
    sampling: Sampling
    limits: Limits
    n: int = 1
    priority: Priority = "interactive"
    key: str = ""


def seeded(generation: Generation) -> Generation:
    """The generation with a seed: its own, or one drawn here, so that each attempt of it draws alike."""
    if generation.sampling.seed is not None:
        return generation
    sampling = msgspec.structs.replace(generation.sampling, seed=secrets.randbits(SEED_BITS))
    return msgspec.structs.replace(generation, sampling=sampling)


class Stoppable:
    """Waits that somebody else can end with an error."""

    def __init__(self) -> None:
        self._stopped: SkulkError | None = None
        self._timers: set[asyncio.Timeout] = set()

    def stop(self, error: SkulkError) -> None:
        """Ends every wait of now, and every later one, with ``error``."""
        self._stopped = self._stopped or error
        for timer in self._timers:
            if not timer.expired():
                timer.reschedule(asyncio.get_running_loop().time())

    def raise_if_stopped(self) -> None:
        """Raises what `stop` was told, if it was."""
        if self._stopped is not None:
            raise self._stopped

    async def within(self, waiting: Awaitable[T], timeout_s: float) -> T:
        """Awaits something; `stop` ends it.

        Raises:
            TimeoutError: the time is up.
            SkulkError: what `stop` was told.
        """
        timer = asyncio.timeout(timeout_s)
        try:
            async with timer:
                self._timers.add(timer)
                return await waiting
        except TimeoutError:
            if self._stopped is not None:
                raise self._stopped from None
            raise
        finally:
            self._timers.discard(timer)


class Attempt(Stoppable):
    """One runner that was asked; ``status`` is what it was when it was chosen."""

    def __init__(self, number: int, instance: Instance, status: RunnerStatus, reader: StreamReader) -> None:
        super().__init__()
        self.number = number
        self.instance = instance
        self.status = status
        self.runner_id = status.runner_id
        self.reader = reader
        self.accepted: Accepted | None = None


class Run(Stoppable):
    """One generation. Made by `Dispatcher`, read by one handler.

    Args:
        request_id: the same over all attempts; also the command id that cancels.
        part_of: the request that this is one prompt of, by which it is cancelled too; empty: it is whole.
        is_let_in: another prompt of that request was accepted, so neither a full queue nor a drain refuses this one.
        deadline: `Clock.now()` seconds.
        find_next: finds the next attempt after one was lost, or raises why there is none.

    Attributes:
        attempt: the one that is read, or asked; None before the first.
        attempts: how many runners were asked.
        tried: in which life each was asked.
        away: runners that were lost, or said that they leave; none of them is waited for as ready.
        refusal: the last one that another runner might not have given.
        lost: why the attempt before this one ended, once one did.
        resumptions: how often another runner went on.
        has_sent: the client has read some of the answer.
        is_answered: the client has its status; only events can follow.
        weights: what its tokens were drawn with.
        prompt_ids: the ids of its prompt, by the first runner's word.
        has_turn: it is counted among those that runners work at.
    """

    def __init__(
        self,
        request_id: str,
        generation: Generation,
        deadline: float,
        clock: Clock,
        find_next: Callable[[Run, SkulkError], Coroutine[Any, Any, None]],
        part_of: str = "",
        *,
        is_let_in: bool = False,
    ) -> None:
        super().__init__()
        self.request_id = request_id
        self.part_of = part_of
        self.is_let_in = is_let_in
        self.asked = generation
        self.generation = seeded(generation)
        self.deadline = deadline
        self.attempt: Attempt | None = None
        self.attempts = 0
        self.tried: dict[str, tuple[int, float]] = {}
        self.away: set[tuple[str, tuple[int, float]]] = set()
        self.refusal: SkulkError | None = None
        self.lost: SkulkError | None = None
        self.resumptions = 0
        self.has_sent = False
        self.is_answered = False
        self.has_turn = False
        self.weights = ""
        self.prompt_ids: tuple[int, ...] = ()
        self.progress = Progress(generation.n)
        self.end: StreamEnd | None = None
        self._clock = clock
        self._find_next = find_next
        self._finding: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    @property
    def model_id(self) -> str:
        return self.generation.model_id

    @cached_property
    def prefix(self) -> Prefix:
        """What its prompt begins with; looked at only where there is a choice of runners."""
        return prefix_of(self.generation.prompt)

    @property
    def current(self) -> Attempt:
        """The attempt that was accepted last."""
        assert self.attempt is not None, "no runner has accepted yet"
        return self.attempt

    @property
    def runner_id(self) -> str:
        return self.current.runner_id

    @property
    def status(self) -> RunnerStatus:
        return self.current.status

    @property
    def accepted(self) -> Accepted | None:
        return self.current.accepted

    @property
    def is_behind(self) -> bool:
        """Its reader can't go on: what comes is joined."""
        return self.current.reader.pending.is_behind

    @is_behind.setter
    def is_behind(self, is_behind: bool) -> None:
        self.current.reader.pending.is_behind = is_behind

    @property
    def has_one_clock(self) -> bool:
        """Whether no other runner had a part in it."""
        return not self.resumptions

    @property
    def is_finding(self) -> bool:
        """Whether it is between two runners."""
        return self._finding is not None and not self._finding.done()

    def stop(self, error: SkulkError) -> None:
        """Ends every wait of now, and every later one, with ``error``."""
        super().stop(error)
        if self.attempt is not None:
            self.attempt.reader.wake()

    def may_try(self, status: RunnerStatus | None) -> bool:
        """Whether a runner wasn't asked yet in its present life."""
        return status is not None and self.tried.get(status.runner_id) != life_of(status)

    async def take(self, timeout_s: float) -> list[Chunk]:
        """All chunks that are ready, in order; waits at most ``timeout_s`` for one; empty where none came.

        The last chunk of the stream carries ``end``, kept in `end`.

        Raises:
            SkulkError: ``deadline_exceeded``; ``stream_lost``, ``runner_failed`` where nobody goes on; what `stop` was
                told.
        """
        assert self.end is None, "the stream has ended"
        due = min(self._clock.now() + timeout_s, self.deadline)
        while True:
            self.raise_if_stopped()
            chunks = self._ready()
            if chunks:
                self.progress.note(chunks)
                self.end = chunks[-1].end
                return chunks
            now = self._clock.now()
            if now >= due:
                if now >= self.deadline:
                    raise too_late()
                return []
            await self._wait(due - now)

    async def close(self) -> None:
        """Ends the search for another runner, if one is under way."""
        if self._timer is not None:
            self._timer.cancel()
        finding, self._finding = self._finding, None
        if finding is not None:
            finding.cancel()
            await asyncio.wait({finding})

    def cancel_search(self) -> None:
        """Cancelled by its id between two runners: the stream ends as a runner would have ended it."""
        assert self._finding is not None, "a runner can be told"
        self._finding.cancel()

    def _ready(self) -> list[Chunk]:
        """What is ready now; begins the search for another runner where this one is lost."""
        if self._finding is not None:
            if not self._finding.done():
                return []
            found, self._finding = self._finding, None
            if found.cancelled():
                return [self._cancelled()]
            found.result()
        try:
            chunks = self.current.reader.ready()
        except SkulkError as error:
            if error.code not in _LOST or self.current.reader.is_overrun:
                raise
            self._search(error)
            return []
        error = _loss(chunks[-1].end) if chunks else None
        if error is not None:
            self._search(error)
            del chunks[-1]
        return chunks

    async def _wait(self, timeout_s: float) -> None:
        """Waits until something may be ready, or the time is over.

        One timer serves many waits: it is moved when it rings too early, which costs less than one for each token.
        """
        loop = asyncio.get_running_loop()
        self._due = loop.time() + timeout_s
        if self._timer is None or self._timer.when() > self._due:
            self._arm(loop)
        if self._finding is None:
            await self.current.reader.wait()
        else:
            await asyncio.wait({self._finding}, timeout=timeout_s)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(self._due, self._ring)

    def _ring(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        if loop.time() < self._due:
            self._arm(loop)
        elif self.attempt is not None:
            self.attempt.reader.wake()

    def _search(self, error: SkulkError) -> None:
        self._finding = asyncio.create_task(self._find_next(self, error), name=f"failover {self.request_id}")

    def _cancelled(self) -> Chunk:
        usage = self.progress.usage(len(self.prompt_ids))
        return Chunk(
            request_id=self.request_id,
            attempt=self.attempts,
            seq=0,
            runner_id=self.runner_id,
            end=StreamEnd(reason="cancelled", usage=usage),
        )


def too_late() -> ServiceError:
    """The end of an answer that took too long."""
    return ServiceError(
        "deadline_exceeded",
        "the answer was not complete when the request's time was up; ask for fewer tokens, or raise "
        "X-Request-Timeout (at most SKULK_REQUEST_TIMEOUT_S)",
    )


def life_of(status: RunnerStatus) -> tuple[int, float]:
    """What tells one life of a runner from the next."""
    return status.restarts, status.since


def _loss(end: StreamEnd | None) -> SkulkError | None:
    """The error of an end that another runner may mend; None: the end stands."""
    if end is None or end.error is None or end.error.code not in _LOST:
        return None
    return end.error.to_error()
