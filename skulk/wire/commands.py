"""Calls to the master and to nodes, and their answers."""

from __future__ import annotations

from typing import Any

import msgspec

from skulk.wire.base import Wire
from skulk.wire.beats import RunnerStatus
from skulk.wire.events import EventRecord
from skulk.wire.placement import PlacementDecision, PlacementRequest
from skulk.wire.state import NO_TERM, Assignment, ClusterState, Position, Term


class PlaceModel(Wire, frozen=True, kw_only=True):
    """Place one more instance; with ``ensure`` only where the derived instance id isn't there yet.

    Attributes:
        command_id: the client's; the answer is kept for 10 minutes and repeated.
        on_demand: a request for an answer wants it: it leaves when nobody has used it for a while, or for room.
        instance_id: to use this very id; None: the master makes one.
        replicas: how many instances; all are placed, or none is.
    """

    command_id: str
    request: PlacementRequest
    instance_id: str | None = None
    ensure: bool = False
    on_demand: bool = False
    replicas: int = 1


class PreviewPlacement(Wire, frozen=True, kw_only=True):
    """What `PlaceModel` would decide now; changes nothing."""

    request: PlacementRequest


class PlacementReply(Wire, frozen=True, kw_only=True):
    """Answer to `PlaceModel`, sent when the chosen node has accepted it.

    Attributes:
        position: the caller waits until its own state is there, so that its next read shows the instance.
        existed: with ``ensure``: nothing was added.
        instance_ids: of all replicas; ``instance_id``, ``decision`` and ``assignment`` are the first one's.
        warnings: what the placements risk, as far as they were forced.
    """

    command_id: str
    instance_id: str
    decision: PlacementDecision
    assignment: Assignment | None = None
    position: Position
    existed: bool = False
    instance_ids: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


class DeleteInstance(Wire, frozen=True, kw_only=True):
    """Delete an instance; answered when its node has stopped the runner."""

    command_id: str
    instance_id: str


class DeleteReply(Wire, frozen=True, kw_only=True):
    """Answer to `DeleteInstance`."""

    command_id: str
    instance_id: str
    position: Position


class DrainNode(Wire, frozen=True, kw_only=True):
    """Take no new work to a node and move its instances; ``undo``: take work there again.

    Attributes:
        node: id or name.
        incarnation: of a node that is being stopped: the drain ends when the node returns. Empty: until undone.
    """

    command_id: str
    node: str
    undo: bool = False
    reason: str = ""
    incarnation: str = ""


class DrainReply(Wire, frozen=True, kw_only=True):
    """Answer to `DrainNode`. ``instance_ids``: what still has to leave the node."""

    command_id: str
    node_id: str
    instance_ids: tuple[str, ...] = ()
    position: Position


class PreVote(Wire, frozen=True, kw_only=True):
    """Asked before a campaign: does a master live?"""

    candidate: str


class PreVoted(Wire, frozen=True, kw_only=True):
    """Answer to `PreVote`; it promises nothing.

    Attributes:
        master: term of the master that this node is, or has heard within the last second; None: there is none.
        is_ready: this node would lead, and will have lost patience within half a second.
        is_partial: its state holds what its version doesn't understand.
        highest: the highest term that it has seen.
    """

    node_id: str
    master: Term | None = None
    is_ready: bool = False
    is_partial: bool = False
    highest: Term = NO_TERM


class Gather(Wire, frozen=True, kw_only=True):
    """Asked in a round: a new master is about to write in ``term``, so a master of a lower one stops before it answers.

    ``state_hash``: of what the asker knows already.
    """

    term: Term
    state_hash: str


class Gathered(Wire, frozen=True, kw_only=True):
    """Answer to `Gather`.

    Attributes:
        highest: the highest term that this node has seen.
        state: what it knows; None where the asker knows the same.
        runners: what runs here.
    """

    node_id: str
    highest: Term = NO_TERM
    state: ClusterState | None = None
    runners: tuple[RunnerStatus, ...] = ()

    def opened(self, raw: dict[str, Any]) -> Gathered:
        """With what a newer version wrote into the state."""
        return self if self.state is None else msgspec.structs.replace(self, state=ClusterState.opened(raw["state"]))


class SnapshotRequest(Wire, frozen=True, kw_only=True):
    """Ask a node for its whole state."""

    above: Position | None = None


class Snapshot(Wire, frozen=True, kw_only=True):
    """A node's state as it stands."""

    node_id: str
    state: ClusterState

    def opened(self, raw: dict[str, Any]) -> Snapshot:
        """With what a newer version wrote into the state."""
        return msgspec.structs.replace(self, state=ClusterState.opened(raw["state"]))


class RestartNode(Wire, frozen=True, kw_only=True):
    """Ask a node to stop in order and start again, with the settings of its next start."""

    command_id: str


class RestartReply(Wire, frozen=True, kw_only=True):
    """Answer to `RestartNode`, sent before it begins."""

    command_id: str
    node_id: str


class HistoryRequest(Wire, frozen=True, kw_only=True):
    """The newest events, oldest first: at most ``limit`` (1 to 1,000), with ``seq`` above ``since``."""

    limit: int = 200
    since: int = 0


class History(Wire, frozen=True, kw_only=True):
    """Events from one node's ring."""

    node_id: str
    events: tuple[EventRecord, ...]
