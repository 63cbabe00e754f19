"""What a master does by itself, and what a drain command becomes: from a view to an event."""

from __future__ import annotations

import msgspec
import pytest

from skulk.cluster.fold import fold
from skulk.cluster.view import ClusterView, with_node_beat, with_runner_status, with_state, without_lost
from skulk.errors import RequestError
from skulk.master.drains import drained_node
from skulk.master.upkeep import (
    BARRED_MOST_S,
    BARRED_S,
    MINORITY_WAIT_S,
    Rules,
    Upkeep,
    is_minority,
    next_event,
    with_barred,
    with_missing,
    without_expired,
)
from skulk.master.waiting import Waiting
from skulk.wire.base import ErrorBody
from skulk.wire.beats import GatewayBeat
from skulk.wire.commands import DrainNode
from skulk.wire.events import Event, InstanceAssigned, InstanceUnassigned, NodeDrainEnded, NodeDrainStarted
from skulk.wire.state import Drain
from tests.support.bus import ManualClock
from tests.support.states import assignment, beat, instance, record, state_of, status

RULES = Rules(replace_after_s=15.0)


def view_of(*nodes: str, on: str | None = "aaaa", drain: Drain | None = None) -> ClusterView:
    """These nodes were heard at 100 s; one instance is assigned to a node, or pending."""
    placed = None if on is None else assignment(node_id=on)
    state = state_of(instance(assigned=placed, last_epoch=1))
    if drain is not None:
        state = msgspec.structs.replace(state, drains={drain.node_id: drain})
    view = ClusterView(state=state)
    for node in nodes:
        view = with_node_beat(view, beat(node), 100.0)
    return view


def due(view: ClusterView, now: float, upkeep: Upkeep | None = None) -> Event | None:
    return next_event(upkeep or with_missing(Upkeep(), view, now), view, now, 0.0, RULES)


def seen_and_lost(view: ClusterView, *, waited: tuple[str, ...] = ()) -> tuple[ClusterView, Upkeep]:
    """The view 5 s after everybody but b… fell silent."""
    upkeep = with_missing(Upkeep(waited=frozenset(waited)), view, 100.0)
    for name in view.nodes:
        if name.startswith("b"):
            view = with_node_beat(view, beat(name), 105.0)
    view = without_lost(view, 105.0)
    return view, with_missing(upkeep, view, 105.0)


def test_the_instance_of_a_lost_node_moves_after_its_time() -> None:
    view, upkeep = seen_and_lost(view_of("aaaa", "bbbb"))
    view = with_node_beat(view, beat("bbbb"), 114.0)
    assert due(view, 114.9, upkeep) is None
    event = due(view, 115.0, upkeep)
    assert isinstance(event, InstanceAssigned)
    assert (event.assignment.node_id, event.assignment.epoch) == ("bbbb", 2)
    assert "silent for 15 s" in event.reason


def test_a_request_that_waits_moves_it_as_soon_as_the_node_is_lost() -> None:
    view, upkeep = seen_and_lost(view_of("aaaa", "bbbb"), waited=("org/model",))
    assert isinstance(due(view, 105.0, upkeep), InstanceAssigned)


def test_a_node_whose_routes_closed_is_waited_for_from_its_last_beat() -> None:
    """Whoever waits for its model has another node at once, the others after the whole time."""
    view = view_of("aaaa", "bbbb")
    upkeep = with_missing(Upkeep(waited=frozenset(("org/model",))), view, 100.0)
    view = without_lost(with_node_beat(view, beat("bbbb"), 102.0), 102.0, closed={"aaaa": 100.0})
    upkeep = with_missing(upkeep, view, 102.0)
    assert upkeep.missing == {"aaaa": 100.0}
    assert isinstance(due(view, 102.0, upkeep), InstanceAssigned)
    assert due(view, 102.0, msgspec.structs.replace(upkeep, waited=frozenset())) is None


def test_silence_counts_for_at_most_what_makes_a_node_lost() -> None:
    """What was not heard while the own bus was away is nobody's silence."""
    view = view_of("aaaa", "bbbb")
    upkeep = with_missing(Upkeep(), view, 100.0)
    view = without_lost(with_node_beat(view, beat("bbbb"), 200.0), 200.0, listening_since=195.0)
    assert with_missing(upkeep, view, 200.0).missing == {"aaaa": 195.0}


def test_a_minority_waits_two_minutes_whoever_waits() -> None:
    view, upkeep = seen_and_lost(view_of("aaaa", "bbbb", "cccc"), waited=("org/model",))
    assert is_minority(view)
    last = 100.0 + MINORITY_WAIT_S
    view = with_node_beat(view, beat("bbbb"), last)
    assert due(view, last - 0.1, upkeep) is None
    assert isinstance(due(view, last, upkeep), InstanceAssigned)
    assert not is_minority(seen_and_lost(view_of("aaaa", "bbbb"))[0]), "half is no minority"


def test_the_instance_of_a_node_that_came_back_as_another_version_moves_after_the_same_time() -> None:
    view = view_of("aaaa", "bbbb")
    upkeep = with_missing(Upkeep(), view, 100.0)
    view = with_node_beat(view, msgspec.structs.replace(beat("aaaa"), protocol=2), 101.0)
    upkeep = with_missing(upkeep, view, 101.0)
    assert upkeep.missing == {"aaaa": 101.0}
    view = with_node_beat(view, beat("bbbb"), 115.0)
    assert due(view, 115.9, upkeep) is None
    event = due(view, 116.0, upkeep)
    assert isinstance(event, InstanceAssigned)
    assert event.assignment.node_id == "bbbb"
    assert event.reason == "node aaaa speaks version 2 of the bus contract by now"


def test_nodes_of_another_version_make_nobody_a_minority() -> None:
    view = view_of("aaaa", "bbbb", "cccc", on="bbbb")
    for node in ("bbbb", "cccc"):
        view = with_node_beat(view, msgspec.structs.replace(beat(node), protocol=2), 101.0)
    assert not is_minority(view)


def test_nothing_moves_within_the_grace_of_a_new_master() -> None:
    view, upkeep = seen_and_lost(view_of("aaaa", "bbbb"))
    fresh = msgspec.structs.replace(upkeep, settles_at=200.0)
    view = with_node_beat(view, beat("bbbb"), 199.0)
    assert due(view, 199.0, fresh) is None


def test_silence_of_a_node_that_this_master_never_heard_begins_with_its_first_look() -> None:
    view = view_of("bbbb")
    assert with_missing(Upkeep(), view, 100.0).missing == {"aaaa": 100.0}


def test_a_look_at_the_same_state_searches_nothing_again() -> None:
    view = view_of("aaaa", "bbbb")
    first = with_missing(Upkeep(), view, 100.0)
    later = with_node_beat(view, beat("bbbb"), 101.0)
    again = with_missing(first, later, 101.0)
    assert again.placements is first.placements
    assert again.placements is not None
    assert [found.instance_id for found in again.placements.on_node["aaaa"]] == ["i1"]
    moved = msgspec.structs.replace(view, state=state_of(instance()))
    fresh = with_missing(again, moved, 102.0).placements
    assert fresh is not None
    assert ([found.instance_id for found in fresh.pending], fresh.on_node) == (["i1"], {})


def test_a_drained_nodes_instance_moves_or_is_pending() -> None:
    drain = Drain(node_id="aaaa", since=0.0, reason="a new fan")
    event = due(view_of("aaaa", "bbbb", drain=drain), 101.0)
    assert isinstance(event, InstanceAssigned)
    assert event.assignment.node_id == "bbbb"
    assert event.reason == "node aaaa is drained: a new fan"
    alone = due(view_of("aaaa", drain=drain), 101.0)
    assert isinstance(alone, InstanceUnassigned)
    assert alone.reason == "node aaaa is drained: a new fan; no other node fits"


def test_a_drain_of_a_stopped_node_ends_when_it_is_back_and_a_persons_holds() -> None:
    stopped = Drain(node_id="aaaa", since=0.0, incarnation="0000")
    assert due(view_of("aaaa", drain=stopped), 101.0) == NodeDrainEnded(node_id="aaaa")
    still_here = Drain(node_id="aaaa", since=0.0, incarnation="0001")
    assert isinstance(due(view_of("aaaa", drain=still_here), 101.0), InstanceUnassigned)
    held = due(view_of("aaaa", on=None, drain=Drain(node_id="aaaa", since=0.0)), 101.0)
    assert isinstance(held, InstanceUnassigned), "the drain stays; the instance is told why it is nowhere"


def test_an_instance_whose_maker_died_before_it_gave_a_reason_is_given_one() -> None:
    view = view_of("aaaa", on=None, drain=Drain(node_id="aaaa", since=0.0))
    event = due(view, 101.0)
    assert isinstance(event, InstanceUnassigned)
    assert "drain" in event.reason
    told = fold(view.state, record(event, view.state.position.seq + 1))
    assert due(with_state(view, told), 101.0) is None, "once"


def test_a_node_that_refuses_again_and_again_is_asked_ever_less_often() -> None:
    view, now, waits = view_of("aaaa"), 0.0, list[float]()
    upkeep = Upkeep()
    for _ in range(7):
        upkeep = without_expired(with_barred(upkeep, "i1", "aaaa", now), view, now)
        assert with_barred(upkeep, "i1", "aaaa", now) is upkeep, "told twice is refused once"
        until = upkeep.barred["i1"]["aaaa"].until
        waits.append(until - now)
        now = until
    assert waits == [BARRED_S, 120.0, 240.0, 480.0, BARRED_MOST_S, BARRED_MOST_S, BARRED_MOST_S]
    assert without_expired(upkeep, view, now + BARRED_MOST_S).barred == {}


def test_a_refusal_makes_it_pending_with_its_reason() -> None:
    refused = msgspec.structs.replace(
        status(assignment(), "refused"), error=ErrorBody(code="refused_by_node", detail="the download failed")
    )
    event = due(with_runner_status(view_of("aaaa"), refused), 101.0)
    assert event == InstanceUnassigned(instance_id="i1", reason="the download failed")


def test_a_pending_instance_is_placed_when_a_node_fits() -> None:
    assert due(view_of(on=None), 101.0) is None
    assert isinstance(due(view_of("aaaa", on=None), 101.0), InstanceAssigned)


def command(node: str, *, undo: bool = False, incarnation: str = "") -> DrainNode:
    return DrainNode(command_id="c1", node=node, undo=undo, incarnation=incarnation)


def test_a_drain_names_a_node_by_id_or_by_a_name_that_one_has() -> None:
    view = view_of("aaaa", "bbbb")
    node_id, event = drained_node(view, command("host-bbbb"), 7.0)
    assert node_id == "bbbb"
    assert event == NodeDrainStarted(drain=Drain(node_id="bbbb", since=7.0))
    same_name = with_node_beat(view, beat("cccc", name="host-bbbb"), 100.0)
    with pytest.raises(RequestError, match="2 nodes are called host-bbbb"):
        drained_node(same_name, command("host-bbbb"), 7.0)
    with pytest.raises(RequestError, match="there are: aaaa, bbbb"):
        drained_node(view, command("nobody"), 7.0)


def test_a_persons_drain_outlives_the_stop_of_the_node() -> None:
    held = view_of("aaaa", drain=Drain(node_id="aaaa", since=0.0))
    assert drained_node(held, command("aaaa", incarnation="0001"), 7.0) == ("aaaa", None)
    assert drained_node(held, command("aaaa", undo=True), 7.0) == ("aaaa", NodeDrainEnded(node_id="aaaa"))
    assert drained_node(view_of("aaaa"), command("aaaa", undo=True), 7.0) == ("aaaa", None)


def test_what_a_gateway_waits_for_is_forgotten_with_the_gateway() -> None:
    clock = ManualClock()
    waiting = Waiting(clock)
    waiting.heard(GatewayBeat(gateway_id="g1", incarnation="1", node_id="aaaa", at=0.0, waiting=("m1", "m2")))
    waiting.heard(GatewayBeat(gateway_id="g2", incarnation="1", node_id="bbbb", at=0.0, waiting=("m2",)))
    assert waiting.models() == {"m1", "m2"}
    waiting.heard(GatewayBeat(gateway_id="g1", incarnation="1", node_id="aaaa", at=0.0))
    assert waiting.models() == {"m2"}
    clock.time += 6.0
    assert waiting.models() == frozenset()
