"""The replicated state: only what must outlive a process. `skulk.cluster` folds it; nothing else changes it."""

from __future__ import annotations

from typing import Any

import msgspec

from skulk.wire.base import Wire
from skulk.wire.placement import MemoryEstimate, PlacementRequest
from skulk.wire.unknown import opened


class Term(Wire, frozen=True, kw_only=True, order=True):
    """One mastership: number, then node id, then the incarnation; ordered and compared whole (DESIGN 3)."""

    number: int
    node_id: str
    incarnation: str


NO_TERM = Term(number=0, node_id="", incarnation="")


class Position(Wire, frozen=True, kw_only=True, order=True):
    """Where a log stands. ``seq`` goes on across terms."""

    term: Term
    seq: int


ORIGIN = Position(term=NO_TERM, seq=0)


class Assignment(Wire, frozen=True, kw_only=True):
    """One placement of an instance on a node. A move is the next epoch.

    Attributes:
        epoch: 1 at first, one more at each move or new attempt.
        node_id: the node that runs it (the first of several, for sharded engines).
        backend: resolved ``<engine>-<compute>`` tag.
        context_length: admitted window of one request, tokens.
        n_parallel: sequences served side by side.
        kv_cells: cells allocated for all sequences together.
        memory: what is reserved.
    """

    epoch: int
    node_id: str
    runner_id: str
    backend: str
    context_length: int
    n_parallel: int
    kv_cells: int
    memory: MemoryEstimate


class Instance(Wire, frozen=True, kw_only=True):
    """One wanted instance of a model. Its id names the placement and survives moves.

    Attributes:
        assignment: where it runs; None while it is pending.
        last_epoch: the highest epoch ever assigned; the next one is one more.
        reason: why it is pending, or what the last move was for.
        created_at: seconds since the epoch.
        born: position of the event that created it; a tombstone covers what was born up to its position.
        position: of the event that wrote this version.
        command_id: of the client's command that created it: the command, repeated, finds it.
        on_demand: a request placed it: it leaves when it has been idle for long, or for another one's room.
        kept: somebody was promised that it stays, even while no node takes it.
    """

    instance_id: str
    request: PlacementRequest
    assignment: Assignment | None = None
    last_epoch: int = 0
    reason: str = ""
    created_at: float = 0.0
    born: Position = ORIGIN
    position: Position = ORIGIN
    command_id: str = ""
    on_demand: bool = False
    kept: bool = False

    @property
    def model_id(self) -> str:
        return self.request.card.model_id


class Tombstone(Wire, frozen=True, kw_only=True):
    """A deleted instance; it beats every version of it that was born up to ``position``, and lives 30 days.

    Attributes:
        last_epoch: of the deleted instance; one that is made again under this id goes on from there, so that no
            runner id is ever used twice.
        command_id: of the client's command that deleted it.
        unasked: nobody asked for this deletion: a master took back a placement that failed, or one that was idle. A
            promise that was given after it stands.
    """

    instance_id: str
    position: Position
    deleted_at: float
    last_epoch: int = 0
    command_id: str = ""
    unasked: bool = False


class Drain(Wire, frozen=True, kw_only=True):
    """A node that takes no new work until it is undone; an undone one stays as a record, so that merges agree.

    Attributes:
        since: seconds since the epoch.
        position: of the event that wrote this version; the higher wins in a merge.
        incarnation: of a node that was being stopped; the drain is over for any other one. Empty: until undone.
    """

    node_id: str
    since: float
    reason: str = ""
    active: bool = True
    incarnation: str = ""
    position: Position = ORIGIN


class ClusterState(Wire, frozen=True, kw_only=True):
    """The fold of the log up to ``position``.

    Attributes:
        partial: it holds what this version doesn't know; fetch snapshots instead of folding.
        unknown: that, by path (see `skulk.wire.unknown`).
    """

    cluster: str
    position: Position = ORIGIN
    instances: dict[str, Instance] = {}
    tombstones: dict[str, Tombstone] = {}
    drains: dict[str, Drain] = {}
    partial: bool = False
    unknown: dict[str, Any] = {}

    @classmethod
    def opened(cls, raw: dict[str, Any]) -> ClusterState:
        """A state out of its JSON, with what this version doesn't know kept beside it."""
        state = opened(raw, cls)
        return msgspec.structs.replace(state, partial=bool(state.unknown))
