"""What others see of a node and its own beat can't tell."""

from __future__ import annotations

import msgspec

from skulk.cluster.view import ClusterView, with_node_beat
from skulk.gateway.compat.health import seen_reasons
from skulk.wire.beats import NodeBeat
from skulk.wire.state import Drain
from tests.support.states import beat, state_of


def codes(view: ClusterView, node_id: str) -> list[str]:
    return [reason.code for reason in seen_reasons(view, view.nodes[node_id].beat)]


def view_of(*beats: NodeBeat, drain: Drain | None = None) -> ClusterView:
    state = state_of()
    if drain is not None:
        state = msgspec.structs.replace(state, drains={drain.node_id: drain})
    view = ClusterView(state=state)
    for told in beats:
        view = with_node_beat(view, told, 0.0)
    return view


def hearing(node_id: str, *others: str, **changes: object) -> NodeBeat:
    return msgspec.structs.replace(beat(node_id), hears=(node_id, *others), **changes)


def test_nodes_that_hear_each_other_are_well() -> None:
    view = view_of(hearing("aaaa", "bbbb"), hearing("bbbb", "aaaa"))
    assert codes(view, "aaaa") == codes(view, "bbbb") == []


def test_the_side_that_is_deaf_is_told_unless_one_has_just_started() -> None:
    view = view_of(hearing("aaaa"), hearing("bbbb", "aaaa"))
    assert codes(view, "aaaa") == ["not_heard"]
    assert seen_reasons(view, view.nodes["aaaa"].beat)[0].message == "It doesn't hear host-bbbb"
    assert codes(view, "bbbb") == []
    fresh = view_of(hearing("aaaa"), hearing("bbbb", "aaaa", started_at=999.0))
    assert codes(fresh, "aaaa") == []


def test_a_drain_and_another_version_are_told() -> None:
    view = view_of(hearing("aaaa", protocol=2), drain=Drain(node_id="aaaa", since=0.0, reason="a new fan"))
    assert codes(view, "aaaa") == ["draining", "incompatible"]
    over = view_of(hearing("aaaa"), drain=Drain(node_id="aaaa", since=0.0, incarnation="0000"))
    assert codes(over, "aaaa") == []
