"""The queues before the runners, one a model: requests wait here for their turn, and go on in the order of `turns`.

What is let through is a little more than the runners have slots, so that none of them stands idle; what waits here can
still be weighed by key and priority. All of it is bounded: a queue by `WAITING_A_SLOT`, so that nobody waits
for more than a few answers of others, the wait by the caller.

    calm        a burst waits: up to `WAITING_A_SLOT` for each slot
      │ ▲
      │ └─ nobody was refused for `CALM_S`
      ▼ the queue is full
    overloaded  more comes than can be served, so a long queue would make all wait and serve none more: `CROWDED_SHARE`
                of the slots may wait, and who is let in is answered nearly as soon as ever
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

from skulk.clock import Clock
from skulk.errors import UnavailableError
from skulk.gateway.run import Generation
from skulk.gateway.turns import Ticket, Turns, enter, leave, turn, without
from skulk.wire.state import Instance

WAITING_A_SLOT: Final = 4
MOST_WAITING: Final = 1024
CROWDED_SHARE: Final = 0.125
CALM_S: Final = 5.0
_NEW_SHARE: Final = 0.2
_MAX_RETRY_S: Final = 60.0


def slots_of(ready: tuple[Instance, ...]) -> int:
    """Slots of a model's ready instances."""
    return sum(_slots(ready))


def window_of(ready: tuple[Instance, ...]) -> int:
    """Slots of a model's ready instances, and a quarter more."""
    return sum(count + max(1, count // 4) for count in _slots(ready))


def _slots(ready: tuple[Instance, ...]) -> list[int]:
    return [found.assignment.n_parallel for found in ready if found.assignment is not None]


class ModelQueue:
    """The requests for one model. ``window`` is kept by whoever knows the instances."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._turns = Turns()
        self._called: dict[int, asyncio.Future[None]] = {}
        self._took_s = 0.0
        self._refused_at = -math.inf
        self.window = 1

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._turns.waiting)

    @property
    def is_empty(self) -> bool:
        return not self._turns.working and not self._turns.waiting

    @property
    def limit(self) -> int:
        """So many may wait now."""
        if self._clock.now() - self._refused_at < CALM_S:
            return math.ceil(CROWDED_SHARE * self.window)
        return min(WAITING_A_SLOT * self.window, MOST_WAITING)

    def resize(self, window: int) -> None:
        """There are so many slots now."""
        self.window = max(1, window)
        self._call()

    async def enter(self, ticket: Ticket, wait_s: float, *, is_let_in: bool = False) -> None:
        """Returns when it is this request's turn; then `leave` must follow.

        ``is_let_in``: it belongs to one that was let in before; a full queue is no reason against it.

        Raises:
            UnavailableError: ``overloaded``: the queue is full, another key's turn came before, or the wait was long.
        """
        limit = MOST_WAITING if is_let_in else self.limit
        entered = enter(self._turns, ticket, window=self.window, limit=limit)
        self._turns = entered.turns
        if entered.outcome == "goes":
            return
        if entered.outcome == "refused" or entered.displaced is not None:
            self._refused_at = self._clock.now()
        if entered.outcome == "refused":
            raise self._overloaded(f"{self.waiting} requests wait for this model and no more can now")
        if entered.displaced is not None:
            displaced = self._called.pop(entered.displaced.number)
            if not displaced.done():  # else it has gone away and not yet said so
                displaced.set_exception(
                    self._overloaded(f"the queue of {limit} is full and this key has more than its share of it")
                )
        called = self._called[ticket.number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(wait_s):
                await called
        except BaseException as error:
            self._called.pop(ticket.number, None)
            self._turns = without(self._turns, ticket)
            if called.done() and not called.cancelled() and called.exception() is None:
                # its turn came in the moment in which it went away
                self.leave(ticket, None)
            if isinstance(error, TimeoutError):
                raise self._overloaded(f"no slot was free for {wait_s:.0f} s") from None
            raise

    def leave(self, ticket: Ticket, took_s: float | None) -> None:
        """The request is done; ``took_s``: how long a slot was in use, where it came to its own end."""
        self._turns = leave(self._turns, ticket)
        if took_s is not None:
            self._took_s += (_NEW_SHARE if self._took_s else 1.0) * (took_s - self._took_s)
        self._call()

    def _call(self) -> None:
        while True:
            self._turns, ticket = turn(self._turns, window=self.window)
            if ticket is None:
                return
            called = self._called.pop(ticket.number)
            if called.done():  # it has gone away and not yet said so
                self._turns = leave(self._turns, ticket)
            else:
                called.set_result(None)

    def _overloaded(self, why: str) -> UnavailableError:
        turns = (self.waiting + 1) / self.window
        retry_after_s = min(max(math.ceil(turns * self._took_s / 2), 1), _MAX_RETRY_S)
        return UnavailableError(
            "overloaded",
            f"{why}; try again in {retry_after_s:.0f} s, or place another replica of the model",
            retry_after_s=retry_after_s,
        )


class Queues:
    """All models' queues of one gateway."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._queues: dict[str, ModelQueue] = {}
        self._numbers = itertools.count(1)

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn, of all models."""
        return sum(queue.waiting for queue in self._queues.values())

    def models(self) -> tuple[str, ...]:
        """The models whose queues aren't empty."""
        return tuple(self._queues)

    def resize(self, model_id: str, ready: tuple[Instance, ...]) -> None:
        """A model's ready instances changed."""
        queue = self._queues.get(model_id)
        if queue is not None:
            queue.resize(window_of(ready))

    @asynccontextmanager
    async def turn(
        self, generation: Generation, ready: tuple[Instance, ...], wait_s: float, *, is_let_in: bool = False
    ) -> AsyncGenerator[None]:
        """Holds a request's slots as long as the block lasts. ``is_let_in``: see `ModelQueue.enter`.

        Raises:
            UnavailableError: ``overloaded``.
        """
        model_id = generation.model_id
        queue = self._queues.setdefault(model_id, ModelQueue(self._clock))
        queue.resize(window_of(ready))
        ticket = Ticket(
            number=next(self._numbers), key=generation.key, priority=generation.priority, weight=generation.n
        )
        try:
            await queue.enter(ticket, wait_s, is_let_in=is_let_in)
            began = self._clock.now()
            try:
                yield
            finally:
                queue.leave(ticket, self._clock.now() - began)
        finally:
            if queue.is_empty and self._queues.get(model_id) is queue:
                del self._queues[model_id]
