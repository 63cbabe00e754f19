"""What a master does by itself: pure, from the view to the events to append.

1. An assignment that its node refused       becomes pending; that node is barred for a while.
2. An assignment whose node is lost          moves after `replace_after_s`, where another node fits.
3. A pending instance                        is assigned when a node fits.
4. A tombstone older than 30 days            is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Final

import msgspec

from skulk.cluster.view import ClusterView, runner_of
from skulk.placement.decision import assign, place
from skulk.wire.events import Event, InstanceAssigned, InstanceUnassigned, TombstonesExpired
from skulk.wire.state import Instance

BARRED_S: Final = 60.0
TOMBSTONE_S: Final = 30 * 24 * 3600.0


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What the master was told.

    Attributes:
        replace_after_s: how long a silent node keeps its instances, seconds.
        default_parallel: sequences side by side where a request doesn't say.
    """

    replace_after_s: float = 15.0
    default_parallel: int = 16


class Upkeep(msgspec.Struct, frozen=True, kw_only=True):
    """What the master remembers between looks; monotonic seconds.

    Attributes:
        barred: by instance, the nodes that refused it and until when they aren't asked again.
        missing: by node, since when assignments name a node that nobody hears.
        settles_at: until then nothing moves: a new master hasn't heard everybody yet.
    """

    barred: Mapping[str, Mapping[str, float]] = {}
    missing: Mapping[str, float] = {}
    settles_at: float = 0.0


def with_missing(upkeep: Upkeep, view: ClusterView, now: float) -> Upkeep:
    """The memory after a look at who is there."""
    named = {found.assignment.node_id for found in view.state.instances.values() if found.assignment is not None}
    absent = named - view.nodes.keys()
    return msgspec.structs.replace(upkeep, missing={node: upkeep.missing.get(node, now) for node in sorted(absent)})


def with_barred(upkeep: Upkeep, instance_id: str, node_id: str, now: float) -> Upkeep:
    """The memory after a node refused an instance."""
    nodes = {**upkeep.barred.get(instance_id, {}), node_id: now + BARRED_S}
    return msgspec.structs.replace(upkeep, barred={**upkeep.barred, instance_id: nodes})


def without_expired(upkeep: Upkeep, view: ClusterView, now: float) -> Upkeep:
    """The memory without what no longer matters."""
    barred = {
        instance_id: kept
        for instance_id, nodes in upkeep.barred.items()
        if instance_id in view.state.instances and (kept := {n: until for n, until in nodes.items() if until > now})
    }
    return msgspec.structs.replace(upkeep, barred=barred)


def refused_by(view: ClusterView) -> tuple[Instance, ...]:
    """The instances whose present assignment was refused by its node."""
    return tuple(
        instance
        for instance in view.state.instances.values()
        if (status := runner_of(view, instance)) is not None and status.phase == "refused"
    )


def next_event(
    upkeep: Upkeep,
    view: ClusterView,
    now: float,
    wall: float,
    rules: Rules,
    *,
    busy: Set[str] = frozenset(),
) -> Event | None:
    """The next event to append, None where nothing is to be done.

    One at a time: each decision must see the memory that the one before it reserved. ``wall`` is seconds since the
    epoch; ``busy`` instances are left to the command that is placing them.
    """
    free = tuple(found for name, found in sorted(view.state.instances.items()) if name not in busy)
    decided = (
        _refused(view, free),
        _moved(upkeep, view, free, now, rules),
        _placed(upkeep, view, free, now, rules),
        _expired(view, wall),
    )
    return next((event for found in decided for event in found), None)


def placement_of(
    upkeep: Upkeep, view: ClusterView, instance: Instance, now: float, rules: Rules
) -> InstanceAssigned | None:
    """The assignment of an instance to the best node that isn't barred; None where none fits."""
    barred = tuple(sorted(node for node, until in upkeep.barred.get(instance.instance_id, {}).items() if until > now))
    request = msgspec.structs.replace(instance.request, excluded_nodes=(*instance.request.excluded_nodes, *barred))
    decision = place(view, request, now, default_parallel=rules.default_parallel)
    if decision.outcome != "placed":
        return None
    assignment = assign(decision, instance.instance_id, instance.last_epoch + 1)
    return InstanceAssigned(instance_id=instance.instance_id, assignment=assignment)


def _refused(view: ClusterView, instances: tuple[Instance, ...]) -> Iterator[Event]:
    for instance in instances:
        status = runner_of(view, instance)
        if status is None or status.phase != "refused":
            continue
        reason = "refused" if status.error is None else status.error.detail
        yield InstanceUnassigned(instance_id=instance.instance_id, reason=reason)


def _moved(
    upkeep: Upkeep, view: ClusterView, instances: tuple[Instance, ...], now: float, rules: Rules
) -> Iterator[Event]:
    if now < upkeep.settles_at:
        return
    for instance in instances:
        if instance.assignment is None:
            continue
        since = upkeep.missing.get(instance.assignment.node_id)
        if since is None or now - since < rules.replace_after_s:
            continue
        moved = placement_of(upkeep, view, instance, now, rules)
        if moved is not None:
            reason = f"node {instance.assignment.node_id} has been silent for {now - since:.0f} s"
            yield msgspec.structs.replace(moved, reason=reason)


def _placed(
    upkeep: Upkeep, view: ClusterView, instances: tuple[Instance, ...], now: float, rules: Rules
) -> Iterator[Event]:
    for instance in instances:
        if instance.assignment is None:
            placed = placement_of(upkeep, view, instance, now, rules)
            if placed is not None:
                yield placed


def _expired(view: ClusterView, wall: float) -> Iterator[Event]:
    old = tuple(sorted(name for name, found in view.state.tombstones.items() if wall - found.deleted_at > TOMBSTONE_S))
    if old:
        yield TombstonesExpired(instance_ids=old)
