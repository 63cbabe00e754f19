"""One node of a simulation: the real roles over a `MemoryBus`, on a machine and a disk that a test governs."""

from __future__ import annotations

import asyncio
import contextvars
import math
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path

import msgspec

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.replica import Replica
from skulk.cluster.liveness import RUNNER_SILENT_S, RUNNER_STATUS_S
from skulk.cluster.reconcile import Wanted
from skulk.cluster.view import ClusterView
from skulk.errors import ServiceError, StartError, UnavailableError, first_of
from skulk.master.master import Master
from skulk.master.upkeep import Rules, decision_on
from skulk.node.hosting import Hosting, Prepared, ProcessReport
from skulk.node.identity import NodeIdentity
from skulk.node.node import Measured, Node, NodeRoles
from skulk.node.storage import StateFile
from skulk.wire.base import PROTOCOL, ErrorBody
from skulk.wire.beats import DiskFacts, MemoryFacts, SystemFacts
from skulk.wire.model import HeldModel
from skulk.wire.state import ClusterState, Instance
from tests.support.simulated_versions import VERSION, ForeignBus, Version, opened, packed
from tests.support.states import GIB
from tests.support.virtual_time import OWNER, VirtualClock, VirtualLoop

MODELS = tuple(f"org/model{number}" for number in range(4))
TAGS = ("llama_cpp", "llama_cpp-cpu")
TOLERANCE = 1.1


class Disk:
    """What outlives a node's process: the bytes of its last states, the newest last."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    def load(self) -> ClusterState | None:
        return opened(self.bodies[-1]) if self.bodies else None


class DiskFile(StateFile):
    """Writes to a `Disk` at once: a thread has no place in virtual time. ``is_cut``: the process is gone."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(Path())
        self._disk = disk
        self.is_cut = False

    async def flush(self) -> bool:
        if self._newest is not None and not self.is_cut:
            self._disk.bodies.append(packed(self._newest))
        return True


class Process:
    """A runner's process: takes half of its memory at once, the rest when it is loaded, and frees it when it ends.

    It speaks when it is ready, and every second where its machine has it so, until it hangs (`hangs_since`). One that
    is killed or crashes is started again, as the supervisor does.
    """

    def __init__(
        self,
        machine: Machine,
        wanted: Wanted,
        on_ready: Callable[[Wanted], None],
        on_exit: Callable[[ProcessReport], None],
    ) -> None:
        self._machine = machine
        self._wanted = wanted
        self._on_ready = on_ready
        self._on_exit = on_exit
        self._stopped = asyncio.Event()
        self._died = asyncio.Event()
        self._why = ""
        self._restarts = 0
        self.runner_id = wanted.assignment.runner_id
        self.hangs_since: float | None = None

    @property
    def pid(self) -> int | None:
        return 4711

    async def run(self) -> None:
        while not self._stopped.is_set():
            self._died.clear()
            self.hangs_since = None
            await self._live()
            if self._died.is_set() and not self._stopped.is_set():
                self._restarts += 1
                error = ErrorBody.of(ServiceError("runner_failed", self._why))
                self._on_exit(ProcessReport(error=error, restarts=self._restarts, is_final=False))
                await asyncio.sleep(self._machine.dice.uniform(0.5, 2.0))

    async def _live(self) -> None:
        try:
            self._machine.take(self.runner_id, self._wanted.assignment.memory.need_bytes // 2)
            await asyncio.sleep(self._machine.dice.uniform(0.1, 2.0))
            self._machine.take(self.runner_id, self._wanted.assignment.memory.need_bytes)
            self._machine.serving_now[self.runner_id] = self
            async with self._machine.serving(self._wanted):
                await self._serve()
        finally:
            self._machine.used.pop(self.runner_id, None)
            self._machine.serving_now.pop(self.runner_id, None)

    async def _serve(self) -> None:
        ends = [asyncio.ensure_future(event.wait()) for event in (self._stopped, self._died)]
        try:
            while not self._stopped.is_set() and not self._died.is_set():
                if self.hangs_since is None:
                    self._on_ready(self._wanted)
                pause_s = RUNNER_STATUS_S if self._machine.speaks else None
                await asyncio.wait(ends, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()

    async def stop(self) -> None:
        if not self._machine.is_off:
            await asyncio.sleep(self._machine.dice.uniform(0.0, 1.5))
        self._stopped.set()

    def kill(self, reason: str) -> None:
        assert self.hangs_since is not None, f"{self.runner_id} doesn't hang: {reason}"
        self.die(reason)

    def die(self, why: str) -> None:
        """Ends it at once, as by a signal."""
        self._why = why
        self._died.set()


class Machine:
    """Memory, weights and processes. ``refuses``: downloads fail here; ``is_off``: it has no power any more.

    ``speaks``: its runners say every second that they live; ``serving_now``: those that are loaded, by runner id.
    """

    def __init__(self, memory_bytes: int, dice: random.Random) -> None:
        self.memory_bytes = memory_bytes
        self.dice = dice
        self.used: dict[str, int] = {}
        self.refuses = False
        self.is_off = False
        self.speaks = False
        self.serving_now: dict[str, Process] = {}
        self.beyond: str = ""
        self.quarantined: dict[str, str] = {}
        self.on_ready: Callable[[Wanted], None] = lambda wanted: None
        self.serving: Callable[[Wanted], AbstractAsyncContextManager[object]] = nullcontext

    def take(self, runner_id: str, size: int) -> None:
        self.used[runner_id] = size
        if sum(self.used.values()) > self.memory_bytes * TOLERANCE:
            self.beyond = f"{self.used} is more than {self.memory_bytes}"

    async def prepare(self, wanted: Wanted) -> Prepared:
        await asyncio.sleep(self.dice.uniform(0.0, 0.3))
        if self.refuses:
            raise UnavailableError("refused_by_node", f"the download of {wanted.instance.model_id} failed")
        return Prepared(path="model.gguf")

    def quarantine(self, backend: str, reason: str) -> None:
        self.quarantined[backend] = reason

    def has_weights(self, wanted: Wanted) -> bool:
        del wanted
        return True

    async def fetch(self, wanted: Wanted) -> None:
        raise AssertionError(f"{wanted.instance.model_id} lies here")

    async def facts(self, pids: dict[str, int]) -> Measured:
        return await self.measure(pids)

    def supervise(self, wanted: Wanted, prepared: Prepared, on_exit: Callable[[ProcessReport], None]) -> Process:
        del prepared
        return Process(self, wanted, self.on_ready, on_exit)

    async def measure(self, pids: dict[str, int]) -> Measured:
        usable = max(0, self.memory_bytes - sum(self.used.values()))
        return Measured(
            tags=TAGS,
            system=SystemFacts(hostname="h", os="Linux", architecture="x86_64", chip="c", physical_cores=2),
            memory=MemoryFacts(total_bytes=self.memory_bytes, available_bytes=usable, usable_bytes=usable),
            disk=DiskFacts(total_bytes=GIB, available_bytes=GIB),
            load=0.0,
            models=tuple(HeldModel(model_id=name, size_bytes=1) for name in MODELS),
            warnings=(),
            runner_bytes={name: self.used.get(name, 0) for name in pids},
        )


class Life:
    """One start of a node, until it is killed."""

    def __init__(
        self,
        hub: MemoryHub,
        name: str,
        node_id: str,
        clock: VirtualClock,
        machine: Machine,
        disk: Disk,
        closed: Callable[[], Mapping[str, float]] = dict,
        version: Version = "",
    ) -> None:
        self.name = name
        self.version = version
        self._closed = closed
        self.born_at = asyncio.get_running_loop().time()
        self.node_id = node_id
        self.machine = machine
        self.file = DiskFile(disk)
        self.incarnation = hub.new_id()[:8]
        self.protocol = PROTOCOL
        self.failure: BaseException | None = None
        self._ending: asyncio.Task[None] | None = None
        self.context = contextvars.copy_context()
        self.context.run(OWNER.set, name)
        self.context.run(VERSION.set, version)
        self.context.run(self._build, hub, clock, disk)
        self._tasks: list[asyncio.Task[None]] = []

    def _build(self, hub: MemoryHub, clock: VirtualClock, disk: Disk) -> None:
        kind = ForeignBus if self.version == "foreign" else MemoryBus
        self.bus = kind(hub, cluster="test", name=self.name, clock=clock)
        self.replica = Replica(self.bus, clock, disk.load(), keeps=True, closed=self._closed)
        silent_s = RUNNER_SILENT_S if self.machine.speaks else math.inf
        self.hosting = Hosting(self.bus, clock, self.node_id, self.machine, silent_s=silent_s)
        self.machine.on_ready = self._runner_ready
        self.master = Master(
            self.bus, self.replica, clock, node_id=self.node_id, incarnation=self.incarnation, patience_s=1.5
        )
        self.node = Node(
            self.bus,
            self.replica,
            clock,
            NodeIdentity(node_id=self.node_id, incarnation=self.incarnation, name=f"host-{self.node_id}"),
            meter=self.machine,
            hosting=self.hosting,
            state_file=self.file,
            authority=lambda: self.master.state,
            roles=lambda: NodeRoles(version="0.2.0" if self.version else "0.1.0", role="full"),
        )

    def _runner_ready(self, wanted: Wanted) -> None:
        for status in self.hosting.statuses():
            if status.runner_id == wanted.assignment.runner_id:
                self.hosting.heard(msgspec.structs.replace(status, phase="ready", error=None))

    @property
    def is_leading(self) -> bool:
        return self.master.state is not None and not self.machine.is_off

    @property
    def state(self) -> ClusterState:
        return self.master.state or self.replica.view.state

    def fits(self, view: ClusterView, instance: Instance, refused: set[tuple[str, str]]) -> bool:
        """Whether an instance fits where the master may try it; ``refused``: by whom, in nodes' own words."""
        leader = self.master._leader
        assert leader is not None
        name, upkeep = instance.instance_id, leader._upkeep
        barred = {node: found for node, found in upkeep.barred.get(name, {}).items() if (name, node) in refused}
        upkeep = msgspec.structs.replace(upkeep, barred={name: barred})
        return decision_on(upkeep, view, instance, self.bus.clock.now(), Rules()).outcome == "placed"

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_task(self.replica.start(), context=self.context)
        for role in (self.replica, self.node, self.master):
            task = loop.create_task(
                self._guarded(role.run()), name=f"{self.name}-{type(role).__name__}", context=self.context
            )
            self._tasks.append(task)

    async def _guarded(self, role: object) -> None:
        try:
            await role  # type: ignore[misc]
        except Exception as error:  # noqa: BLE001 - told by `failure`
            self.failure = self.failure or error
            self._ending = asyncio.get_running_loop().create_task(self.kill())

    @property
    def refusal(self) -> StartError | None:
        """Why the node ended by itself, in an orderly way."""
        found = None if self.failure is None else first_of(self.failure)
        return found if isinstance(found, StartError) else None

    async def kill(self) -> None:
        """As by SIGKILL: nothing more is said or written, and its processes end with it."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.file.is_cut = True
        self.machine.is_off = True
        self.bus.memory.hub.forget(self.bus.memory)
        self.bus.memory.break_off("closed")
        ending = [task for task in self._tasks if not task.done()]
        for task in ending:
            task.cancel()
        loop.thaw(self.name)
        await asyncio.gather(*ending, return_exceptions=True)
