"""The laws of merge, on states that real logs made."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from skulk.cluster.fold import fold, state_hash
from skulk.cluster.merge import lacks, merge
from skulk.ids import commanded_instance_id
from skulk.wire.events import (
    Event,
    InstanceAssigned,
    InstanceCreated,
    InstanceDeleted,
    InstanceKept,
    NodeDrainEnded,
    NodeDrainStarted,
)
from skulk.wire.state import ClusterState, Drain, Term
from tests.support.states import assignment, instance, record, state_of

COMMANDED = commanded_instance_id("c1")
NAMES = ("i1", "i2", "i3", COMMANDED)


def event_of(kind: int, name: str, epoch: int) -> Event:
    match kind:
        case 0:
            return InstanceCreated(instance=instance(name), command_id="c1")
        case 1:
            return InstanceAssigned(instance_id=name, assignment=assignment(name, epoch=epoch))
        case 2:
            return InstanceDeleted(instance_id=name, deleted_at=1.0)
        case 3:
            return NodeDrainStarted(drain=Drain(node_id=name, since=1.0))
        case 4:
            return NodeDrainEnded(node_id=name)
        case 5:
            return InstanceKept(instance_id=name)
        case _:
            return InstanceDeleted(instance_id=name, deleted_at=1.0, command_id="d1")


drawn_events = st.lists(st.builds(event_of, st.integers(0, 6), st.sampled_from(NAMES), st.integers(1, 4)), max_size=12)


@st.composite
def lineages(draw: st.DrawFn) -> tuple[ClusterState, ClusterState, ClusterState]:
    """Three states that went on from one past under three masters of their own."""
    past = run(state_of(), draw(drawn_events), Term(number=1, node_id="aaaa", incarnation="1"))
    return tuple(  # pyright: ignore[reportReturnType] - a tuple of three
        run(past, draw(drawn_events), Term(number=2, node_id=node, incarnation="1"))
        for node in ("aaaa", "bbbb", "cccc")
    )


def run(state: ClusterState, events: list[Event], term: Term) -> ClusterState:
    for event in events:
        state = fold(state, record(event, state.position.seq + 1, term))
    return state


@settings(max_examples=600)
@given(lineages())
def test_merge_is_commutative_associative_and_idempotent(
    states: tuple[ClusterState, ClusterState, ClusterState],
) -> None:
    a, b, c = states
    assert state_hash(merge(a, b)) == state_hash(merge(b, a))
    assert state_hash(merge(merge(a, b), c)) == state_hash(merge(a, merge(b, c)))
    assert state_hash(merge(a, a)) == state_hash(a)


@given(lineages())
def test_what_neither_deleted_is_kept_and_the_position_never_falls(
    states: tuple[ClusterState, ClusterState, ClusterState],
) -> None:
    a, b, _ = states
    merged = merge(a, b)
    kept = (a.instances.keys() | b.instances.keys()) - (a.tombstones.keys() | b.tombstones.keys())
    assert kept <= merged.instances.keys()
    assert merged.position.seq == max(a.position.seq, b.position.seq)
    for name, found in merged.instances.items():
        assert found in (a.instances.get(name), b.instances.get(name))


def test_a_deletion_beats_a_move_it_did_not_know_of_in_any_order() -> None:
    """Born twice and deleted once on three sides: which version wins must not hide one that outlives the tombstone."""
    terms = [Term(number=2, node_id=node, incarnation="1") for node in ("aaaa", "bbbb", "cccc")]
    created = InstanceCreated(instance=instance("i3"))
    a = run(state_of(), [created, InstanceAssigned(instance_id="i3", assignment=assignment("i3"))], terms[0])
    b = run(state_of(), [InstanceDeleted(instance_id="i3", deleted_at=1.0)], terms[1])
    c = run(state_of(), [created], terms[2])
    assert merge(a, b).instances == {}
    assert merge(merge(a, b), c).instances == merge(a, merge(b, c)).instances == merge(merge(a, c), b).instances
    assert merge(merge(a, b), c).instances == c.instances


def test_a_deletion_covers_what_two_masters_made_of_one_command() -> None:
    """Neither heard the other: the deletion of the one is below the birth at the other."""
    created = InstanceCreated(instance=instance(COMMANDED), command_id="c1")
    lower, higher = (Term(number=2, node_id=node, incarnation="1") for node in ("aaaa", "bbbb"))
    asked = InstanceDeleted(instance_id=COMMANDED, deleted_at=1.0, command_id="d1")
    deleted = run(state_of(), [created, asked], lower)
    twice = run(state_of(), [created], higher)
    assert merge(deleted, twice).instances == {}
    again = fold(deleted, record(created, deleted.position.seq + 1, lower))
    assert again.instances == {}, "its id is never used again"


def test_a_promise_outlives_what_an_earlier_master_took_back_by_itself() -> None:
    """A placement fails at one master; the next, that didn't hear of it, promises the instance to somebody else."""
    created = InstanceCreated(instance=instance(COMMANDED), command_id="c1")
    earlier, later = (Term(number=number, node_id="aaaa", incarnation="1") for number in (2, 3))
    past = run(state_of(), [created], earlier)
    taken_back = run(past, [InstanceDeleted(instance_id=COMMANDED, deleted_at=1.0)], earlier)
    promised = run(past, [InstanceKept(instance_id=COMMANDED)], later)
    assert COMMANDED in merge(taken_back, promised).instances
    assert merge(taken_back, past).instances == {}, "what nobody was promised is gone"
    twice = run(state_of(), [created], later)
    assert merge(taken_back, twice).instances == {}, "also what another master made of the command that failed"
    assert merge(promised, twice).instances[COMMANDED].kept
    asked = run(past, [InstanceDeleted(instance_id=COMMANDED, deleted_at=1.0, command_id="d1")], earlier)
    assert merge(asked, promised).instances == {}, "a person's deletion stands"
    both = merge(taken_back, asked)
    assert not both.tombstones[COMMANDED].unasked
    assert lacks(taken_back, asked, wall=2.0), "that somebody asked is worth a merge"


def test_records_that_are_equal_are_no_conflict() -> None:
    one = state_of(instance("i1", assigned=assignment()), seq=5)
    other = msgspec.json.decode(msgspec.json.encode(one), type=ClusterState)
    assert merge(one, other).instances["i1"] is one.instances["i1"]


def test_a_stale_state_with_a_high_term_erases_nothing() -> None:
    fresh = state_of(instance("i1", assigned=assignment(epoch=2)), seq=10)
    stale = state_of(seq=3, term=Term(number=99, node_id="zzzz", incarnation="1"))
    assert merge(fresh, stale).instances == fresh.instances


def test_a_tombstone_beats_the_versions_it_covers_and_none_above() -> None:
    past = run(state_of(), [InstanceCreated(instance=instance())], Term(number=1, node_id="aaaa", incarnation="1"))
    deleted = run(past, [InstanceDeleted(instance_id="i1", deleted_at=1.0)], past.position.term)
    assert merge(past, deleted).instances == {}
    again = run(deleted, [InstanceCreated(instance=instance())], past.position.term)
    assert "i1" in merge(again, deleted).instances
