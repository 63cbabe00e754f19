"""A follower: repetitions, gaps, new terms, differing hashes."""

from __future__ import annotations

import msgspec

from skulk.cluster.fold import state_hash
from skulk.cluster.follow import follow_beat, follow_event, follow_snapshot
from skulk.wire.beats import MasterBeat
from skulk.wire.events import InstanceCreated, TermBegan
from skulk.wire.state import ClusterState, Term
from tests.support.states import TERM, instance, record, state_of

NEXT = Term(number=2, node_id="bbbb", incarnation="0001")


def created(seq: int, term: Term = TERM) -> InstanceCreated:
    del seq, term
    return InstanceCreated(instance=instance())


def test_what_follows_is_folded() -> None:
    followed = follow_event(state_of(seq=4), record(created(5), 5))
    assert "i1" in followed.state.instances
    assert not followed.wants_snapshot


def test_a_repetition_is_ignored() -> None:
    state = state_of(seq=4)
    followed = follow_event(state, record(created(4), 4))
    assert followed.state is state
    assert not followed.wants_snapshot


def test_a_gap_wants_a_snapshot_and_folds_nothing() -> None:
    state = state_of(seq=4)
    followed = follow_event(state, record(created(6), 6))
    assert followed.state is state
    assert followed.wants_snapshot


def test_a_new_term_is_followed_only_from_the_same_state() -> None:
    state = state_of(seq=4)
    same = follow_event(state, record(TermBegan(state_hash=state_hash(state)), 5, NEXT))
    assert same.state.position.term == NEXT
    other = follow_event(state, record(TermBegan(state_hash="0" * 16), 5, NEXT))
    assert other.wants_snapshot
    assert other.state is state


def test_another_terms_event_is_never_folded_without_its_beginning() -> None:
    assert follow_event(state_of(seq=4), record(created(5), 5, NEXT)).wants_snapshot


def test_a_partial_state_is_never_folded() -> None:
    state = msgspec.structs.replace(state_of(seq=4), partial=True)
    assert follow_event(state, record(created(5), 5)).wants_snapshot


def beat_of(state: ClusterState, digest: str | None = None) -> MasterBeat:
    term = state.position.term
    return MasterBeat(
        node_id=term.node_id, term=term, position=state.position, state_hash=digest or state_hash(state), at=0.0
    )


def test_a_beat_tells_of_another_position_or_another_state() -> None:
    state = state_of(seq=4)
    assert not follow_beat(state, state_hash(state), beat_of(state))
    assert follow_beat(state, state_hash(state), beat_of(state_of(seq=5)))
    assert follow_beat(state, state_hash(state), beat_of(state, "0" * 16))


def test_a_snapshot_is_taken_unless_it_is_older_or_foreign() -> None:
    state = state_of(seq=4)
    newer = state_of(instance(), seq=5)
    repaired = state_of(instance(), seq=4)
    foreign = msgspec.structs.replace(newer, cluster="other")
    assert follow_snapshot(state, state_hash(state), newer) is newer
    assert follow_snapshot(state, state_hash(state), repaired) is repaired
    assert follow_snapshot(state, state_hash(state), state_of(instance(), seq=3)) is state
    assert follow_snapshot(state, state_hash(state), foreign) is state
