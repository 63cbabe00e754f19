"""What the master appends to the log. Past tense; a new event is added, an old one never changes."""

from __future__ import annotations

from typing import TypeAlias

from skulk.wire.base import Wire
from skulk.wire.state import Assignment, Drain, Instance, Position


class TermBegan(Wire, frozen=True, kw_only=True, tag="term_began"):
    """A master began to write. A follower whose state has this hash goes on folding; any other asks for a snapshot."""

    state_hash: str


class InstanceCreated(Wire, frozen=True, kw_only=True, tag="instance_created"):
    """An instance is wanted from now on. ``command_id``: of the client's command."""

    instance: Instance
    command_id: str = ""


class InstanceAssigned(Wire, frozen=True, kw_only=True, tag="instance_assigned"):
    """An instance belongs to a node from now on."""

    instance_id: str
    assignment: Assignment
    reason: str = ""


class InstanceUnassigned(Wire, frozen=True, kw_only=True, tag="instance_unassigned"):
    """An instance is pending: it was refused, lost its node, or fits nowhere."""

    instance_id: str
    reason: str


class InstanceKept(Wire, frozen=True, kw_only=True, tag="instance_kept"):
    """An instance that was there already was promised to somebody: from now on it doesn't leave by itself."""

    instance_id: str


class InstanceDeleted(Wire, frozen=True, kw_only=True, tag="instance_deleted"):
    """An instance is no longer wanted; its tombstone stays."""

    instance_id: str
    deleted_at: float
    command_id: str = ""


class NodeDrainStarted(Wire, frozen=True, kw_only=True, tag="node_drain_started"):
    """A node takes no new work."""

    drain: Drain


class NodeDrainEnded(Wire, frozen=True, kw_only=True, tag="node_drain_ended"):
    """A node takes work again."""

    node_id: str


class TombstonesExpired(Wire, frozen=True, kw_only=True, tag="tombstones_expired"):
    """Tombstones older than their 30 days are forgotten."""

    instance_ids: tuple[str, ...]


Event: TypeAlias = (
    TermBegan
    | InstanceCreated
    | InstanceAssigned
    | InstanceUnassigned
    | InstanceKept
    | InstanceDeleted
    | NodeDrainStarted
    | NodeDrainEnded
    | TombstonesExpired
)


class EventRecord(Wire, frozen=True, kw_only=True):
    """An event at its place in the log. ``at``: seconds since the epoch at the master."""

    position: Position
    at: float
    event: Event
