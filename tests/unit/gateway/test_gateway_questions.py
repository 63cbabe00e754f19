"""Calls that a runner answers whole: which runner is asked, and what happens when it refuses, dies or nobody waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.port import Call
from skulk.bus.replica import Replica
from skulk.bus.subjects import NODE_BEAT, RUNNER_CANCEL, RUNNER_EMBED
from skulk.clock import SystemClock
from skulk.errors import RequestError, ServiceError, SkulkError, UnavailableError
from skulk.gateway.questions import Asker, Question
from skulk.gateway.waiting import not_placed
from skulk.wire.embedding import Embed, Embedded
from skulk.wire.generation import Cancel, Cancelled, TextPrompt
from tests.support.states import assignment, beat, instance, state_of, status

WAIT_S = 10.0
ANSWER = Embedded(vectors=(b"\0" * 4,), prompt_tokens=1)
Answer = Callable[[], Awaitable[Embedded]]


class World:
    """Two instances of one model on two nodes, and the gateway that asks them."""

    def __init__(self) -> None:
        hub = MemoryHub()
        self.bus = MemoryBus(hub, cluster="test", name="gateway")
        self.nodes = MemoryBus(hub, cluster="test", name="nodes")
        self.replica = Replica(self.bus, SystemClock())
        self.placed: list[str] = []
        self.asker = Asker(self.bus, self.replica, SystemClock(), load_wait_s=0.2, place=self._place)
        self.asked: list[str] = []
        self.was_asked = asyncio.Event()
        self.cancelled: list[str] = []
        self.assigned = {f"i{number}": assignment(f"i{number}", node_id=f"n{number}") for number in (1, 2)}

    async def _place(self, model_id: str) -> None:
        self.placed.append(model_id)
        raise not_placed(model_id)

    async def serve(self, instance_id: str, answer: Answer) -> None:
        """A runner that answers so, ready by its node's beat."""
        runner_id = self.assigned[instance_id].runner_id

        async def embed(_: Call[Embed]) -> Embedded:
            self.asked.append(instance_id)
            self.was_asked.set()
            return await answer()

        async def cancel(call: Call[Cancel]) -> Cancelled:
            self.cancelled.append(call.message.request_id)
            return Cancelled(request_id=call.message.request_id, was_running=True)

        await self.nodes.serve("runner", {RUNNER_EMBED: embed, RUNNER_CANCEL: cancel}, runner=runner_id)
        await self.beat(instance_id)

    async def beat(self, instance_id: str, phase: Any = "ready", **fields: Any) -> None:
        found = self.assigned[instance_id]
        told = status(found, phase, instance_id=instance_id, **fields)
        await self.nodes.publish(NODE_BEAT, beat(found.node_id, runners=(told,)), node=found.node_id)
        assert await self.replica.wait_until(lambda view: view.runners.get(found.runner_id) == told, WAIT_S)

    async def ask(self, model_id: str = "org/model", timeout_s: float = WAIT_S) -> Any:
        message = Embed(request_id="r1", model_id=model_id, inputs=(TextPrompt(text="a"),))
        question = Question(endpoint=RUNNER_EMBED, message=message, model_id=model_id, request_id="r1")
        return await self.asker.ask(question, timeout_s)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    await made.replica.start()
    made.replica.adopt(state_of(*(instance(name, assigned=found) for name, found in made.assigned.items())))
    yield made
    await made.asker.close()
    await made.replica.close()
    await made.bus.close()
    await made.nodes.close()


def refusing(error: SkulkError) -> Answer:
    async def answer() -> Embedded:
        raise error

    return answer


async def answering() -> Embedded:
    return ANSWER


async def silent() -> Embedded:
    await asyncio.get_running_loop().create_future()
    raise AssertionError


async def test_who_refuses_for_now_is_passed_over(world: World) -> None:
    await world.serve("i1", refusing(UnavailableError("overloaded", "full")))
    await world.serve("i2", answering)
    await world.beat("i2", active=1)
    assert await world.ask() == ANSWER
    assert world.asked == ["i1", "i2"]


async def test_when_all_refuse_the_last_refusal_is_told(world: World) -> None:
    await world.serve("i1", refusing(UnavailableError("overloaded", "full")))
    await world.serve("i2", refusing(UnavailableError("overloaded", "full too")))
    with pytest.raises(UnavailableError, match="full"):
        await world.ask()
    assert sorted(world.asked) == ["i1", "i2"]


async def test_a_fault_of_the_request_is_told_at_once(world: World) -> None:
    await world.serve("i1", refusing(RequestError("context_length_exceeded", "600 of 512")))
    with pytest.raises(RequestError, match="600 of 512"):
        await world.ask()
    assert world.asked == ["i1"]


async def test_a_runner_that_dies_while_it_computes_is_replaced_by_the_next(world: World) -> None:
    await world.serve("i1", silent)
    asking = asyncio.create_task(world.ask())
    async with asyncio.timeout(WAIT_S):
        await world.was_asked.wait()
    await world.serve("i2", answering)
    await world.beat("i1", "failed", since=2.0)
    assert await asking == ANSWER
    assert world.asked == ["i1", "i2"]


async def test_who_goes_away_has_the_runner_told(world: World) -> None:
    await world.serve("i1", silent)
    asking = asyncio.create_task(world.ask())
    async with asyncio.timeout(WAIT_S):
        await world.was_asked.wait()
    asking.cancel()
    await asyncio.wait({asking})
    await world.asker.close()
    assert world.cancelled == ["r1"]


async def test_time_is_up(world: World) -> None:
    await world.serve("i1", silent)
    with pytest.raises(ServiceError) as caught:
        await world.ask(timeout_s=0.1)
    assert caught.value.code == "deadline_exceeded"


async def test_what_is_not_placed_is_placed_or_the_reason_is_told(world: World) -> None:
    with pytest.raises(RequestError, match="place_instance"):
        await world.ask("org/other")
    assert world.placed == ["org/other"]


async def test_a_loading_instance_is_waited_for_and_then_named(world: World) -> None:
    await world.beat("i1", "loading")
    await world.beat("i2", "loading")
    with pytest.raises(UnavailableError) as caught:
        await world.ask()
    assert caught.value.code == "instance_not_ready"
