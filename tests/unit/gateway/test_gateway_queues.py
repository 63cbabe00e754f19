"""A model's queue: how many may wait, in a burst and under an overload that lasts."""

from __future__ import annotations

import asyncio

import pytest

from skulk.errors import UnavailableError
from skulk.gateway.queues import CALM_S, WAITING_A_SLOT, ModelQueue
from skulk.gateway.turns import Ticket
from tests.support.bus import ManualClock

WINDOW = 20


class Crowd:
    """A queue, and who is in it."""

    def __init__(self, window: int = WINDOW) -> None:
        self.clock = ManualClock()
        self.queue = ModelQueue(self.clock)
        self.queue.resize(window)
        self.tasks: list[asyncio.Task[None]] = []
        self.tickets: list[Ticket] = []

    async def come(self, count: int) -> int:
        """So many come; how many were refused at once."""
        before = len(self.tasks)
        for _ in range(count):
            ticket = Ticket(number=len(self.tickets) + 1)
            self.tickets.append(ticket)
            self.tasks.append(asyncio.create_task(self.queue.enter(ticket, 60.0)))
        await asyncio.sleep(0)
        return sum(task.done() and task.exception() is not None for task in self.tasks[before:])

    async def go(self, count: int) -> None:
        """The first so many that are at work are done; others begin."""
        for _ in range(count):
            ticket = next(
                ticket
                for ticket, task in zip(self.tickets, self.tasks, strict=True)
                if task.done() and task.exception() is None
            )
            index = self.tickets.index(ticket)
            del self.tickets[index], self.tasks[index]
            self.queue.leave(ticket, 1.0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def test_a_burst_waits_and_is_served() -> None:
    crowd = Crowd()
    assert await crowd.come(WINDOW * (1 + WAITING_A_SLOT)) == 0
    assert crowd.queue.waiting == WINDOW * WAITING_A_SLOT
    await crowd.go(10)
    assert await crowd.come(10) == 0, "nobody was refused: it is no overload"
    await crowd.close()


async def test_an_overload_that_lasts_has_a_short_queue_until_it_is_over() -> None:
    crowd = Crowd()
    assert await crowd.come(WINDOW * (1 + WAITING_A_SLOT) + 1) == 1
    await crowd.go(WINDOW)
    assert await crowd.come(5) == 5, "who waited stays; nobody joins them"
    await crowd.go(WINDOW * (WAITING_A_SLOT - 1))
    assert crowd.queue.waiting == 0
    assert await crowd.come(5) == 2, "an eighth of the slots, rounded up"
    for _ in range(10):
        crowd.clock.time += CALM_S - 0.1
        await crowd.go(1)
        assert await crowd.come(2) == 1, "it lasts as long as somebody is refused"
    crowd.clock.time += CALM_S
    assert await crowd.come(WINDOW * WAITING_A_SLOT - crowd.queue.waiting) == 0
    await crowd.close()


@pytest.mark.parametrize("window", [1, 2, 5])
async def test_one_may_wait_even_then(window: int) -> None:
    crowd = Crowd(window)
    assert await crowd.come(window * (1 + WAITING_A_SLOT) + 1) == 1
    await crowd.go(window * WAITING_A_SLOT)
    assert await crowd.come(2) == 1
    await crowd.close()


async def test_a_refusal_says_when_to_come_again() -> None:
    crowd = Crowd(1)
    await crowd.come(1 + WAITING_A_SLOT)
    with pytest.raises(UnavailableError) as refused:
        await crowd.queue.enter(Ticket(number=99), 60.0)
    assert refused.value.code == "overloaded" and (refused.value.retry_after_s or 0.0) >= 1.0
    await crowd.close()


async def test_one_that_was_let_in_before_is_not_refused() -> None:
    crowd = Crowd(1)
    assert await crowd.come(2 + WAITING_A_SLOT) == 1
    part = asyncio.create_task(crowd.queue.enter(Ticket(number=99), 60.0, is_let_in=True))
    await asyncio.sleep(0)
    assert not part.done()
    part.cancel()
    await asyncio.wait({part})
    await crowd.close()


async def test_one_that_has_just_gone_away_can_be_displaced() -> None:
    queue = ModelQueue(ManualClock())
    queue.resize(1)
    greedy = [asyncio.create_task(queue.enter(Ticket(number=number, key="a"), 60.0)) for number in range(5)]
    await asyncio.sleep(0)
    greedy[-1].cancel()
    # its task hasn't run since: its ticket is still there
    modest = asyncio.create_task(queue.enter(Ticket(number=9, key="b"), 60.0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not modest.done() and queue.waiting == 4
    for task in (*greedy, modest):
        task.cancel()
    await asyncio.gather(*greedy, modest, return_exceptions=True)
    assert queue.waiting == 0
