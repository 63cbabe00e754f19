"""What the commands read of ``/state``, taken from the gateway's own rendering: the two can't drift apart."""

from __future__ import annotations

import msgspec
import pytest

from skulk.cli.placing import Previews
from skulk.cli.state_view import PHASES, StateView, find_instance, instance_rows, node_rows
from skulk.cluster.view import ClusterView, with_node_beat, with_runner_status
from skulk.errors import RequestError
from skulk.gateway.compat.previews import previews_json
from skulk.gateway.compat.state import state_json
from skulk.wire.beats import HealthReason, MasterBeat, RunnerPhase
from skulk.wire.placement import NodeReport, PlacementDecision, PlacementRequest
from tests.support import fake_gateway as fake
from tests.support.states import TERM, assignment, beat, card, instance, state_of, status

ALL_PHASES: dict[RunnerPhase, str] = {
    "accepted": "starting",
    "starting": "starting",
    "loading": "loading",
    "warming": "warming",
    "ready": "ready",
    "draining": "stopping",
    "stopped": "stopping",
    "failed": "failed",
    "refused": "failed",
}


def told(view: ClusterView) -> StateView:
    """A view as it arrives at the command line."""
    return msgspec.json.decode(msgspec.json.encode(state_json(view, {}, 0.0, 1_769_860_800.0)), type=StateView)


def view_of_one(phase: RunnerPhase = "ready") -> ClusterView:
    placed = instance(assigned=assignment())
    view = ClusterView(state=state_of(placed, instance("i2", model_id="org/waits")))
    view = with_node_beat(view, beat(), 0.0)
    return with_runner_status(view, status(assignment(), phase))


@pytest.mark.parametrize("phase", ALL_PHASES)
def test_every_phase_of_a_runner_has_its_word(phase: RunnerPhase):
    row = instance_rows(told(view_of_one(phase)))[0]
    assert (row.instance_id, row.model_id, row.state) == ("i1", "org/model", ALL_PHASES[phase])
    assert (row.backend, row.context_length) == ("llama_cpp-cpu", 4096)
    assert row.state in PHASES.values()


def test_an_instance_without_a_node_is_pending():
    row = instance_rows(told(view_of_one()))[1]
    assert (row.instance_id, row.state, row.nodes) == ("i2", "pending", ())


def test_nodes_have_their_facts():
    warning = HealthReason(level="error", code="x", message="The disk is full.", remediation="Make room.")
    told_beat = msgspec.structs.replace(beat(), warnings=(warning,))
    view = with_node_beat(ClusterView(state=state_of()), told_beat, 0.0)
    master = MasterBeat(node_id=told_beat.node_id, term=TERM, position=view.state.position, state_hash="", at=0.0)
    (row,) = node_rows(told(msgspec.structs.replace(view, master=master)))
    assert (row.node_id, row.name, row.is_master) == (told_beat.node_id, told_beat.name, True)
    assert (row.health, row.reasons) == ("error", ("The disk is full. Make room.",))
    assert row.backends == told_beat.tags
    assert row.memory_total_bytes == told_beat.memory.total_bytes
    assert row.memory_available_bytes == told_beat.memory.available_bytes


def test_the_fake_gateway_has_the_same_shape_as_the_real_one():
    real = state_json(view_of_one(), {}, 0.0, 0.0)
    recorded = fake.placed_state()
    assert recorded.keys() <= real.keys()
    (body,) = recorded["instances"][fake.INSTANCE].values()
    assert body.keys() <= real["instances"]["i1"]["MlxRingInstance"].keys()
    assert recorded["runners"][f"{fake.INSTANCE}-1"].keys() == real["runners"]["i1-1"].keys()


def test_a_preview_arrives_whole():
    reports = (NodeReport(node_id="aaaa", filter="memory", detail="need 5.2 GiB have 3.9 GiB"),)
    decision = PlacementDecision(outcome="unplaceable", reports=reports, reason="no room")
    body = previews_json(PlacementRequest(card=card()), decision, "i9")
    assert msgspec.json.decode(msgspec.json.encode(body), type=Previews).decision == decision


def test_finding_an_instance_by_how_it_begins():
    rows = instance_rows(told(ClusterView(state=state_of(instance("abc"), instance("abcd"), instance("b")))))
    assert find_instance(rows, "b").instance_id == "b"
    assert find_instance(rows, "abc").instance_id == "abc"
    for prefix in ("a", "ab", "", "x"):
        with pytest.raises(RequestError) as caught:
            find_instance(rows, prefix)
        assert caught.value.code == "instance_not_found"
