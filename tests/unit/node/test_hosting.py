"""The runners of one node: whose word counts, what is refused, and that nothing around one of them ends the node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import msgspec
import pytest

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.subjects import RUNNER_STATUS
from skulk.cluster.reconcile import wanted_of
from skulk.errors import RequestError
from skulk.node.hosting import Hosting, ProcessReport, lost_process
from skulk.wire.base import ErrorBody
from skulk.wire.beats import RunnerPhase, RunnerStatus
from skulk.wire.state import ClusterState
from tests.support.control_plane import FakeMachine
from tests.support.states import GIB, assignment, estimate, instance, state_of, status

ASSIGNED = assignment()
RUNNER = ASSIGNED.runner_id
ONE = state_of(instance(assigned=ASSIGNED))


class Hosted:
    """Hosting over a scripted machine; `until` waits for what it tells."""

    def __init__(self, bus: MemoryBus, machine: FakeMachine, silent_s: float) -> None:
        self.bus = bus
        self.hub = bus.memory.hub
        self.machine = machine
        self.hosting = Hosting(bus, bus.clock, "aaaa", machine, silent_s=silent_s)
        self.told: list[RunnerStatus] = []
        self._came = asyncio.Event()

    def hear(self, told: RunnerStatus) -> None:
        self.told.append(told)
        self._came.set()

    def want(self, state: ClusterState) -> None:
        self.hosting.want(wanted_of(state, "aaaa"))

    async def until(self, phase: RunnerPhase, runner: str = RUNNER) -> RunnerStatus:
        async with asyncio.timeout(5.0):
            while not (found := [one for one in self.told if (one.runner_id, one.phase) == (runner, phase)]):
                self._came.clear()
                await self._came.wait()
        return found[-1]

    @property
    def now(self) -> RunnerStatus:
        return next(found for found in self.hosting.statuses() if found.runner_id == RUNNER)

    async def accepted(self) -> None:
        self.want(ONE)
        await self.until("accepted")


@asynccontextmanager
async def hosted(machine: FakeMachine | None = None, silent_s: float = 60.0) -> AsyncGenerator[Hosted]:
    bus = MemoryBus(MemoryHub(), cluster="test", name="aaaa")
    found = Hosted(bus, machine or FakeMachine(), silent_s)
    await bus.subscribe(RUNNER_STATUS, lambda received: found.hear(received.message))
    task = asyncio.create_task(found.hosting.run(), name="hosting")
    try:
        yield found
        assert not task.done(), "hosting ended by itself"
    finally:
        task.cancel()
        await asyncio.wait({task})
        await bus.close()


def word(phase: RunnerPhase, *, restarts: int = 0, since: float = 9e9) -> RunnerStatus:
    return msgspec.structs.replace(status(ASSIGNED, phase, since=since), restarts=restarts)


async def test_a_clock_that_is_set_back_freezes_no_status() -> None:
    async with hosted() as node:
        await node.accepted()
        before = node.now.since
        node.hosting.heard(word("ready", since=before - 3600.0))
        assert node.now.phase == "ready"
        assert node.now.since == before


async def test_the_late_word_of_a_dead_process_does_not_count() -> None:
    async with hosted() as node:
        await node.accepted()
        process = node.machine.processes[RUNNER]
        process.on_exit(ProcessReport(error=lost_process("killed"), restarts=1, is_final=False))
        node.hosting.heard(word("ready", restarts=0))
        assert (node.now.phase, node.now.restarts) == ("failed", 1)
        node.hosting.heard(word("loading", restarts=1))
        assert node.now.phase == "loading"
        process.on_exit(ProcessReport(error=lost_process("killed again"), restarts=1, is_final=True))
        node.hosting.heard(word("ready", restarts=1))
        assert node.now.phase == "failed"


async def test_the_word_of_another_nodes_runner_of_the_same_name_is_none_of_this_ones() -> None:
    """Two masters that didn't hear each other placed one instance on two nodes, in one epoch."""
    async with hosted() as node:
        await node.accepted()
        node.hosting.heard(word("ready"))
        node.hosting.heard(msgspec.structs.replace(word("draining", since=9.1e9), node_id="bbbb"))
        assert (node.now.phase, node.now.node_id) == ("ready", "aaaa")


@pytest.mark.parametrize("phase", ["refused", "accepted"])
async def test_what_a_node_with_a_copy_of_this_home_decides_is_not_this_ones_memory(phase: RunnerPhase) -> None:
    async with hosted() as node:
        await node.accepted()
        node.hosting.heard(word("ready"))
        node.hosting.heard(word(phase, since=9.1e9))
        assert node.now.phase == "ready", "a refused one would hold no memory"


async def test_a_runner_that_has_no_process_yet_has_no_word() -> None:
    machine = FakeMachine()
    machine.prepared.clear()
    async with hosted(machine) as node:
        node.want(ONE)
        await asyncio.wait_for(machine.preparing.wait(), 2.0)
        node.hosting.heard(word("ready", restarts=3))
        assert (node.now.phase, node.now.restarts) == ("starting", 0)
        node.hosting.heard(msgspec.structs.replace(word("ready"), runner_id="other-1"))


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (RequestError("model_file_invalid", "model.gguf is cut short"), "model_file_invalid"),
        (OSError(5, "Input/output error", "model.gguf"), "refused_by_node"),
    ],
)
async def test_weights_that_cannot_be_had_are_a_refusal(failure: Exception, code: str) -> None:
    machine = FakeMachine()
    machine.refusal = failure
    async with hosted(machine) as node:
        node.want(ONE)
        refused = await node.until("refused")
        assert refused.error is not None
        assert refused.error.code == code
        assert "model.gguf" in refused.error.detail
        assert node.hosting.pids() == {}
        machine.refusal = None
        node.want(state_of(instance("i2", assigned=assignment("i2"))))
        await node.until("accepted", "i2-1")


async def test_facts_that_cannot_be_read_are_a_refusal() -> None:
    machine = FakeMachine()
    machine.measure_failure = OSError(24, "Too many open files")
    async with hosted(machine) as node:
        node.want(ONE)
        refused = await node.until("refused")
        assert refused.error is not None
        assert "Too many open files" in refused.error.detail


async def test_a_defect_around_one_runner_fails_that_one_alone(caplog: pytest.LogCaptureFixture) -> None:
    machine = FakeMachine()
    machine.defect = ValueError("a defect")
    async with hosted(machine) as node:
        node.want(ONE)
        failed = await node.until("failed")
        assert failed.error is not None
        assert "a defect" in failed.error.detail
        machine.defect = None
        both = state_of(instance(assigned=ASSIGNED), instance("i2", assigned=assignment("i2")))
        node.want(both)
        await node.until("accepted", "i2-1")
        assert "a defect" in caplog.text


async def test_two_prepared_at_once_are_not_admitted_on_the_same_room() -> None:
    machine = FakeMachine(memory_bytes=3 * GIB)
    machine.prepared.clear()
    large = [
        instance(name, assigned=msgspec.structs.replace(assignment(name), memory=estimate(2 * GIB)))
        for name in ("i1", "i2")
    ]
    async with hosted(machine) as node:
        node.want(state_of(*large))
        await asyncio.wait_for(machine.preparing.wait(), 2.0)
        machine.prepared.set()
        accepted, refused = await node.until("accepted", "i1-1"), await node.until("refused", "i2-1")
        assert accepted.reserved_bytes == 2 * GIB
        assert refused.error is not None
        assert "promised" in refused.error.detail


async def test_what_a_runner_was_measured_to_take_is_not_counted_twice() -> None:
    """Usable memory already lacks it: what counts is the figure of the same moment, not of the beat before."""
    machine = FakeMachine(memory_bytes=3 * GIB)
    first, second = (
        instance(name, assigned=msgspec.structs.replace(assignment(name), memory=estimate(2 * GIB)))
        for name in ("i1", "i2")
    )
    async with hosted(machine) as node:
        node.want(state_of(first))
        await node.until("accepted", "i1-1")
        machine.runner_bytes = {"i1-1": 2 * GIB}
        node.want(state_of(first, second))
        await node.until("accepted", "i2-1")


async def test_a_runner_is_stopped_while_it_is_prepared() -> None:
    machine = FakeMachine()
    machine.prepared.clear()
    async with hosted(machine) as node:
        node.want(ONE)
        await asyncio.wait_for(machine.preparing.wait(), 2.0)
        node.want(state_of())
        await node.until("stopped")
        assert node.hosting.statuses() == ()
        assert machine.processes == {}


async def test_a_runner_that_cannot_be_stopped_in_order_goes_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    async with hosted() as node:
        await node.accepted()
        node.machine.processes[RUNNER].stop_defect = ValueError("stuck")
        node.want(state_of())
        await node.until("stopped")
        assert "stuck" in caplog.text


async def test_wanted_again_while_it_stops_it_is_started_anew() -> None:
    async with hosted() as node:
        await node.accepted()
        first = node.machine.processes[RUNNER]
        await asyncio.wait_for(first.started.wait(), 2.0)
        node.want(state_of())
        await node.until("draining")
        node.want(ONE)
        node.told.clear()
        await node.until("stopped")
        await node.until("accepted")
        assert node.machine.processes[RUNNER] is not first
        assert first.stopped.is_set()


async def test_the_end_of_the_node_stops_every_runner() -> None:
    machine = FakeMachine()
    async with hosted(machine) as node:
        await node.accepted()
    assert machine.processes[RUNNER].stopped.is_set()
    assert node.hosting.statuses() == ()


async def test_a_faulty_backend_is_a_refusal_and_goes_into_quarantine() -> None:
    async with hosted() as found:
        await found.accepted()
        error = ErrorBody(code="backend_faulty", detail="it scrambled")
        found.machine.processes[RUNNER].on_exit(ProcessReport(error=error, restarts=0, is_final=True))
        told = await found.until("refused")
        assert told.error == error
        assert found.machine.quarantined == {ASSIGNED.backend: "it scrambled"}


async def test_other_final_failures_quarantine_nothing() -> None:
    async with hosted() as found:
        await found.accepted()
        error = ErrorBody(code="runner_failed", detail="crashed")
        found.machine.processes[RUNNER].on_exit(ProcessReport(error=error, restarts=5, is_final=True))
        await found.until("failed")
        assert found.machine.quarantined == {}


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node looks often, so that silence is short."""
    monkeypatch.setattr("skulk.node.hosting.RUNNER_STATUS_S", 0.02)


@pytest.mark.usefixtures("hasty")
async def test_a_runner_that_falls_silent_is_killed_with_the_reason_and_comes_back() -> None:
    async with hosted(silent_s=0.1) as node:
        await node.accepted()
        process = node.machine.processes[RUNNER]
        await asyncio.sleep(0.2)
        assert process.killed == "", "it has not spoken yet: a long load is no silence"
        node.hosting.heard(word("ready"))
        told = await node.until("failed")
        assert told.error is not None and "has said nothing for" in told.error.detail
        assert process.killed == told.error.detail
        # the supervisor says how the process ended; the reason is the one that was known before
        process.on_exit(ProcessReport(error=lost_process("killed by SIGKILL"), restarts=1, is_final=False))
        assert node.now.error == told.error
        node.hosting.heard(word("ready", restarts=1))
        assert node.now.phase == "ready"


@pytest.mark.usefixtures("hasty")
async def test_no_silence_counts_while_the_bus_is_away() -> None:
    async with hosted(silent_s=0.1) as node:
        await node.accepted()
        node.hosting.heard(word("ready"))
        node.hub.disconnect(node.bus)
        await asyncio.sleep(0.3)
        assert node.machine.processes[RUNNER].killed == ""
        assert node.now.phase == "ready"
