"""A whole control plane in one event loop: real master, node and replicas on MemoryBus, a scripted machine beneath."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.replica import Replica
from skulk.cluster.reconcile import Wanted
from skulk.master.master import Master
from skulk.node.hosting import Hosting, Prepared, ProcessReport
from skulk.node.identity import NodeIdentity
from skulk.node.node import Measured, Node, NodeRoles
from skulk.node.storage import StateFile, load_state
from skulk.wire.beats import DiskFacts, MemoryFacts, SystemFacts
from skulk.wire.model import HeldModel
from skulk.wire.state import ClusterState
from tests.support.states import GIB


class FrozenBus(MemoryBus):
    """A bus whose server can stop answering at a moment, without the connection's end."""

    frozen_at: float | None = None

    @property
    def heard_at(self) -> float:
        return super().heard_at if self.frozen_at is None else self.frozen_at


class FakeProcess:
    """A runner's process that only a test ends. ``defect``: what `run`, ``stop_defect``: what `stop` raises."""

    def __init__(self, on_exit: Callable[[ProcessReport], None], defect: Exception | None = None) -> None:
        self.on_exit = on_exit
        self.started = asyncio.Event()
        self.stopped = asyncio.Event()
        self.defect = defect
        self.stop_defect: Exception | None = None
        self.killed = ""

    @property
    def pid(self) -> int | None:
        return 4711

    async def run(self) -> None:
        self.started.set()
        if self.defect is not None:
            raise self.defect
        await self.stopped.wait()

    async def stop(self) -> None:
        if self.stop_defect is not None:
            raise self.stop_defect
        self.stopped.set()

    def kill(self, reason: str) -> None:
        self.killed = reason


class FakeMachine:
    """Memory, weights and processes of one machine.

    Attributes:
        refusal: what `prepare` raises.
        defect: what the next process's `run` raises.
        prepared: cleared by a test, it holds every `prepare` back.
        runner_bytes: measured memory of runners, by id.
        measure_failure: what `measure` raises.
        measurable: cleared by a test, it holds every `measure` back.
        quarantined: backends with their reasons.
        fetched: set by a test, it lets every `fetch` of missing weights end, with ``fetch_failure`` where that is set.
    """

    def __init__(self, *, memory_bytes: int = 16 * GIB, models: tuple[str, ...] = ("org/model",)) -> None:
        self.memory_bytes = memory_bytes
        self.own_memory_bytes = memory_bytes
        self.models = models
        self.refusal: Exception | None = None
        self.defect: Exception | None = None
        self.prepared = asyncio.Event()
        self.prepared.set()
        self.preparing = asyncio.Event()
        self.runner_bytes: dict[str, int] = {}
        self.measure_failure: OSError | None = None
        self.measurable = asyncio.Event()
        self.measurable.set()
        self.processes: dict[str, FakeProcess] = {}
        self.supervised = asyncio.Event()
        self.fetching = asyncio.Event()
        self.fetched = asyncio.Event()
        self.fetch_failure: Exception | None = None
        self.quarantined: dict[str, str] = {}

    async def prepare(self, wanted: Wanted) -> Prepared:
        del wanted
        self.preparing.set()
        await self.prepared.wait()
        if self.refusal is not None:
            raise self.refusal
        return Prepared(path="model.gguf")

    def quarantine(self, backend: str, reason: str) -> None:
        self.quarantined[backend] = reason

    def has_weights(self, wanted: Wanted) -> bool:
        return wanted.instance.model_id in self.models

    async def fetch(self, wanted: Wanted) -> None:
        self.fetching.set()
        await self.fetched.wait()
        if self.fetch_failure is not None:
            raise self.fetch_failure
        self.models = (*self.models, wanted.instance.model_id)

    async def facts(self, pids: dict[str, int]) -> Measured:
        own = await self.measure(pids)
        memory = msgspec.structs.replace(own.memory, usable_bytes=self.own_memory_bytes)
        return msgspec.structs.replace(own, memory=memory)

    def supervise(self, wanted: Wanted, prepared: Prepared, on_exit: Callable[[ProcessReport], None]) -> FakeProcess:
        del prepared
        process = self.processes[wanted.assignment.runner_id] = FakeProcess(on_exit, self.defect)
        self.supervised.set()
        return process

    async def measure(self, pids: dict[str, int]) -> Measured:
        await self.measurable.wait()
        if self.measure_failure is not None:
            raise self.measure_failure
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
            runner_bytes={name: self.runner_bytes.get(name, 0) for name in pids},
        )


class FakeNode:
    """One node: its roles, and the machine beneath them."""

    def __init__(
        self,
        bus: FrozenBus,
        state_file: StateFile,
        node_id: str,
        machine: FakeMachine,
        *,
        state: ClusterState | None = None,
        patience_s: float = 0.0,
        can_lead: bool = True,
        master_heard_at: float | None = None,
        closed: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        clock = bus.clock
        self.bus = bus
        self.machine = machine
        self.replica = Replica(bus, clock, state, keeps=True, closed=closed)
        self.hosting = Hosting(bus, clock, node_id, machine)
        self.master = Master(
            bus, self.replica, clock, node_id=node_id, incarnation="0001", patience_s=patience_s, can_lead=can_lead
        )
        self.node = Node(
            bus,
            self.replica,
            clock,
            NodeIdentity(node_id=node_id, incarnation="0001", name=f"host-{node_id}"),
            meter=machine,
            hosting=self.hosting,
            state_file=state_file,
            authority=lambda: self.master.state,
            roles=lambda: NodeRoles(version="0.1.0", role="full"),
            master_heard_at=master_heard_at,
        )

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for role in (self.replica, self.node, self.master):
                tasks.create_task(role.run(), name=type(role).__name__)


@asynccontextmanager
async def running_node(
    home: Path,
    *,
    hub: MemoryHub | None = None,
    node_id: str = "aaaa",
    machine: FakeMachine | None = None,
    patience_s: float = 0.0,
    closed: Callable[[], Mapping[str, float]] = dict,
) -> AsyncGenerator[FakeNode]:
    """A node that leads, and has heard its own first beat."""
    bus = FrozenBus(hub or MemoryHub(), cluster="test", name=node_id)
    node = FakeNode(
        bus,
        StateFile(home),
        node_id,
        machine or FakeMachine(),
        state=load_state(home, bus.cluster),
        patience_s=patience_s,
        closed=closed,
    )
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
