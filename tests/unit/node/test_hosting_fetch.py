"""Runners whose weights must come first: the placement is answered at once, the memory is promised meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.subjects import RUNNER_STATUS
from skulk.cluster.reconcile import wanted_of
from skulk.errors import RequestError
from skulk.node.hosting import Hosting
from skulk.wire.beats import RunnerPhase, RunnerStatus
from tests.support.control_plane import FakeMachine
from tests.support.states import assignment, instance, state_of

FIRST, SECOND = assignment(), assignment("i2")
ONE = state_of(instance(assigned=FIRST))
TWO = state_of(instance(assigned=FIRST), instance("i2", assigned=SECOND))


class Node:
    def __init__(self, bus: MemoryBus, machine: FakeMachine) -> None:
        self.machine = machine
        self.hosting = Hosting(bus, bus.clock, "aaaa", machine)
        self.told: list[RunnerStatus] = []
        self.came = asyncio.Event()

    def hear(self, told: RunnerStatus) -> None:
        self.told.append(told)
        self.came.set()

    async def until(self, phase: RunnerPhase, runner: str = FIRST.runner_id) -> RunnerStatus:
        async with asyncio.timeout(5.0):
            while not (found := [one for one in self.told if (one.runner_id, one.phase) == (runner, phase)]):
                self.came.clear()
                await self.came.wait()
        return found[-1]


@asynccontextmanager
async def node_of(machine: FakeMachine) -> AsyncGenerator[Node]:
    bus = MemoryBus(MemoryHub(), cluster="test", name="aaaa")
    found = Node(bus, machine)
    await bus.subscribe(RUNNER_STATUS, lambda received: found.hear(received.message))
    task = asyncio.create_task(found.hosting.run(), name="hosting")
    try:
        yield found
    finally:
        task.cancel()
        await asyncio.wait({task})
        await bus.close()


async def test_it_is_accepted_before_the_weights_are_here_and_runs_after() -> None:
    async with node_of(FakeMachine(models=())) as node:
        node.hosting.want(wanted_of(ONE, "aaaa"))
        await node.until("accepted")
        await node.machine.fetching.wait()
        assert node.machine.processes == {}
        node.machine.fetched.set()
        async with asyncio.timeout(5.0):
            await node.machine.supervised.wait()
            await node.machine.processes[FIRST.runner_id].started.wait()


async def test_memory_is_promised_while_the_weights_come() -> None:
    room_for_one = FakeMachine(models=(), memory_bytes=FIRST.memory.need_bytes + 1_000_000)
    async with node_of(room_for_one) as node:
        node.hosting.want(wanted_of(ONE, "aaaa"))
        await node.until("accepted")
        node.hosting.want(wanted_of(TWO, "aaaa"))
        refused = await node.until("refused", SECOND.runner_id)
        assert refused.error is not None and "promised to other instances" in refused.error.detail


async def test_what_does_not_fit_is_refused_before_anything_is_fetched() -> None:
    async with node_of(FakeMachine(models=(), memory_bytes=1000)) as node:
        node.hosting.want(wanted_of(ONE, "aaaa"))
        refused = await node.until("refused")
        assert refused.error is not None and refused.error.code == "refused_by_node"
        assert not node.machine.fetching.is_set()


async def test_a_download_that_fails_is_a_refusal_with_its_reason() -> None:
    machine = FakeMachine(models=())
    machine.fetch_failure = RequestError("model_gated", "org/model is gated: ask for access.")
    machine.fetched.set()
    async with node_of(machine) as node:
        node.hosting.want(wanted_of(ONE, "aaaa"))
        refused = await node.until("refused")
        assert refused.error is not None and refused.error.code == "model_gated"
        assert machine.processes == {}


async def test_an_instance_deleted_meanwhile_ends_the_wait() -> None:
    async with node_of(FakeMachine(models=())) as node:
        node.hosting.want(wanted_of(ONE, "aaaa"))
        await node.machine.fetching.wait()
        node.hosting.want({})
        await node.until("stopped")
        assert node.hosting.statuses() == ()
