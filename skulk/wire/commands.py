"""Calls to the master and to nodes, and their answers."""

from __future__ import annotations

from skulk.wire.base import Wire
from skulk.wire.events import EventRecord
from skulk.wire.placement import PlacementDecision, PlacementRequest
from skulk.wire.state import Assignment, ClusterState, Position


class PlaceModel(Wire, frozen=True, kw_only=True):
    """Place one more instance; with ``ensure`` only where the derived instance id isn't there yet.

    Attributes:
        command_id: the client's; the answer is kept for 10 minutes and repeated.
        instance_id: to use this very id; None: the master makes one.
    """

    command_id: str
    request: PlacementRequest
    instance_id: str | None = None
    ensure: bool = False


class PreviewPlacement(Wire, frozen=True, kw_only=True):
    """What `PlaceModel` would decide now; changes nothing."""

    request: PlacementRequest


class PlacementReply(Wire, frozen=True, kw_only=True):
    """Answer to `PlaceModel`, sent when the chosen node has accepted it.

    Attributes:
        position: the caller waits until its own state is there, so that its next read shows the instance.
        existed: with ``ensure``: nothing was added.
    """

    command_id: str
    instance_id: str
    decision: PlacementDecision
    assignment: Assignment | None = None
    position: Position
    existed: bool = False


class DeleteInstance(Wire, frozen=True, kw_only=True):
    """Delete an instance; answered when its node has stopped the runner."""

    command_id: str
    instance_id: str


class DeleteReply(Wire, frozen=True, kw_only=True):
    """Answer to `DeleteInstance`."""

    command_id: str
    instance_id: str
    position: Position


class SnapshotRequest(Wire, frozen=True, kw_only=True):
    """Ask a node for its whole state."""

    above: Position | None = None


class Snapshot(Wire, frozen=True, kw_only=True):
    """A node's state as it stands."""

    node_id: str
    state: ClusterState


class HistoryRequest(Wire, frozen=True, kw_only=True):
    """The newest events, oldest first: at most ``limit`` (1 to 1,000), with ``seq`` above ``since``."""

    limit: int = 200
    since: int = 0


class History(Wire, frozen=True, kw_only=True):
    """Events from one node's ring."""

    node_id: str
    events: tuple[EventRecord, ...]
