"""Place commands at a master: several replicas, memory that two want, what is forced, facts that are missing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skulk.bus.memory_bus import MemoryHub
from skulk.bus.subjects import MASTER_DELETE, MASTER_PLACE
from skulk.errors import RequestError, SkulkError, UnavailableError
from skulk.ids import commanded_instance_id
from skulk.master.leader import Leader
from skulk.master.replicas import MOST, parts_of
from skulk.master.retiring import Retiring
from skulk.wire.commands import DeleteInstance, PlacementReply, PlaceModel
from skulk.wire.placement import PlacementDecision, PlacementRequest
from tests.support.control_plane import FakeMachine, FakeNode, running_node
from tests.support.states import GIB, card

WAIT_S = 20.0
ROUNDS = 100
# one of these fits a node of 16 GiB, two don't
WIDE = card("org/wide", weights_bytes=9 * GIB)


def command(name: str, model: Any = None, **changes: Any) -> PlaceModel:
    request = PlacementRequest(card=model or card(), context_length=2048, n_parallel=1)
    wanted = {field: changes.pop(field) for field in tuple(changes) if field in PlacementRequest.__struct_fields__}
    return PlaceModel(command_id=name, request=msgspec.structs.replace(request, **wanted), **changes)


async def place(node: FakeNode, asked: PlaceModel) -> PlacementReply:
    return await node.bus.request(MASTER_PLACE, asked, timeout_s=WAIT_S, node="aaaa")


def instances(node: FakeNode) -> list[str]:
    assert node.master.state is not None
    return sorted(node.master.state.instances)


async def test_two_at_once_that_fit_singly_but_not_together(tmp_path: Path) -> None:
    """One is placed, the other refused with figures: 100 times of 100."""
    machine = FakeMachine(models=("org/wide",))
    async with running_node(tmp_path, machine=machine) as node:
        for number in range(ROUNDS):
            asked = [command(f"c{number}-{which}", WIDE) for which in "ab"]
            answers = await asyncio.gather(*(place(node, one) for one in asked), return_exceptions=True)
            [placed] = [one for one in answers if isinstance(one, PlacementReply)]
            [refused] = [one for one in answers if isinstance(one, SkulkError)]
            assert refused.code == "unplaceable"
            assert "memory need 10.0 GiB have 6.0 GiB" in refused.detail, refused.detail
            assert instances(node) == [placed.instance_id]
            deletion = DeleteInstance(command_id=f"d{number}", instance_id=placed.instance_id)
            await node.bus.request(MASTER_DELETE, deletion, timeout_s=WAIT_S, node="aaaa")
        assert node.hosting.statuses() == ()


async def test_two_that_were_both_told_that_they_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory goes to the first between the second one's decision and its assignment."""
    decide = Leader._decide
    both = asyncio.Barrier(2)

    async def decide_together(leader: Leader, request: PlacementRequest) -> PlacementDecision:
        decision = await decide(leader, request)
        assert decision.outcome == "placed"
        await both.wait()
        return decision

    monkeypatch.setattr(Leader, "_decide", decide_together)
    async with running_node(tmp_path, machine=FakeMachine(models=("org/wide",))) as node:
        asked = [command(name, WIDE) for name in "ab"]
        answers = await asyncio.gather(*(place(node, one) for one in asked), return_exceptions=True)
        [placed] = [one for one in answers if isinstance(one, PlacementReply)]
        [refused] = [one for one in answers if isinstance(one, RequestError)]
        assert "memory need 10.0 GiB have 6.0 GiB" in refused.detail
        assert instances(node) == [placed.instance_id]


async def test_replicas_are_instances_and_one_command_names_all(tmp_path: Path) -> None:
    hub = MemoryHub()
    async with running_node(tmp_path, hub=hub) as node:
        reply = await place(node, command("c1", replicas=3))
        assert len(set(reply.instance_ids)) == 3
        assert reply.instance_ids[0] == reply.instance_id == commanded_instance_id("c1")
        assert instances(node) == sorted(reply.instance_ids)
        assert node.master.state is not None
        assert reply.position == node.master.state.position
        again = await place(node, command("c1", replicas=3))
        assert again.instance_ids == reply.instance_ids


async def test_of_replicas_that_dont_all_fit_none_stays(tmp_path: Path) -> None:
    async with running_node(tmp_path, machine=FakeMachine(models=("org/wide",))) as node:
        with pytest.raises(RequestError, match=r"replica 2 of 2: .*memory need 10\.0 GiB have 6\.0 GiB") as caught:
            await place(node, command("c1", WIDE, replicas=2))
        assert caught.value.code == "unplaceable"
        assert instances(node) == []
        assert (await place(node, command("c2", WIDE))).decision.outcome == "placed"


async def test_a_repeated_command_of_replicas_goes_on_where_it_was(tmp_path: Path) -> None:
    """Some stand in the state when it comes again, as after a change of masters."""
    async with running_node(tmp_path) as node:
        first = await place(node, command("c1"))
        node.master._commands.drop_running()
        node.master._commands._results.clear()
        reply = await place(node, command("c1", replicas=2))
        assert reply.instance_ids == (first.instance_id, commanded_instance_id("c1-2"))


@pytest.mark.parametrize(
    "wrong",
    [{"replicas": 0}, {"replicas": MOST + 1}, {"replicas": 2, "ensure": True}, {"replicas": 2, "instance_id": "i"}],
)
def test_a_command_that_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        parts_of(command("c1", **wrong))
    assert (caught.value.code, caught.value.param) == ("invalid_request", "replicas")


async def test_one_that_is_forced_is_placed_started_and_told_of(tmp_path: Path) -> None:
    huge = card("org/huge", weights_bytes=40 * GIB)
    async with running_node(tmp_path, machine=FakeMachine(models=("org/huge",))) as node:
        with pytest.raises(RequestError, match="memory need 44"):
            await place(node, command("c1", huge))
        reply = await place(node, command("c2", huge, force=True))
        (warning,) = reply.warnings
        assert "forced though memory need 44" in warning
        async with asyncio.timeout(WAIT_S):
            await node.machine.supervised.wait()


async def test_idle_models_leave_before_anything_is_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[PlacementRequest] = []

    async def make_room(_: Retiring, request: PlacementRequest) -> bool:
        asked.append(request)
        return False

    monkeypatch.setattr(Retiring, "make_room", make_room)
    async with running_node(tmp_path, machine=FakeMachine(models=("org/wide",))) as node:
        assert (await place(node, command("c1", WIDE, force=True))).warnings == ()
        assert asked == [], "it fits"
        assert (await place(node, command("c2", WIDE, force=True))).warnings
        assert [(one.card.model_id, one.force) for one in asked] == [("org/wide", False)]


async def test_an_answer_has_the_decision_with_a_report_for_every_node(tmp_path: Path) -> None:
    async with running_node(tmp_path) as node:
        reply = await place(node, command("c1"))
        assert [report.node_id for report in reply.decision.reports] == ["aaaa"]
        assert reply.decision.nodes == ("aaaa",)


async def test_facts_that_don_t_come_are_waited_for_and_then_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skulk.master.leader.FACTS_WAIT_S", 0.2)
    machine = FakeMachine(memory_bytes=0)
    async with running_node(tmp_path, machine=machine) as node:
        with pytest.raises(UnavailableError, match="still measuring memory") as caught:
            await place(node, command("c1"))
        assert (caught.value.code, caught.value.http_status) == ("facts_pending", 503)
        assert instances(node) == []


async def test_facts_that_come_while_it_is_waited_for_place_it(tmp_path: Path) -> None:
    machine = FakeMachine(memory_bytes=0)
    async with running_node(tmp_path, machine=machine) as node:
        placing = asyncio.create_task(place(node, command("c1")))
        await asyncio.sleep(0)
        machine.memory_bytes = machine.own_memory_bytes = 16 * GIB
        assert (await placing).decision.outcome == "placed"
