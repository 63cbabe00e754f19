"""Several prompts of one completion request, read as one run: each is a generation of its own, at a runner of its own.

prompts    at most as many are under way as the model has slots (``n`` counts); the others wait here and not in the
           model's queue, which is everybody's
choices    of prompt p: p * n, p * n + 1, …
headers    when the first ones are accepted; what is refused later can only be told as an event
the end    all have ended        one end, their usage and times added up
           one fails             the others are cancelled, and its error is the whole's
           one is cancelled      so is the whole: its id is the one that clients know
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from skulk.clock import Clock
from skulk.errors import SkulkError
from skulk.gateway.dispatch import Dispatcher
from skulk.gateway.run import Generation, Run, Stoppable, too_late
from skulk.ids import new_id
from skulk.wire.beats import RunnerStatus
from skulk.wire.generation import Accepted, Chunk, StreamEnd, Timings, Usage

_NOTHING: Final = Usage(prompt_tokens=0, completion_tokens=0)


class Prompts(Stoppable):
    """The run of several generations. Owns a task for each that is under way; read by one handler.

    Args:
        generations: alike in everything but their prompt.
        deadline: `Clock.now()` seconds, of them all.
    """

    def __init__(
        self, dispatcher: Dispatcher, generations: Sequence[Generation], clock: Clock, deadline: float
    ) -> None:
        super().__init__()
        self.request_id = new_id()
        self.end: StreamEnd | None = None
        self.has_one_clock = False
        self._dispatcher = dispatcher
        self._generations = generations
        self._n = generations[0].n
        self._clock = clock
        self._deadline = deadline
        self._tasks: set[asyncio.Task[None]] = set()
        self._began = 0
        self._accepted: set[int] = set()
        self._ends: list[StreamEnd] = []
        self._first_at = 0.0
        self._running: dict[int, Run] = {}
        self._last: Run | None = None
        self._arrived: dict[int, list[Chunk]] = {}
        self._handed: tuple[Run, ...] = ()
        self._defect: BaseException | None = None
        self._is_answered = False
        self._is_behind = False
        self._is_cancelled = False
        self._is_closed = False
        self._first = range(0)
        self._changed = asyncio.Event()
        self._taken = asyncio.Event()

    @property
    def is_answered(self) -> bool:
        """The client has its status; only events can follow."""
        return self._is_answered

    @is_answered.setter
    def is_answered(self, is_answered: bool) -> None:
        self._is_answered = is_answered
        for run in self._running.values():
            run.is_answered = is_answered

    @property
    def has_sent(self) -> bool:
        """The client has read what was taken last."""
        return all(run.has_sent for run in self._handed)

    @has_sent.setter
    def has_sent(self, has_sent: bool) -> None:
        for run in self._handed:
            run.has_sent = has_sent

    @property
    def is_behind(self) -> bool:
        """The client takes nothing at present."""
        return self._is_behind

    @is_behind.setter
    def is_behind(self, is_behind: bool) -> None:
        self._is_behind = is_behind
        for run in self._running.values():
            run.is_behind = is_behind

    @property
    def status(self) -> RunnerStatus:
        """Of the runner that was last at work."""
        assert self._last is not None, "no runner has accepted yet"
        return self._last.status

    @property
    def accepted(self) -> Accepted | None:
        """What that runner said."""
        return None if self._last is None else self._last.accepted

    async def begin(self) -> None:
        """Returns when as many are accepted as there are slots for at first.

        Raises:
            SkulkError: one was refused.
        """
        self._fill()
        self._first = range(self._began)
        while not self._accepted.issuperset(self._first):
            await self._wait()

    async def take(self, timeout_s: float) -> list[Chunk]:
        """As `Run.take`: all chunks that are ready, in order within each choice."""
        assert self.end is None, "the stream has ended"
        due = min(self._clock.now() + timeout_s, self._deadline)
        while True:
            self._raise_failure()
            chunks = [chunk for arrived in self._arrived.values() for chunk in arrived]
            if chunks or self._is_over:
                self._handed = tuple(self._running[index] for index in self._arrived if index in self._running)
                self._arrived.clear()
                self._taken.set()
                if self._is_over:
                    self.end = self._whole_end()
                return chunks
            now = self._clock.now()
            if now >= self._deadline:
                raise too_late()
            if now >= due:
                return []
            await self._wait(due - now)

    def cancel(self) -> None:
        """Ends as cancelled, wherever its prompts are."""
        self._is_cancelled = True
        self._changed.set()

    async def close(self) -> None:
        """Cancels what is under way; nothing begins any more."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def _is_over(self) -> bool:
        return self._is_cancelled or len(self._ends) == len(self._generations)

    def _fill(self) -> None:
        """Begins as many of the next ones as there are slots for; one in any case."""
        has_failed = self._stopped is not None or self._defect is not None
        while self._began < len(self._generations) and not (self._is_over or self._is_closed or has_failed):
            busy = len(self._tasks) * self._n
            if busy and busy + self._n > self._dispatcher.slots_of(self._generations[0].model_id):
                return
            index = self._began
            task = asyncio.create_task(self._answer(index), name=f"prompt {index} of {self.request_id}")
            self._began += 1
            self._tasks.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, SkulkError):
            self.stop(error)
        elif error is not None:
            self._defect = error
        elif not task.cancelled():
            self._fill()
        self._changed.set()

    async def _answer(self, index: int) -> None:
        """One prompt, from the search for a runner to its end."""
        left_s = self._deadline - self._clock.now()
        is_let_in = index not in self._first and bool(self._accepted)
        async with self._dispatcher.begin(
            self._generations[index], left_s, part_of=self.request_id, is_let_in=is_let_in
        ) as run:
            run.is_answered, run.is_behind = self._is_answered, self._is_behind
            self._running[index] = self._last = run
            self._first_at = self._first_at or self._clock.now()
            self._accepted.add(index)
            self._fill()
            self._changed.set()
            silent = set(range(self._n))
            try:
                while run.end is None:
                    chunks = await run.take(self._deadline - self._clock.now())
                    silent -= {chunk.choice for chunk in chunks if chunk.finish_reason is not None}
                    if chunks:
                        await self._hand_over(index, self._told(index, chunks, silent))
            finally:
                del self._running[index]
        assert run.end is not None
        self._note_end(run.end)

    def _told(self, index: int, chunks: Iterable[Chunk], silent: set[int]) -> list[Chunk]:
        """One prompt's chunks as the whole's: its end becomes that of its choices that don't have theirs yet."""
        first = index * self._n
        told: list[Chunk] = []
        for chunk in chunks:
            end = chunk.end
            told.append(msgspec.structs.replace(chunk, choice=first + chunk.choice, end=None))
            if end is not None and end.error is None and end.reason != "cancelled":
                told.extend(
                    msgspec.structs.replace(
                        chunk, choice=first + choice, text="", tokens=(), finish_reason=end.reason, end=None
                    )
                    for choice in sorted(silent)
                )
        return told

    async def _hand_over(self, index: int, chunks: list[Chunk]) -> None:
        """Returns when the reader has them: what comes meanwhile waits in the run's own bounds."""
        self._arrived[index] = chunks
        self._changed.set()
        while index in self._arrived:
            self._taken.clear()
            await self._taken.wait()

    def _note_end(self, end: StreamEnd) -> None:
        if end.error is not None:
            raise end.error.to_error()
        self._ends.append(end)
        self._is_cancelled = self._is_cancelled or end.reason == "cancelled"

    def _whole_end(self) -> StreamEnd:
        reason = "cancelled" if self._is_cancelled else "stop"
        usages = [end.usage or _NOTHING for end in self._ends]
        usages += [run.progress.usage(len(run.prompt_ids)) for run in self._running.values()]
        usage = Usage(
            prompt_tokens=sum(one.prompt_tokens for one in usages),
            completion_tokens=sum(one.completion_tokens for one in usages),
            cached_tokens=sum(one.cached_tokens for one in usages),
        )
        times = [end.timings for end in self._ends if end.timings is not None]
        took_s = self._clock.now() - self._first_at
        timings = Timings(
            queue_s=max((one.queue_s for one in times), default=0.0),
            prefill_s=sum(one.prefill_s for one in times),
            decode_s=sum(one.decode_s for one in times),
            decode_tps=usage.completion_tokens / took_s if took_s > 0 else 0.0,
        )
        return StreamEnd(reason=reason, usage=usage, timings=timings)

    def _raise_failure(self) -> None:
        if self._defect is not None:
            raise self._defect
        self.raise_if_stopped()

    async def _wait(self, timeout_s: float | None = None) -> None:
        self._raise_failure()
        self._changed.clear()
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return
        self._raise_failure()


@asynccontextmanager
async def begin_all(
    dispatcher: Dispatcher, generations: Sequence[Generation], clock: Clock, timeout_s: float
) -> AsyncGenerator[Prompts]:
    """The run of several prompts, the first of them accepted. Leaving before its end cancels them.

    Raises:
        SkulkError: as `Dispatcher.begin`.
    """
    prompts = Prompts(dispatcher, generations, clock, clock.now() + timeout_s)
    try:
        with dispatcher.whole(prompts.request_id, prompts.cancel):
            await prompts.begin()
            yield prompts
    finally:
        await prompts.close()
