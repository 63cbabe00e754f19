"""How a follower keeps up with the log: fold what follows, ask for a snapshot where something is missing.

heard                                       does
event at or before my position              ignored: a repetition
event that directly follows, same term      folded
TermBegan that directly follows, my hash    folded
any other event                             snapshot wanted
master's beat with my position and hash     nothing
master's beat with another one              snapshot wanted
snapshot of my position, another hash       taken: one of us has a defect
snapshot above my position                  taken, if it lacks nothing of mine
snapshot that lacks something of mine, or   not taken: my beat says `unmerged`, the master's next round merges it
of an older term, or with a lower seq
"""

from __future__ import annotations

import msgspec

from skulk.cluster.fold import fold, state_hash
from skulk.cluster.merge import lacks
from skulk.wire.beats import MasterBeat
from skulk.wire.events import EventRecord, TermBegan
from skulk.wire.state import ClusterState


class Followed(msgspec.Struct, frozen=True, kw_only=True):
    """The state after something was heard, whether a snapshot is wanted, and whether the master's lacks something."""

    state: ClusterState
    wants_snapshot: bool = False
    is_unmerged: bool = False


def follow_event(state: ClusterState, record: EventRecord) -> Followed:
    """What an event of the log means to a follower."""
    if record.position <= state.position:
        return Followed(state=state)
    follows = record.position.seq == state.position.seq + 1 and not state.partial
    if follows and isinstance(record.event, TermBegan):
        follows = record.event.state_hash == state_hash(state)
    elif follows:
        follows = record.position.term == state.position.term
    if not follows:
        return Followed(state=state, wants_snapshot=True)
    return Followed(state=fold(state, record))


def follow_beat(state: ClusterState, own_hash: str, beat: MasterBeat) -> bool:
    """Whether the followed master's beat tells that a snapshot is wanted. ``own_hash``: digest of ``state``."""
    return beat.position != state.position or beat.state_hash != own_hash


def follow_snapshot(state: ClusterState, own_hash: str, snapshot: ClusterState, wall: float) -> Followed:
    """What the master's snapshot means to a follower. ``wall``: seconds since the epoch."""
    if snapshot.cluster != state.cluster:
        return Followed(state=state)
    if snapshot.position == state.position:
        return Followed(state=state if state_hash(snapshot) == own_hash else snapshot)
    if snapshot.position < state.position and snapshot.position.term == state.position.term:
        # events have overtaken it
        return Followed(state=state)
    is_behind = snapshot.position < state.position or snapshot.position.seq < state.position.seq
    if is_behind or lacks(snapshot, state, wall):
        return Followed(state=state, is_unmerged=True)
    return Followed(state=snapshot)
