"""The runners of one node: each wanted one is admitted, started, watched and stopped here.

    wanted ──> prepare (weights, hash) ──> admit (memory) ──> accepted ──> process, restarted by policy ──> stopped
      │               │    ^                   │                               │
      │               │    └── fetched <───────│───┐                           └──> failed, with its reason
      │               └────────> refused <─────┘   │           (backend_faulty: refused, and the backend quarantined)
      └── no weights here: admit, accepted ──> fetch them

A refused runner stays listed, so that the master reads the refusal; it goes when the state no longer wants it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, Protocol

import msgspec

from skulk.bus.port import Bus
from skulk.bus.subjects import RUNNER_STATUS
from skulk.clock import Clock
from skulk.cluster.liveness import RUNNER_SILENT_S, RUNNER_STATUS_S
from skulk.cluster.reconcile import Wanted, difference
from skulk.errors import ServiceError, SkulkError, UnavailableError
from skulk.placement.admission import OwnFacts, admit
from skulk.placement.rooms import is_on_cpu, reserved_bytes
from skulk.wire.base import ErrorBody
from skulk.wire.beats import MeasuredSpeed, RunnerPhase, RunnerStatus

log = logging.getLogger("skulk.node")

UNSENT_STATUSES: Final = 1_000
_OF_NODES: Final = ("accepted", "refused")
"""What a node says of a runner, and no runner of itself."""


class ProcessReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a runner's supervisor says: it ended, and whether it is started again."""

    error: ErrorBody
    restarts: int
    is_final: bool


class RunnerProcess(Protocol):
    """A runner's process under supervision."""

    @property
    def pid(self) -> int | None: ...

    async def run(self) -> None:
        """Keeps it running until it is stopped or the supervisor gives up."""
        ...

    async def stop(self) -> None:
        """Drains and ends it; returns when it is gone."""
        ...

    def kill(self, reason: str) -> None:
        """Ends the process that serves now, at once; it is started again as after a crash."""
        ...


class Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """What a runner needs from this node's disk. ``weights``: the digest of the first file; empty: unknown."""

    path: str
    weights: str = ""


class MeasuredFacts(OwnFacts, Protocol):
    """A node's facts, and the memory of each runner's process measured together with them, in bytes by runner id."""

    @property
    def runner_bytes(self) -> Mapping[str, int]: ...


class Host(Protocol):
    """What hosting needs from the outside. What may fail raises `SkulkError` or `OSError`."""

    async def prepare(self, wanted: Wanted) -> Prepared:
        """Finds and verifies the weights; a `SkulkError` is the reason of the refusal."""
        ...

    def has_weights(self, wanted: Wanted) -> bool:
        """Whether the model's files lie here; else `fetch` comes before `prepare`."""
        ...

    async def fetch(self, wanted: Wanted) -> None:
        """Brings the files here, however long that takes; a `SkulkError` is the reason of the refusal."""
        ...

    async def facts(self, pids: dict[str, int]) -> MeasuredFacts:
        """This node's tags and memory, measured now; ``pids``: the runners' processes by runner id."""
        ...

    def supervise(self, wanted: Wanted, prepared: Prepared, on_exit: Callable[[ProcessReport], None]) -> RunnerProcess:
        """A supervised process that isn't running yet."""
        ...

    def quarantine(self, backend: str, reason: str) -> None:
        """This node doesn't offer the backend from now on."""
        ...


class _Runner:
    """One runner that is, or was to be, here.

    Attributes:
        is_over: it isn't started any more.
        heard_at: when its present process last spoke; None: it hasn't yet.
    """

    def __init__(self, wanted: Wanted, status: RunnerStatus) -> None:
        self.wanted = wanted
        self.status = status
        self.process: RunnerProcess | None = None
        self.task: asyncio.Task[None] | None = None
        self.is_stopping = False
        self.is_over = False
        self.heard_at: float | None = None


class Hosting:
    """Keeps the runners of one node as the state wants them. Single event loop, no locks.

    Args:
        node_id: this node.
        host: weights, memory and processes of this machine.
        silent_s: a runner that said something and then nothing for so long is killed.
    """

    def __init__(self, bus: Bus, clock: Clock, node_id: str, host: Host, *, silent_s: float = RUNNER_SILENT_S) -> None:
        self._silent_s = silent_s
        self._bus = bus
        self._clock = clock
        self._node_id = node_id
        self._host = host
        self._runners: dict[str, _Runner] = {}
        self._unsent: asyncio.Queue[RunnerStatus] = asyncio.Queue(UNSENT_STATUSES)
        self._wanted: dict[str, Wanted] = {}
        self._changed = asyncio.Event()

    def statuses(self) -> tuple[RunnerStatus, ...]:
        """The status of every runner that is here, by id."""
        return tuple(self._runners[name].status for name in sorted(self._runners))

    def speeds(self) -> tuple[MeasuredSpeed, ...]:
        """What the runners that are ready were measured to do."""
        return tuple(
            MeasuredSpeed(
                backend=runner.wanted.assignment.backend,
                weights_bytes=runner.wanted.instance.request.card.weights_bytes,
                decode_tps=runner.status.decode_tps,
            )
            for runner in self._runners.values()
            if runner.status.phase == "ready" and runner.status.decode_tps > 0.0
        )

    def pids(self) -> dict[str, int]:
        """The process ids of the runners that have a process now."""
        found = ((name, runner.process) for name, runner in self._runners.items())
        return {name: process.pid for name, process in found if process is not None and process.pid is not None}

    def want(self, wanted: dict[str, Wanted]) -> None:
        """Says what should run from now on."""
        self._wanted = wanted
        self._changed.set()

    def heard(self, status: RunnerStatus) -> None:
        """A runner's own word about itself; what others say about runners that aren't here is ignored.

        Two masters that didn't hear each other may have placed one instance, in one epoch, on two nodes: the other
        node's runner has the same name. And a node with a copy of this one's home goes by its id: what it accepts or
        refuses, which no runner says of itself, is not this one's memory.

        Its words come in their order, so only those of an earlier process are stale. ``since`` can't tell: a clock
        that was set back would freeze the status.
        """
        runner = self._runners.get(status.runner_id)
        if runner is None or runner.process is None or runner.is_stopping or runner.is_over:
            return
        if status.node_id != self._node_id or status.phase in _OF_NODES:
            return
        if status.restarts == runner.status.restarts:
            runner.heard_at = self._clock.now()
            runner.status = msgspec.structs.replace(status, since=max(status.since, runner.status.since))

    async def run(self) -> None:
        """Starts and stops runners until cancelled; then stops all of them."""
        async with asyncio.TaskGroup() as tasks:
            publisher = tasks.create_task(self._publish(), name="runner-statuses")
            watch = tasks.create_task(self._watch(), name="runner-watch")
            try:
                while True:
                    self._reconcile(tasks)
                    await self._changed.wait()
                    self._changed.clear()
            finally:
                watch.cancel()
                await self._stop_all()
                publisher.cancel()

    def _reconcile(self, tasks: asyncio.TaskGroup) -> None:
        found = difference(self._wanted, frozenset(self._runners))
        for wanted in found.start:
            runner_id = wanted.assignment.runner_id
            runner = _Runner(wanted, self._status(wanted, "starting"))
            self._runners[runner_id] = runner
            runner.task = tasks.create_task(self._keep(runner), name=f"runner-{runner_id}")
        for runner_id in found.stop:
            runner = self._runners[runner_id]
            if not runner.is_stopping:
                runner.is_stopping = True
                tasks.create_task(self._stop(runner), name=f"stop-{runner_id}")

    async def _keep(self, runner: _Runner) -> None:
        """The life of one runner, from its admission until it is stopped."""
        try:
            await self._live(runner)
        except Exception as error:  # the border: a defect around one runner doesn't take the node with it
            log.exception("runner %s failed", runner.status.runner_id)
            runner.is_over = True
            detail = f"it could not be kept running ({error}); the node's log has more"
            self._tell(runner, "failed", lost_process(detail))

    async def _live(self, runner: _Runner) -> None:
        try:
            if not self._host.has_weights(runner.wanted):
                await self._fetched(runner)
            prepared = await self._admitted(runner)
        except SkulkError as error:
            self._tell(runner, "refused", ErrorBody.of(error))
            return
        # no await since the memory was counted: two runners can't be admitted on the same room
        self._tell(runner, "accepted")
        process = self._host.supervise(runner.wanted, prepared, lambda report: self._exited(runner, report))
        runner.process = process
        await process.run()

    async def _fetched(self, runner: _Runner) -> None:
        """Brings the weights here. The memory is promised meanwhile: whoever placed the model has its answer."""
        await self._admit(runner)
        self._tell(runner, "accepted")
        await self._host.fetch(runner.wanted)

    async def _admitted(self, runner: _Runner) -> Prepared:
        """What the runner starts with; a `SkulkError` is the reason why it doesn't."""
        try:
            prepared = await self._host.prepare(runner.wanted)
        except OSError as error:
            text = f"{error}; mend that on this node, or place the model on another one"
            raise UnavailableError("refused_by_node", text) from error
        await self._admit(runner)
        return prepared

    async def _admit(self, runner: _Runner) -> None:
        """Counts the memory once more; raises the refusal."""
        try:
            facts = await self._host.facts(self.pids())
        except OSError as error:
            text = f"{error}; mend that on this node, or place the model on another one"
            raise UnavailableError("refused_by_node", text) from error
        refusal = admit(
            facts,
            runner.wanted.assignment,
            self._reserved_besides(runner, facts),
            is_forced=runner.wanted.instance.request.force,
        )
        if refusal is not None:
            raise refusal

    def _reserved_besides(self, runner: _Runner, facts: MeasuredFacts) -> int:
        """What is promised to others of the pool of memory that a runner is to take."""
        others = [found for found in self._runners.values() if found is not runner and found.status.phase != "refused"]
        admitted = [found for found in others if found.process is not None or found.status.phase == "accepted"]
        if facts.memory.cpu_usable_bytes is not None:
            on_cpu = is_on_cpu(runner.wanted.assignment.backend)
            admitted = [found for found in admitted if is_on_cpu(found.wanted.assignment.backend) is on_cpu]
        return reserved_bytes(
            [found.status for found in admitted],
            {found.status.runner_id: found.wanted.assignment.memory.need_bytes for found in admitted},
            facts.runner_bytes,
        )

    def measured(self, memory_bytes: dict[str, int]) -> None:
        """Takes in what each runner's process was measured to hold, in bytes, by runner id."""
        for name, size in memory_bytes.items():
            if (runner := self._runners.get(name)) is not None:
                runner.status = msgspec.structs.replace(runner.status, memory_bytes=size)

    async def _watch(self) -> None:
        """Kills what has fallen silent: a process that hangs as a whole can't say so."""
        looked_at = self._clock.now()
        while True:
            await asyncio.sleep(RUNNER_STATUS_S)
            now = self._clock.now()
            # silence counts while this process runs on time and hears the bus
            is_deaf = now - looked_at > 2 * RUNNER_STATUS_S or self._bus.state != "connected"
            looked_at = now
            for runner in self._runners.values():
                if runner.heard_at is None or runner.is_stopping or runner.is_over:
                    continue
                if is_deaf:
                    runner.heard_at = now
                elif now - runner.heard_at > self._silent_s:
                    self._hangs(runner, now - runner.heard_at)

    def _hangs(self, runner: _Runner, silent_s: float) -> None:
        runner.heard_at = None
        if runner.process is None or runner.process.pid is None:
            return
        detail = f"its process has said nothing for {silent_s:.0f} s: it hangs and is started anew"
        log.error("runner %s: %s", runner.status.runner_id, detail)
        self._tell(runner, "failed", lost_process(detail))
        runner.process.kill(detail)

    def _exited(self, runner: _Runner, report: ProcessReport) -> None:
        if runner.is_stopping:
            return
        log.warning("runner %s: %s", runner.status.runner_id, report.error.detail)
        kept = runner.status
        runner.status = msgspec.structs.replace(kept, restarts=report.restarts)
        runner.is_over = report.is_final
        runner.heard_at = None
        # its own word, where it had one, says more than its exit status
        own = kept.error if kept.phase == "failed" and not report.is_final else None
        if report.is_final and report.error.code == "backend_faulty":
            self._host.quarantine(runner.wanted.assignment.backend, report.error.detail)
            self._tell(runner, "refused", report.error)
            return
        self._tell(runner, "failed", own or report.error)

    async def _stop(self, runner: _Runner) -> None:
        self._tell(runner, "draining")
        if runner.process is not None:
            try:
                await runner.process.stop()
            except Exception:  # the border: the cancelled task below kills what would not stop
                log.exception("runner %s can't be stopped in order", runner.status.runner_id)
        if runner.task is not None:
            runner.task.cancel()
            await asyncio.wait({runner.task})
        self._runners.pop(runner.status.runner_id, None)
        self._tell(runner, "stopped")
        self._changed.set()

    async def _stop_all(self) -> None:
        async def stop(runner: _Runner) -> None:
            runner.is_stopping = True
            await self._stop(runner)

        await _all(*(stop(runner) for runner in tuple(self._runners.values()) if not runner.is_stopping))
        while not self._unsent.empty() and self._bus.state == "connected":
            await self._send(self._unsent.get_nowait())

    def _status(self, wanted: Wanted, phase: RunnerPhase) -> RunnerStatus:
        assignment = wanted.assignment
        return RunnerStatus(
            runner_id=assignment.runner_id,
            instance_id=wanted.instance.instance_id,
            epoch=assignment.epoch,
            node_id=self._node_id,
            model_id=wanted.instance.model_id,
            phase=phase,
            reserved_bytes=assignment.memory.need_bytes,
            expected_bytes=assignment.memory.expected_bytes,
            since=self._clock.wall(),
        )

    def _tell(self, runner: _Runner, phase: RunnerPhase, error: ErrorBody | None = None) -> None:
        """Sets a runner's phase and tells everybody at once."""
        kept = runner.status
        status = msgspec.structs.replace(
            self._status(runner.wanted, phase),
            error=error,
            restarts=kept.restarts,
            memory_bytes=kept.memory_bytes if phase == "draining" else 0,
            since=max(self._clock.wall(), kept.since),
        )
        runner.status = status
        try:
            self._unsent.put_nowait(status)
        except asyncio.QueueFull:
            log.warning("a status of %s waits for the next beat: the bus takes none", status.runner_id)

    async def _publish(self) -> None:
        while True:
            await self._send(await self._unsent.get())

    async def _send(self, status: RunnerStatus) -> None:
        try:
            await self._bus.publish(RUNNER_STATUS, status, runner=status.runner_id)
        except SkulkError as error:
            # the next beat carries it
            log.info("the status of %s was not published: %s", status.runner_id, error)


async def _all(*waits: Awaitable[None]) -> None:
    """Awaits all, and raises the first failure after the last has ended."""
    results = await asyncio.gather(*waits, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


def lost_process(detail: str) -> ErrorBody:
    """The error of streams whose runner's process ended."""
    return ErrorBody.of(ServiceError("runner_failed", detail))
