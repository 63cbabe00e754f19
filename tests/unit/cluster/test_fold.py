"""The fold: what each event does, and that unknown ids harm nothing."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.cluster.fold import fold, state_hash
from skulk.wire.events import (
    Event,
    InstanceAssigned,
    InstanceCreated,
    InstanceDeleted,
    InstanceKept,
    InstanceUnassigned,
    NodeDrainEnded,
    NodeDrainStarted,
    TermBegan,
    TombstonesExpired,
)
from skulk.wire.state import ClusterState, Drain
from tests.support.states import assignment, instance, record, state_of


def folded(state: ClusterState, *events: Event) -> ClusterState:
    for event in events:
        state = fold(state, record(event, state.position.seq + 1))
    return state


def test_an_instance_is_created_assigned_unassigned_and_deleted() -> None:
    created = folded(state_of(), InstanceCreated(instance=instance()))
    assert created.instances["i1"].assignment is None
    assert created.instances["i1"].position.seq == 1

    assigned = folded(created, InstanceAssigned(instance_id="i1", assignment=assignment()))
    assert assigned.instances["i1"].assignment == assignment()
    assert assigned.instances["i1"].last_epoch == 1

    pending = folded(assigned, InstanceUnassigned(instance_id="i1", reason="no room"))
    assert pending.instances["i1"].assignment is None
    assert pending.instances["i1"].last_epoch == 1
    assert pending.instances["i1"].reason == "no room"

    deleted = folded(pending, InstanceDeleted(instance_id="i1", deleted_at=5.0))
    assert deleted.instances == {}
    assert deleted.tombstones["i1"].position == deleted.position


def test_an_epoch_never_falls() -> None:
    state = folded(
        state_of(instance(assigned=assignment(epoch=3))),
        InstanceAssigned(instance_id="i1", assignment=assignment(epoch=2)),
    )
    assert state.instances["i1"].last_epoch == 3
    assert state.instances["i1"].assignment == assignment(epoch=3)


def test_an_instance_made_again_never_reuses_a_runner_id() -> None:
    state = folded(
        state_of(instance(assigned=assignment(epoch=3))),
        InstanceDeleted(instance_id="i1", deleted_at=5.0),
        InstanceCreated(instance=instance()),
    )
    assert state.instances["i1"].last_epoch == 3


def test_events_about_unknown_instances_only_move_the_position() -> None:
    state = folded(
        state_of(),
        InstanceAssigned(instance_id="nobody", assignment=assignment("nobody")),
        InstanceUnassigned(instance_id="nobody", reason=""),
    )
    assert state.instances == {}
    assert state.position.seq == 2


def test_drains_start_and_end() -> None:
    started = folded(state_of(), NodeDrainStarted(drain=Drain(node_id="aaaa", since=1.0)))
    assert started.drains["aaaa"].active
    ended = folded(started, NodeDrainEnded(node_id="aaaa"), NodeDrainEnded(node_id="unknown"))
    assert not ended.drains["aaaa"].active
    assert "unknown" not in ended.drains


def test_tombstones_expire() -> None:
    state = folded(
        state_of(instance()),
        InstanceDeleted(instance_id="i1", deleted_at=5.0),
        TombstonesExpired(instance_ids=("i1",)),
    )
    assert state.tombstones == {}


def test_an_event_out_of_order_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="does not follow"):
        fold(state_of(), record(TermBegan(state_hash=""), 2))


def test_the_hash_ignores_the_order_of_dicts_and_tells_states_apart() -> None:
    one = state_of(instance("i1"), instance("i2"))
    other = state_of(instance("i2"), instance("i1"))
    assert list(one.instances) != list(other.instances)
    assert state_hash(one) == state_hash(other)
    assert state_hash(one) != state_hash(state_of(instance("i1")))


events = st.lists(
    st.sampled_from(["i1", "i2", "i3"]).flatmap(
        lambda name: st.one_of(
            st.just(InstanceCreated(instance=instance(name))),
            st.builds(
                lambda epoch: InstanceAssigned(instance_id=name, assignment=assignment(name, epoch=epoch)),
                st.integers(1, 5),
            ),
            st.just(InstanceUnassigned(instance_id=name, reason="r")),
            st.just(InstanceKept(instance_id=name)),
            st.just(InstanceDeleted(instance_id=name, deleted_at=1.0)),
        )
    ),
    max_size=20,
)


@given(events)
def test_a_state_survives_json_and_the_position_counts_every_event(drawn: list[Event]) -> None:
    state = folded(state_of(), *drawn)
    assert state.position.seq == len(drawn)
    again = msgspec.json.decode(msgspec.json.encode(state), type=ClusterState)
    assert again == state
    assert state_hash(again) == state_hash(state)
    for found in state.instances.values():
        assert found.assignment is None or found.assignment.epoch == found.last_epoch


def test_what_a_request_placed_stays_when_a_person_wants_it_too() -> None:
    made = msgspec.structs.replace(instance("i1"), on_demand=True)
    state = folded(state_of(), InstanceCreated(instance=made))
    assert state.instances["i1"].on_demand
    kept = folded(state, InstanceKept(instance_id="i1"))
    assert not kept.instances["i1"].on_demand
    assert kept.instances["i1"].kept
    assert kept.instances["i1"].position == kept.position, "a merge knows the later version"
    assert kept.instances["i1"].born == kept.position, "a promise is a birth"
    assert folded(kept, InstanceKept(instance_id="nobody")).instances == kept.instances
