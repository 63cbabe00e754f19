"""A whole control plane in one event loop: real master, node and replicas on MemoryBus, a scripted machine beneath."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.replica import Replica
from skulk.clock import SystemClock
from skulk.cluster.reconcile import Wanted
from skulk.errors import SkulkError
from skulk.master.master import Master
from skulk.node.hosting import Hosting, Prepared, ProcessReport
from skulk.node.identity import NodeIdentity
from skulk.node.node import Measured, Node, NodeRoles
from skulk.node.storage import StateFile, load_state
from skulk.placement.admission import OwnFacts
from skulk.wire.beats import DiskFacts, MemoryFacts, SystemFacts
from skulk.wire.model import HeldModel
from tests.support.states import GIB, beat


class FakeProcess:
    """A runner's process that only a test ends."""

    def __init__(self, on_exit: Callable[[ProcessReport], None]) -> None:
        self.on_exit = on_exit
        self.started = asyncio.Event()
        self.stopped = asyncio.Event()

    @property
    def pid(self) -> int | None:
        return 4711

    async def run(self) -> None:
        self.started.set()
        await self.stopped.wait()

    async def stop(self) -> None:
        self.stopped.set()


class FakeMachine:
    """Memory, weights and processes of one machine."""

    def __init__(self, *, memory_bytes: int = 16 * GIB, models: tuple[str, ...] = ("org/model",)) -> None:
        self.memory_bytes = memory_bytes
        self.own_memory_bytes = memory_bytes
        self.models = models
        self.refusal: SkulkError | None = None
        self.processes: dict[str, FakeProcess] = {}

    async def prepare(self, wanted: Wanted) -> Prepared:
        del wanted
        if self.refusal is not None:
            raise self.refusal
        return Prepared(path="model.gguf")

    async def facts(self) -> OwnFacts:
        return beat(memory_bytes=self.own_memory_bytes)

    def supervise(self, wanted: Wanted, prepared: Prepared, on_exit: Callable[[ProcessReport], None]) -> FakeProcess:
        del prepared
        process = self.processes[wanted.assignment.runner_id] = FakeProcess(on_exit)
        return process

    async def measure(self, pids: dict[str, int]) -> Measured:
        return Measured(
            tags=("llama_cpp", "llama_cpp-cpu"),
            system=SystemFacts(hostname="h", os="Linux", architecture="x86_64", chip="c", physical_cores=2),
            memory=MemoryFacts(
                total_bytes=self.memory_bytes, available_bytes=self.memory_bytes, usable_bytes=self.memory_bytes
            ),
            disk=DiskFacts(total_bytes=GIB, available_bytes=GIB),
            load=0.0,
            models=tuple(HeldModel(model_id=name, size_bytes=1) for name in self.models),
            warnings=(),
            runner_bytes=dict.fromkeys(pids, 0),
        )


class FakeNode:
    """One node: its roles, and the machine beneath them."""

    def __init__(self, bus: MemoryBus, home: Path, node_id: str, machine: FakeMachine) -> None:
        clock = SystemClock()
        self.bus = bus
        self.machine = machine
        self.replica = Replica(bus, clock, load_state(home, bus.cluster))
        self.hosting = Hosting(bus, clock, node_id, machine)
        self.master = Master(bus, self.replica, clock, node_id=node_id, incarnation="0001", patience_s=0.0)
        self.node = Node(
            bus,
            self.replica,
            clock,
            NodeIdentity(node_id=node_id, incarnation="0001", name=f"host-{node_id}"),
            meter=machine,
            hosting=self.hosting,
            state_file=StateFile(home),
            authority=lambda: self.master.state,
            roles=lambda: NodeRoles(version="0.1.0", role="full"),
        )

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for role in (self.replica, self.node, self.master):
                tasks.create_task(role.run(), name=type(role).__name__)


@asynccontextmanager
async def running_node(
    home: Path, *, hub: MemoryHub | None = None, node_id: str = "aaaa", machine: FakeMachine | None = None
) -> AsyncGenerator[FakeNode]:
    """A node that leads, and has heard its own first beat."""
    bus = MemoryBus(hub or MemoryHub(), cluster="test", name=node_id)
    node = FakeNode(bus, home, node_id, machine or FakeMachine())
    await node.replica.start()
    task = asyncio.create_task(node.run(), name="fake-node")
    try:
        assert await node.replica.wait_until(lambda view: view.master is not None and node_id in view.nodes, 5.0)
        yield node
    finally:
        task.cancel()
        await asyncio.wait({task})
        await node.replica.close()
        await bus.close()
