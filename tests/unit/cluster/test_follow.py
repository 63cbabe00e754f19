"""A follower: repetitions, gaps, new terms, differing hashes."""

from __future__ import annotations

import msgspec

from skulk.cluster.fold import state_hash
from skulk.cluster.follow import Followed, follow_beat, follow_event, follow_snapshot
from skulk.cluster.merge import TOMBSTONE_S, merge
from skulk.wire.beats import MasterBeat
from skulk.wire.events import InstanceCreated, TermBegan
from skulk.wire.state import ClusterState, Position, Term, Tombstone
from tests.support.states import TERM, assignment, instance, record, state_of

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


def followed(state: ClusterState, snapshot: ClusterState, wall: float = 0.0) -> Followed:
    return follow_snapshot(state, state_hash(state), snapshot, wall)


def test_a_snapshot_is_taken_unless_it_is_older_or_foreign() -> None:
    state = state_of(seq=4)
    newer = state_of(instance(), seq=5)
    repaired = state_of(instance(), seq=4)
    foreign = msgspec.structs.replace(newer, cluster="other")
    assert followed(state, newer).state is newer
    assert followed(state, repaired).state is repaired
    assert followed(state, state_of(seq=4)).state is state
    assert followed(state, state_of(instance(), seq=3)) == Followed(state=state)
    assert followed(state, foreign) == Followed(state=state)


def test_what_the_master_lacks_is_kept_until_it_has_merged_it() -> None:
    own = state_of(instance("mine"), seq=4)
    masters = state_of(instance("theirs"), seq=9, term=NEXT)
    assert followed(own, masters) == Followed(state=own, is_unmerged=True)
    merged = merge(masters, own)
    assert followed(own, merged) == Followed(state=merged)


def test_a_higher_term_is_kept_until_the_master_is_above_it() -> None:
    own = state_of(seq=4, term=NEXT)
    assert followed(own, state_of(seq=9)) == Followed(state=own, is_unmerged=True)


def test_a_higher_seq_is_kept_until_the_master_is_above_it() -> None:
    own = state_of(seq=9)
    assert followed(own, state_of(seq=4, term=NEXT)) == Followed(state=own, is_unmerged=True)


def test_an_old_version_and_a_deleted_instance_are_nothing_that_is_lacked() -> None:
    older = instance("i1", assigned=assignment("i1", epoch=1))
    newer = instance("i1", assigned=assignment("i1", epoch=2))
    known = state_of(newer, seq=9)
    assert followed(state_of(older, seq=4), known).state is known
    stone = Tombstone(instance_id="i1", position=Position(term=TERM, seq=8), deleted_at=0.0)
    deleted = msgspec.structs.replace(state_of(seq=9), tombstones={"i1": stone})
    assert followed(state_of(newer, seq=4), deleted).state is deleted
    assert followed(deleted, state_of(newer, seq=10)).is_unmerged


def test_a_forgotten_tombstone_is_nothing_that_is_lacked() -> None:
    stone = Tombstone(instance_id="i1", position=Position(term=TERM, seq=3), deleted_at=0.0)
    own = msgspec.structs.replace(state_of(seq=4), tombstones={"i1": stone})
    assert followed(own, state_of(seq=9), wall=1.0).is_unmerged
    assert not followed(own, state_of(seq=9), wall=TOMBSTONE_S).is_unmerged
