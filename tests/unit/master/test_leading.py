"""A mastership that ends and begins again: nothing written is lost, no command is carried out twice."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.subjects import ELECTION_GATHER, MASTER_DELETE, MASTER_PLACE, NODE_BEAT, RUNNER_STATUS
from skulk.clock import SystemClock
from skulk.cluster.view import ClusterView, with_node_beat
from skulk.errors import RequestError, UnavailableError
from skulk.master.commands import Commands
from skulk.master.leader import Leader
from skulk.master.upkeep import Rules, Upkeep, next_event
from skulk.wire.commands import DeleteInstance, Gather, PlaceModel
from skulk.wire.events import InstanceAssigned, InstanceCreated
from skulk.wire.placement import PlacementRequest
from skulk.wire.state import Position, Term
from tests.support.control_plane import FakeMachine, FakeNode, running_node
from tests.support.states import assignment, beat, card, instance, state_of, status

HIGHER = Term(number=99, node_id="bbbb", incarnation="0001")


def command(command_id: str = "c1", *, ensure: bool = False, instance_id: str | None = None) -> PlaceModel:
    request = PlacementRequest(card=card(), context_length=2048, n_parallel=1)
    return PlaceModel(command_id=command_id, request=request, ensure=ensure, instance_id=instance_id)


async def began_again(node: FakeNode, number: int) -> None:
    """Waits until the node leads in a term of at least this number."""

    def leads(view: ClusterView) -> bool:
        term = None if view.master is None else view.master.term
        return term is not None and term.node_id == node.bus.name and term.number >= number

    assert await node.replica.wait_until(leads, 5.0)


async def end_lead(node: FakeNode) -> None:
    """The round of a higher term is heard: this master steps down before it answers, its bus stays up."""
    question = Gather(term=HIGHER, state_hash="")
    answer = await node.bus.request(ELECTION_GATHER, question, timeout_s=2.0, node=node.bus.name)
    assert answer.state is not None
    assert node.master.state is None


async def test_what_was_written_as_the_bus_went_is_there_in_the_next_term(tmp_path: Path) -> None:
    hub = MemoryHub()
    async with running_node(tmp_path, hub=hub) as node:
        placing = asyncio.create_task(node.bus.request(MASTER_PLACE, command(), timeout_s=5.0, node="aaaa"))
        assert await node.replica.wait_until(lambda view: bool(view.state.instances), 2.0)
        hub.disconnect(node.bus)
        with pytest.raises(UnavailableError):
            await placing
        hub.reconnect(node.bus)
        await began_again(node, 2)
        assert node.master.state is not None
        assert len(node.master.state.instances) == 1


async def test_the_masters_own_node_knows_at_once_what_it_writes(tmp_path: Path) -> None:
    """Before the bus has carried it: it may never do so."""
    async with running_node(tmp_path) as node:
        leader = Leader(node.bus, node.replica, SystemClock(), HIGHER, Rules())
        assert node.replica.view.state == leader.state
        assert node.replica.view.state.position.term == HIGHER


async def test_a_repeated_command_goes_on_where_the_last_term_left_it(tmp_path: Path) -> None:
    hub = MemoryHub()
    machine = FakeMachine()
    machine.prepared.clear()
    async with running_node(tmp_path, hub=hub, machine=machine) as node:
        placing = asyncio.create_task(node.bus.request(MASTER_PLACE, command(), timeout_s=5.0, node="aaaa"))
        await asyncio.wait_for(machine.preparing.wait(), 2.0)
        hub.disconnect(node.bus)
        with pytest.raises(UnavailableError):
            await placing
        hub.reconnect(node.bus)
        await began_again(node, 2)
        machine.prepared.set()
        reply = await node.bus.request(MASTER_PLACE, command(), timeout_s=5.0, node="aaaa")
        assert reply.decision.outcome == "placed"
        assert node.master.state is not None
        assert list(node.master.state.instances) == [reply.instance_id]

        deletion = DeleteInstance(command_id="d1", instance_id=reply.instance_id)
        first = await node.bus.request(MASTER_DELETE, deletion, timeout_s=5.0, node="aaaa")
        hub.disconnect(node.bus)
        hub.reconnect(node.bus)
        await began_again(node, 3)
        again = await node.bus.request(MASTER_DELETE, deletion, timeout_s=5.0, node="aaaa")
        assert again.instance_id == first.instance_id


async def test_callers_of_a_master_that_steps_down_hear_it_at_once(tmp_path: Path) -> None:
    machine = FakeMachine()
    machine.prepared.clear()
    async with running_node(tmp_path, machine=machine) as node:
        placing = asyncio.create_task(node.bus.request(MASTER_PLACE, command(), timeout_s=60.0, node="aaaa"))
        await asyncio.wait_for(machine.preparing.wait(), 2.0)
        await end_lead(node)
        async with asyncio.timeout(3.0):
            with pytest.raises(UnavailableError, match="not the master"):
                await placing


async def test_a_term_that_has_ended_writes_nothing(tmp_path: Path) -> None:
    async with running_node(tmp_path) as node:
        leader = Leader(node.bus, node.replica, SystemClock(), HIGHER, Rules())
        leader.close()
        with pytest.raises(UnavailableError, match="not the master"):
            await leader.place(command("c9"))


async def test_dropped_commands_are_forgotten_and_answered() -> None:
    commands = Commands(SystemClock())
    runs: list[int] = []
    begun, release = asyncio.Event(), asyncio.Event()

    async def work() -> str:
        runs.append(1)
        begun.set()
        await release.wait()
        return "done"

    waiting = asyncio.create_task(commands.once("c1", work))
    await asyncio.wait_for(begun.wait(), 1.0)
    commands.drop_running()
    with pytest.raises(UnavailableError, match="not the master"):
        await waiting
    release.set()
    assert await commands.once("c1", work) == "done"
    commands.drop_running()
    assert await commands.once("c1", work) == "done"
    assert len(runs) == 2


async def test_a_caller_that_goes_away_leaves_its_command_running() -> None:
    commands = Commands(SystemClock())
    begun, release = asyncio.Event(), asyncio.Event()

    async def work() -> str:
        begun.set()
        await release.wait()
        return "done"

    waiting = asyncio.create_task(commands.once("c1", work))
    await asyncio.wait_for(begun.wait(), 1.0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    release.set()
    assert await commands.once("c1", work) == "done"


async def test_only_the_masters_beats_are_its_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chatty cluster without a master gets one as soon as a quiet one."""
    monkeypatch.setattr("skulk.bus.replica.MASTER_SILENT_S", 1_000.0)
    hub = MemoryHub()
    async with running_node(tmp_path, hub=hub, patience_s=0.2) as node:
        await end_lead(node)
        talker = MemoryBus(hub, cluster="test", name="talker")
        told = status(assignment("i7", node_id="cccc"), instance_id="i7")

        async def chatter() -> None:
            while True:
                await talker.publish(RUNNER_STATUS, told, runner=told.runner_id)
                await asyncio.sleep(0.02)

        chatting = asyncio.create_task(chatter())
        try:
            await began_again(node, HIGHER.number + 1)
        finally:
            chatting.cancel()
            await asyncio.wait({chatting})
            await talker.close()


async def test_behind_a_frozen_server_nobody_campaigns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skulk.bus.replica.MASTER_SILENT_S", 1_000.0)
    async with running_node(tmp_path, patience_s=0.2) as node:
        node.bus.frozen_at = node.bus.clock.now()
        await end_lead(node)
        assert not await node.replica.wait_until(
            lambda view: view.master is not None and view.master.term.number > HIGHER.number, 1.0
        )
        node.bus.frozen_at = None
        await began_again(node, HIGHER.number + 1)


async def test_a_model_is_placed_when_its_node_has_decided_not_when_it_begins_to_think(tmp_path: Path) -> None:
    machine = FakeMachine()
    machine.prepared.clear()
    machine.refusal = RequestError("model_file_invalid", "model.gguf is cut short")
    async with running_node(tmp_path, machine=machine) as node:
        placing = asyncio.create_task(node.bus.request(MASTER_PLACE, command(), timeout_s=20.0, node="aaaa"))
        assert await node.replica.wait_until(
            lambda view: any(found.phase == "starting" for found in view.runners.values()), 3.0
        )
        machine.prepared.set()
        with pytest.raises(RequestError, match="cut short"):
            await placing


async def test_an_ensured_model_that_its_node_refuses_is_told_as_pending(tmp_path: Path) -> None:
    machine = FakeMachine()
    machine.refusal = RequestError("model_file_invalid", "model.gguf is cut short")
    async with running_node(tmp_path, machine=machine) as node:
        reply = await node.bus.request(MASTER_PLACE, command(ensure=True), timeout_s=10.0, node="aaaa")
        assert (reply.decision.outcome, reply.decision.nodes, reply.assignment) == ("pending", (), None)
        assert "cut short" in reply.decision.reason
        again = await node.bus.request(MASTER_PLACE, command("c2", ensure=True), timeout_s=10.0, node="aaaa")
        assert (again.existed, again.instance_id) == (True, reply.instance_id)
        assert "cut short" in again.decision.reason


async def test_two_instances_of_one_model_live_side_by_side_and_go_one_by_one(tmp_path: Path) -> None:
    async with running_node(tmp_path) as node:
        first, second = [
            await node.bus.request(MASTER_PLACE, command(name), timeout_s=10.0, node="aaaa") for name in ("c1", "c2")
        ]
        deletion = DeleteInstance(command_id="d1", instance_id=first.instance_id)
        await node.bus.request(MASTER_DELETE, deletion, timeout_s=10.0, node="aaaa")
        assert node.master.state is not None
        assert list(node.master.state.instances) == [second.instance_id]
        assert not node.machine.processes[f"{second.instance_id}-1"].stopped.is_set()


async def test_a_deletion_while_it_is_placed_ends_both(tmp_path: Path) -> None:
    machine = FakeMachine()
    machine.prepared.clear()
    async with running_node(tmp_path, machine=machine) as node:
        wanted = command(instance_id="i1")
        placing = asyncio.create_task(node.bus.request(MASTER_PLACE, wanted, timeout_s=20.0, node="aaaa"))
        await asyncio.wait_for(machine.preparing.wait(), 2.0)
        deletion = DeleteInstance(command_id="d1", instance_id="i1")
        await node.bus.request(MASTER_DELETE, deletion, timeout_s=10.0, node="aaaa")
        with pytest.raises(RequestError, match="deleted while"):
            await placing
        assert machine.processes == {}
        assert node.hosting.statuses() == ()


async def test_an_id_that_no_subject_can_carry_is_refused(tmp_path: Path) -> None:
    async with running_node(tmp_path) as node:
        with pytest.raises(RequestError, match="no instance id"):
            await node.bus.request(MASTER_PLACE, command(instance_id="has.a.dot"), timeout_s=5.0, node="aaaa")
        assert node.master.state is not None
        assert node.master.state.instances == {}


def test_a_new_master_moves_nothing_before_it_can_have_heard_everybody() -> None:
    view = ClusterView(state=state_of(instance(assigned=assignment(node_id="gone"))))
    view = with_node_beat(view, beat("aaaa"), 10.0)
    upkeep = Upkeep(missing={"gone": 0.0}, settles_at=12.0)
    rules = Rules(replace_after_s=0.0)
    assert next_event(upkeep, view, 11.0, 1_000.0, rules) is None
    moved = next_event(upkeep, view, 12.0, 1_000.0, rules)
    assert isinstance(moved, InstanceAssigned)
    assert moved.assignment.node_id == "aaaa"


async def test_a_deletion_that_only_an_incompatible_node_could_keep_is_put_on_the_own_disk(tmp_path: Path) -> None:
    persisted: list[str] = []

    async def persist() -> bool:
        persisted.append("once")
        return True

    async with running_node(tmp_path) as node:
        ahead = Position(term=msgspec.structs.replace(HIGHER, number=900), seq=9000)
        foreign = msgspec.structs.replace(beat("zzzz"), protocol=2, position=ahead)
        await node.bus.publish(NODE_BEAT, foreign, node="zzzz")
        assert await node.replica.wait_until(lambda view: "zzzz" in view.nodes, 2.0)
        own = Term(number=99, node_id="aaaa", incarnation="0001")
        leader = Leader(node.bus, node.replica, SystemClock(), own, Rules(), persist=persist)
        leader._ledger.append(InstanceCreated(instance=instance("i1", assigned=assignment("i1", node_id="zzzz"))))
        await leader.delete(DeleteInstance(command_id="d1", instance_id="i1"))
        assert persisted == ["once"]
