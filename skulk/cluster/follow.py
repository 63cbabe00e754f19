"""How a follower keeps up with the log: fold what follows, ask for a snapshot where something is missing.

heard                                       does
event at or before my position              ignored: a repetition
event that directly follows, same term      folded
TermBegan that directly follows, my hash    folded
any other event                             snapshot wanted
master's beat with my position and hash     nothing
master's beat with another one              snapshot wanted
snapshot above my position, or of the same  taken
position and another hash
"""

from __future__ import annotations

import msgspec

from skulk.cluster.fold import fold, state_hash
from skulk.wire.beats import MasterBeat
from skulk.wire.events import EventRecord, TermBegan
from skulk.wire.state import ClusterState


class Followed(msgspec.Struct, frozen=True, kw_only=True):
    """The state after something was heard, and whether a snapshot is wanted."""

    state: ClusterState
    wants_snapshot: bool = False


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


def follow_snapshot(state: ClusterState, own_hash: str, snapshot: ClusterState) -> ClusterState:
    """The state after the master's snapshot came: never an older one."""
    if snapshot.cluster != state.cluster or snapshot.position < state.position:
        return state
    if snapshot.position == state.position and state_hash(snapshot) == own_hash:
        return state
    return snapshot
