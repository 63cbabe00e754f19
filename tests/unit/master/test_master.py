"""Commands become events, runners and answers: master, node and replicas on one MemoryBus."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.replica import Replica
from skulk.bus.subjects import EVENTS_HISTORY, MASTER_DELETE, MASTER_PLACE, MASTER_PREVIEW, NODE_SNAPSHOT
from skulk.clock import SystemClock
from skulk.cluster.view import phase_of
from skulk.errors import RequestError, SkulkError, UnavailableError
from skulk.node.hosting import ProcessReport, lost_process
from skulk.wire.commands import (
    DeleteInstance,
    DeleteReply,
    HistoryRequest,
    PlacementReply,
    PlaceModel,
    PreviewPlacement,
    SnapshotRequest,
)
from skulk.wire.placement import PlacementRequest
from tests.support.control_plane import FakeMachine, FakeNode, running_node
from tests.support.states import GIB, card


async def place(
    node: FakeNode, command_id: str = "c1", *, ensure: bool = False, weights_bytes: int = 100_000_000
) -> PlacementReply:
    request = PlacementRequest(card=card(weights_bytes=weights_bytes), context_length=2048, n_parallel=1)
    command = PlaceModel(command_id=command_id, request=request, ensure=ensure)
    return await node.bus.request(MASTER_PLACE, command, timeout_s=20.0, node="aaaa")


async def delete(node: FakeNode, instance_id: str, command_id: str = "d1") -> DeleteReply:
    command = DeleteInstance(command_id=command_id, instance_id=instance_id)
    return await node.bus.request(MASTER_DELETE, command, timeout_s=20.0, node="aaaa")


async def test_a_placed_model_is_accepted_by_its_node_before_the_answer(tmp_path: Path) -> None:
    async with running_node(tmp_path) as node:
        reply = await place(node)
        assert reply.assignment is not None
        assert reply.decision.outcome == "placed"
        status = node.replica.view.runners[reply.assignment.runner_id]
        assert status.phase == "accepted"
        assert await node.replica.wait_for(reply.position, 2.0)
        assert reply.instance_id in node.replica.view.state.instances
        await asyncio.wait_for(node.machine.processes[reply.assignment.runner_id].started.wait(), 2.0)


async def test_a_command_is_carried_out_once(tmp_path: Path) -> None:
    async with running_node(tmp_path) as node:
        first, second = await asyncio.gather(place(node), place(node))
        third = await place(node)
        assert first.instance_id == second.instance_id == third.instance_id
        other = await place(node, "c2")
        assert other.instance_id != first.instance_id
        assert await node.replica.wait_for(other.position, 2.0)
        assert len(node.replica.view.state.instances) == 2


async def test_ensure_adds_one_and_only_one(tmp_path: Path) -> None:
    async with running_node(tmp_path) as node:
        replies = await asyncio.gather(*(place(node, f"c{i}", ensure=True) for i in range(5)))
        assert len({reply.instance_id for reply in replies}) == 1
        assert [reply.existed for reply in replies].count(False) == 1


async def test_what_fits_nowhere_is_refused_with_figures_and_leaves_nothing(tmp_path: Path) -> None:
    async with running_node(tmp_path) as node:
        with pytest.raises(RequestError, match="GiB") as refused:
            await place(node, weights_bytes=100 * GIB)
        assert refused.value.code == "unplaceable"
        assert node.replica.view.state.instances == {}


async def test_a_nodes_own_refusal_is_the_answer(tmp_path: Path) -> None:
    machine = FakeMachine()
    machine.refusal = RequestError("model_file_invalid", "model.gguf is cut short")
    async with running_node(tmp_path, machine=machine) as node:
        with pytest.raises(SkulkError, match="cut short"):
            await place(node)
        snapshot = await node.bus.request(NODE_SNAPSHOT, SnapshotRequest(), timeout_s=2.0, node="aaaa")
        assert snapshot.state.instances == {}
        assert len(snapshot.state.tombstones) == 1


async def test_the_node_is_the_last_authority_on_its_memory(tmp_path: Path) -> None:
    machine = FakeMachine()
    machine.own_memory_bytes = 1_000_000
    async with running_node(tmp_path, machine=machine) as node:
        with pytest.raises(SkulkError, match="memory need"):
            await place(node)


async def test_two_at_once_are_never_placed_on_the_same_memory(tmp_path: Path) -> None:
    machine = FakeMachine(memory_bytes=3 * GIB)
    async with running_node(tmp_path, machine=machine) as node:
        results = await asyncio.gather(
            *(place(node, f"c{i}", weights_bytes=2 * GIB) for i in range(2)), return_exceptions=True
        )
        assert sorted(type(result).__name__ for result in results) == ["PlacementReply", "RequestError"]


async def test_a_deletion_is_answered_when_the_runner_is_gone(tmp_path: Path) -> None:
    async with running_node(tmp_path) as node:
        reply = await place(node)
        assert reply.assignment is not None
        process = node.machine.processes[reply.assignment.runner_id]
        deleted = await delete(node, reply.instance_id)
        assert process.stopped.is_set()
        assert await node.replica.wait_for(deleted.position, 2.0)
        assert node.replica.view.state.instances == {}
        with pytest.raises(RequestError, match="no instance"):
            await delete(node, reply.instance_id, "d2")


async def test_a_crash_is_visible_with_its_reason(tmp_path: Path) -> None:
    async with running_node(tmp_path) as node:
        reply = await place(node)
        assert reply.assignment is not None
        process = node.machine.processes[reply.assignment.runner_id]
        process.on_exit(ProcessReport(error=lost_process("killed by SIGKILL"), restarts=1, is_final=False))
        runner = reply.assignment.runner_id
        assert await node.replica.wait_until(lambda view: view.runners[runner].phase == "failed", 2.0)
        status = node.replica.view.runners[runner]
        assert status.error is not None
        assert status.error.detail == "killed by SIGKILL"
        assert status.restarts == 1


async def test_placements_come_back_after_a_restart(tmp_path: Path) -> None:
    async with running_node(tmp_path) as node:
        reply = await place(node)
        assert await node.replica.wait_for(reply.position, 2.0)
    async with running_node(tmp_path) as again:
        view = again.replica.view
        assert view.state.position.term.number == 2
        assert phase_of(view, view.state.instances[reply.instance_id]) in {"loading", "placing"}
        assert reply.assignment is not None
        runner = reply.assignment.runner_id
        assert await again.replica.wait_until(lambda view: runner in view.runners, 2.0)
        await asyncio.wait_for(again.machine.processes[runner].started.wait(), 2.0)


async def test_a_preview_changes_nothing(tmp_path: Path) -> None:
    async with running_node(tmp_path) as node:
        asked = PreviewPlacement(request=PlacementRequest(card=card()))
        decision = await node.bus.request(MASTER_PREVIEW, asked, timeout_s=2.0, node="aaaa")
        assert decision.outcome == "placed"
        assert node.replica.view.state.instances == {}


async def test_a_late_follower_gets_the_state_by_snapshot(tmp_path: Path) -> None:
    hub = MemoryHub()
    async with running_node(tmp_path, hub=hub) as node:
        reply = await place(node)
        bus = MemoryBus(hub, cluster="test", name="gateway")
        replica = Replica(bus, SystemClock())
        await replica.start()
        task = asyncio.create_task(replica.run())
        try:
            assert await replica.wait_for(reply.position, 5.0)
            assert replica.view.state == node.master.state
        finally:
            task.cancel()
            await asyncio.wait({task})
            await replica.close()
            await bus.close()


async def test_the_history_is_answered_from_the_ring_and_its_limit_is_checked(tmp_path: Path) -> None:
    async with running_node(tmp_path) as node:
        reply = await place(node)
        await node.replica.wait_for(reply.position, 2.0)
        history = await node.bus.request(EVENTS_HISTORY, HistoryRequest(limit=1), timeout_s=2.0)
        assert [type(record.event).__name__ for record in history.events] == ["InstanceAssigned"]
        with pytest.raises(RequestError, match="limit"):
            await node.bus.request(EVENTS_HISTORY, HistoryRequest(limit=0), timeout_s=2.0)


async def test_an_ensured_model_that_fits_nowhere_stays_pending_and_is_placed_when_it_fits(tmp_path: Path) -> None:
    machine = FakeMachine(models=())
    async with running_node(tmp_path, machine=machine) as node:
        reply = await place(node, ensure=True)
        assert reply.assignment is None
        assert reply.decision.outcome in {"pending", "unplaceable"}
        machine.models = ("org/model",)

        def is_placed(_view: object) -> bool:
            instance = node.replica.view.state.instances.get(reply.instance_id)
            return instance is not None and instance.assignment is not None

        assert await node.replica.wait_until(is_placed, 5.0)


async def test_without_facts_a_placement_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skulk.master.leader.FACTS_WAIT_S", 0.1)
    async with running_node(tmp_path) as node:
        silent = msgspec.structs.replace(node.replica.view, nodes={}, runners={})
        monkeypatch.setattr(type(node.replica), "view", property(lambda _self: silent))
        with pytest.raises(UnavailableError) as pending:
            await place(node)
        assert pending.value.code == "facts_pending"
