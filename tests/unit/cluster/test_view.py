"""The view: what beats add to the state, and what falls out of it."""

from __future__ import annotations

import msgspec
import pytest

from skulk.cluster.liveness import closed_since, node_liveness
from skulk.cluster.reconcile import difference, wanted_of
from skulk.cluster.view import (
    ClusterView,
    closed_as_told,
    followers_of,
    liveness_of,
    peers_of,
    phase_of,
    ready_instances,
    runner_of,
    with_node_beat,
    with_runner_status,
    with_state,
    without_lost,
)
from skulk.wire.beats import RunnerPhase
from tests.support.states import assignment, beat, instance, state_of, status

ASSIGNED = assignment()


def view_with(phase: RunnerPhase | None = None) -> ClusterView:
    view = ClusterView(state=state_of(instance(assigned=ASSIGNED)))
    return view if phase is None else with_runner_status(view, status(ASSIGNED, phase))


@pytest.mark.parametrize(
    ("phase", "expected"),
    [
        (None, "placing"),
        ("accepted", "loading"),
        ("starting", "loading"),
        ("loading", "loading"),
        ("warming", "loading"),
        ("ready", "ready"),
        ("failed", "failed"),
        ("refused", "failed"),
        ("draining", "placing"),
        ("stopped", "placing"),
    ],
)
def test_an_instances_phase_is_its_runners(phase: RunnerPhase | None, expected: str) -> None:
    view = view_with(phase)
    assert phase_of(view, view.state.instances["i1"]) == expected


def test_an_instance_without_an_assignment_is_pending() -> None:
    view = ClusterView(state=state_of(instance()))
    assert phase_of(view, view.state.instances["i1"]) == "pending"


def test_the_runner_of_an_old_epoch_does_not_count() -> None:
    view = with_runner_status(ClusterView(state=state_of(instance(assigned=assignment(epoch=2)))), status(ASSIGNED))
    assert runner_of(view, view.state.instances["i1"]) is None
    assert ready_instances(view, "org/model") == ()


def test_an_older_status_never_replaces_a_newer_one() -> None:
    newer = with_runner_status(view_with(), status(ASSIGNED, "ready", since=2.0))
    late = with_runner_status(newer, status(ASSIGNED, "loading", since=1.0))
    assert late.runners[ASSIGNED.runner_id].phase == "ready"
    stale_beat = with_node_beat(late, beat(runners=(status(ASSIGNED, "loading", since=1.0),)), 0.0)
    assert stale_beat.runners[ASSIGNED.runner_id].phase == "ready"


def test_a_node_that_was_started_again_with_an_earlier_clock_is_believed() -> None:
    before = with_node_beat(view_with(), beat(runners=(status(ASSIGNED, "ready", since=9e9),)), 0.0)
    restarted = msgspec.structs.replace(beat(runners=(status(ASSIGNED, "loading", since=1.0),)), incarnation="0002")
    assert with_node_beat(before, restarted, 1.0).runners[ASSIGNED.runner_id].phase == "loading"


def test_what_a_beat_says_twice_is_so_whatever_somebody_else_said_of_that_runner() -> None:
    """A cloned home that stops tells its runners' end under the same names; the original's beats go on."""
    told = with_runner_status(view_with("ready"), status(assignment(), "stopped", since=900.0))
    once = with_node_beat(told, beat(runners=(status(assignment(), "refused", since=5.0),)), 1.0)
    assert once.runners["i1-1"].phase == "stopped", "the beat may have been written before the status"
    twice = with_node_beat(once, beat(runners=(status(assignment(), "refused", since=5.0),)), 2.0)
    assert twice.runners["i1-1"].phase == "refused"


def test_a_view_over_its_own_state_is_itself() -> None:
    view = view_with("ready")
    assert with_state(view, view.state) is view


def test_a_later_life_counts_more_than_a_clock_that_was_set_back() -> None:
    before = with_runner_status(view_with(), status(ASSIGNED, "failed", since=900.0))
    again = with_runner_status(before, msgspec.structs.replace(status(ASSIGNED, "ready", since=5.0), restarts=1))
    assert again.runners[ASSIGNED.runner_id].phase == "ready"
    late = with_runner_status(again, status(ASSIGNED, "failed", since=901.0))
    assert late.runners[ASSIGNED.runner_id].phase == "ready"


def test_nonsense_never_fills_the_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skulk.cluster.view.MAX_RUNNERS", 2)
    view = view_with("ready")
    for number in range(5):
        view = with_runner_status(view, msgspec.structs.replace(status(ASSIGNED), runner_id=f"spoof-{number}"))
    assert len(view.runners) == 2
    assert with_runner_status(view, status(ASSIGNED, "failed", since=9.0)).runners[ASSIGNED.runner_id].phase == "failed"


def test_a_beat_names_all_runners_of_its_node() -> None:
    view = with_node_beat(view_with("ready"), beat(), 0.0)
    assert view.runners == {}


def test_lost_nodes_take_their_runners_with_them() -> None:
    view = with_node_beat(view_with(), beat(runners=(status(ASSIGNED),)), 10.0)
    assert liveness_of(view, "aaaa", 12.9) == "live"
    assert liveness_of(view, "aaaa", 13.0) == "suspect"
    assert without_lost(view, 14.9) is view
    assert without_lost(view, 15.0, listening_since=10.1) is view
    assert without_lost(view, 15.0).nodes == {}
    assert without_lost(view, 15.0).runners == {}
    assert liveness_of(without_lost(view, 15.0), "aaaa", 15.0) == "lost"


def test_a_node_is_lost_two_seconds_after_its_routes_closed() -> None:
    view = with_node_beat(view_with(), beat(runners=(status(ASSIGNED),)), 10.0)
    assert without_lost(view, 12.9, closed={"aaaa": 11.0}) is view, "closed for less than two seconds"
    assert without_lost(view, 13.0, closed={"aaaa": 11.0}).nodes == {}
    assert without_lost(view, 13.0, closed={"bbbb": 1.0}) is view
    assert without_lost(view, 13.0, listening_since=11.1, closed={"aaaa": 11.0}) is view
    heard = with_node_beat(view, beat(), 12.5)
    assert without_lost(heard, 14.4, closed={"aaaa": 11.0}) is heard, "it has spoken since"


def test_a_node_without_routes_of_its_own_takes_its_neighbours_word() -> None:
    told = msgspec.structs.replace(beat(), closed={"bbbb": 1.5})
    view = with_node_beat(view_with(), told, 10.0)
    assert closed_as_told(view, "aaaa") == {"bbbb": 8.5}
    assert closed_as_told(view, "cccc") == {}


def test_since_when_routes_are_closed() -> None:
    closed = closed_since({}, {"aaaa", "bbbb"}, {"bbbb"}, 10.0)
    assert closed == {"aaaa": 10.0}
    assert closed_since(closed, {"bbbb"}, {"bbbb"}, 14.9) == {"aaaa": 10.0}
    assert closed_since(closed, {"bbbb"}, {"aaaa", "bbbb"}, 11.0) == {}
    assert closed_since(closed, {"bbbb"}, set(), 15.0) == {"bbbb": 15.0}, "by then it is lost by its silence"
    assert closed_since(closed, {"aaaa"}, set(), 12.0) == {"aaaa": 10.0}


def test_a_deleted_instance_takes_its_status_along_unless_its_node_still_has_the_runner() -> None:
    view = view_with("ready")
    assert with_state(view, state_of()).runners == {}
    held = with_node_beat(view, beat(runners=(status(ASSIGNED),)), 0.0)
    assert ASSIGNED.runner_id in with_state(held, state_of()).runners
    # it has spoken since its node's last beat, which didn't know it yet: its memory isn't free
    young = with_runner_status(with_node_beat(ClusterView(state=view.state), beat(), 1.0), status(ASSIGNED))
    assert ASSIGNED.runner_id in with_state(young, state_of()).runners
    assert ASSIGNED.runner_id not in with_state(with_node_beat(young, beat(), 2.0), state_of()).runners


def test_the_least_loaded_instance_comes_first() -> None:
    first, second = assignment("i1"), assignment("i2")
    view = ClusterView(state=state_of(instance("i1", assigned=first), instance("i2", assigned=second)))
    view = with_runner_status(view, status(first, instance_id="i1", active=3))
    view = with_runner_status(view, status(second, instance_id="i2", active=1))
    assert [found.instance_id for found in ready_instances(view, "org/model")] == ["i2", "i1"]


@pytest.mark.parametrize(("silent_s", "expected"), [(0.0, "live"), (2.9, "live"), (3.0, "suspect"), (5.0, "lost")])
def test_the_liveness_table(silent_s: float, expected: str) -> None:
    assert node_liveness(silent_s) == expected


def test_reconcile_starts_what_is_wanted_and_stops_the_rest() -> None:
    state = state_of(
        instance("i1", assigned=assignment("i1", epoch=2)),
        instance("i2", assigned=assignment("i2", node_id="bbbb")),
        instance("i3"),
    )
    wanted = wanted_of(state, "aaaa")
    assert list(wanted) == ["i1-2"]
    found = difference(wanted, frozenset({"i1-1", "i9-1"}))
    assert [item.assignment.runner_id for item in found.start] == ["i1-2"]
    assert found.stop == ("i1-1", "i9-1")
    assert difference(wanted, frozenset({"i1-2"})).start == ()


def test_a_node_of_another_version_of_the_contract_is_shown_and_part_of_nothing() -> None:
    view = with_node_beat(view_with(), beat(runners=(status(ASSIGNED, "ready"),)), 100.0)
    assert ready_instances(view, "org/model")
    other = msgspec.structs.replace(beat(runners=(status(ASSIGNED, "ready"),)), protocol=2, master="aaaa")
    view = with_node_beat(view, other, 101.0)
    assert view.nodes["aaaa"].beat.protocol == 2
    assert peers_of(view) == set()
    assert (view.runners, view.known, followers_of(view, "aaaa")) == ({}, {}, 0)
    assert not ready_instances(view, "org/model")
    assert with_runner_status(view, status(ASSIGNED, "ready")) is view, "it comes late, or is no word of ours"
    again = with_node_beat(view, beat(), 102.0)
    assert peers_of(again) == {"aaaa"} and again.known == {"aaaa": 102.0}
