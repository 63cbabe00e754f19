"""Reconcile, don't command: what a node should run, against what it runs (DESIGN 3)."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from skulk.cluster.merge import TOMBSTONE_S
from skulk.wire.state import Assignment, ClusterState, Instance


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """One runner that this node should have."""

    instance: Instance
    assignment: Assignment


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done so that the node runs what it should. Runner ids in order."""

    start: tuple[Wanted, ...] = ()
    stop: tuple[str, ...] = ()


def wanted_of(state: ClusterState, node_id: str, silent_s: float = 0.0) -> dict[str, Wanted]:
    """The runners that the state gives to a node, by runner id.

    ``silent_s``: how long no master was heard. After 30 days the deletions that this node missed are forgotten
    everywhere, so it runs nothing until it hears one.
    """
    if silent_s > TOMBSTONE_S:
        return {}
    return {
        instance.assignment.runner_id: Wanted(instance=instance, assignment=instance.assignment)
        for instance in state.instances.values()
        if instance.assignment is not None and instance.assignment.node_id == node_id
    }


def difference(wanted: Mapping[str, Wanted], running: frozenset[str]) -> Difference:
    """What to start and what to stop. A higher epoch has another runner id, so the old runner is stopped by itself."""
    return Difference(
        start=tuple(wanted[name] for name in sorted(wanted) if name not in running),
        stop=tuple(sorted(running - wanted.keys())),
    )
