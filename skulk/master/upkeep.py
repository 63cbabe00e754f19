"""What a master does by itself: pure, from the view to the events to append.

1. An assignment that its node refused         becomes pending; that node is barred for a while, longer each time.
2. An assignment to a node that is drained     moves where another node fits, else becomes pending.
3. An assignment whose node is lost, or came   moves where another node fits: after `replace_after_s` of silence; as
   back as another version of the contract     soon as the node is lost, where a request waits for the model; never
                                               before `MINORITY_WAIT_S` on a side with fewer than half of the known
                                               full nodes.
4. A pending instance                          is assigned when a node fits; told why it is nowhere, where nobody did.
5. A drain of a node that was being stopped    ends when the node is back.
6. A tombstone older than 30 days              is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Final

import msgspec

from skulk.cluster.liveness import NODE_CLOSED_S, NODE_LOST_S
from skulk.cluster.merge import TOMBSTONE_S
from skulk.cluster.view import ClusterView, drain_of, peers_of, runner_of
from skulk.placement.decision import assign, place
from skulk.wire.events import Event, InstanceAssigned, InstanceUnassigned, NodeDrainEnded, TombstonesExpired
from skulk.wire.placement import PlacementDecision
from skulk.wire.state import ClusterState, Instance

BARRED_S: Final = 60.0
BARRED_MOST_S: Final = 960.0
MINORITY_WAIT_S: Final = 120.0


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What the master was told.

    Attributes:
        replace_after_s: how long a silent node keeps its instances, seconds.
        default_parallel: sequences side by side where a request doesn't say.
        idle_ttl_s: how long a model that was placed on demand may be idle, seconds.
    """

    replace_after_s: float = 15.0
    default_parallel: int = 16
    idle_ttl_s: float = 600.0


class Barred(msgspec.Struct, frozen=True):
    """A node that refused an instance ``times`` times and isn't asked again before ``until``."""

    until: float
    times: int


class Placements(msgspec.Struct, frozen=True, kw_only=True):
    """A state's instances by where they are: made once a state, for a state stays through most looks.

    Attributes:
        pending: those that are on no node, by id.
        on_node: the others, by node.
    """

    state: ClusterState
    pending: tuple[Instance, ...] = ()
    on_node: Mapping[str, tuple[Instance, ...]] = {}


def placements_of(state: ClusterState, known: Placements | None = None) -> Placements:
    """Those of a state; ``known`` again where they are of this very state. Cost: else O(instances)."""
    if known is not None and known.state is state:
        return known
    pending: list[Instance] = []
    on_node: dict[str, list[Instance]] = {}
    for instance in state.instances.values():
        if instance.assignment is None:
            pending.append(instance)
        else:
            on_node.setdefault(instance.assignment.node_id, []).append(instance)
    return Placements(
        state=state,
        pending=_in_order(pending),
        on_node={name: tuple(found) for name, found in on_node.items()},
    )


def _in_order(instances: Iterable[Instance]) -> tuple[Instance, ...]:
    return tuple(sorted(instances, key=lambda instance: instance.instance_id))


class Upkeep(msgspec.Struct, frozen=True, kw_only=True):
    """What the master remembers between looks; monotonic seconds.

    Attributes:
        placements: of the state at the last look.
        barred: by instance, the nodes that refused it.
        missing: by node, since when an assignment's node has been silent, or of another version of the bus contract.
        heard: the nodes that this master has heard itself; others' silence begins with its first look.
        waited: models that requests wait for.
        settles_at: until then nothing moves: a new master hasn't heard everybody yet.
    """

    placements: Placements | None = None
    barred: Mapping[str, Mapping[str, Barred]] = {}
    missing: Mapping[str, float] = {}
    heard: frozenset[str] = frozenset()
    waited: frozenset[str] = frozenset()
    settles_at: float = 0.0


def with_missing(upkeep: Upkeep, view: ClusterView, now: float) -> Upkeep:
    """The memory after a look at who is there. Cost: O(nodes), and O(instances) where the state has changed."""
    placements, peers = placements_of(view.state, upkeep.placements), peers_of(view)
    missing = {
        node: upkeep.missing.get(node, _silent_from(view, node, now) if node in upkeep.heard else now)
        for node in sorted(placements.on_node.keys() - peers)
    }
    heard = upkeep.heard if upkeep.heard >= peers else upkeep.heard | peers
    return msgspec.structs.replace(upkeep, placements=placements, missing=missing, heard=heard)


def _silent_from(view: ClusterView, node: str, now: float) -> float:
    """When a node that has just been lost was heard last: not before its silence began to count.

    One that is here and speaks another version of the bus contract was there until now.
    """
    return now if node in view.nodes else max(view.known.get(node, 0.0), now - NODE_LOST_S)


def with_barred(upkeep: Upkeep, instance_id: str, node_id: str, now: float) -> Upkeep:
    """The memory after a node refused an instance: it is asked again after 60 s, then 120 s, at most 16 minutes."""
    known = upkeep.barred.get(instance_id, {})
    before = known.get(node_id)
    if before is not None and before.until > now:
        return upkeep
    times = 1 if before is None else before.times + 1
    barred = Barred(now + min(BARRED_S * 2 ** (times - 1), BARRED_MOST_S), times)
    return msgspec.structs.replace(upkeep, barred={**upkeep.barred, instance_id: {**known, node_id: barred}})


def without_expired(upkeep: Upkeep, view: ClusterView, now: float) -> Upkeep:
    """The memory without what no longer matters; refusals are counted on for 16 minutes after their time."""
    barred = {
        instance_id: kept
        for instance_id, nodes in upkeep.barred.items()
        if instance_id in view.state.instances
        and (kept := {name: found for name, found in nodes.items() if found.until + BARRED_MOST_S > now})
    }
    return msgspec.structs.replace(upkeep, barred=barred)


def is_minority(view: ClusterView) -> bool:
    """Whether fewer than half of the nodes that run models, as far as they are known, are here."""
    known = set(view.known)
    known |= {found.assignment.node_id for found in view.state.instances.values() if found.assignment is not None}
    peers = peers_of(view)
    here = sum(1 for name in peers if view.nodes[name].beat.role == "full")
    # one that is here and speaks another version of the bus contract is on no side
    return 2 * here < len(known - (view.nodes.keys() - peers))


def refused_by(view: ClusterView) -> tuple[Instance, ...]:
    """The instances whose present assignment was refused by its node, by id. Cost: O(runners)."""
    refused = (
        view.state.instances.get(status.instance_id) for status in view.runners.values() if status.phase == "refused"
    )
    found = {instance.instance_id: instance for instance in refused if instance is not None}
    statuses = ((instance, runner_of(view, instance)) for instance in found.values())
    return _in_order(instance for instance, status in statuses if status is not None and status.phase == "refused")


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
    placements = placements_of(view.state, upkeep.placements)

    def free(instances: Iterable[Instance]) -> Iterator[Instance]:
        return (found for found in instances if found.instance_id not in busy)

    def on(nodes: Iterable[str]) -> Iterator[Instance]:
        return free(_in_order(found for node in nodes for found in placements.on_node.get(node, ())))

    drained = [name for name in view.state.drains if drain_of(view, name) is not None]
    decided = (
        _refused(view, free(refused_by(view))),
        _drained(upkeep, view, on(drained), now, rules),
        _moved(upkeep, view, on(upkeep.missing), now, rules),
        _placed(upkeep, view, free(placements.pending), now, rules),
        _returned(view),
        _expired(view, wall),
    )
    return next((event for found in decided for event in found), None)


def decision_on(upkeep: Upkeep, view: ClusterView, instance: Instance, now: float, rules: Rules) -> PlacementDecision:
    """Where an instance should go, of the nodes that aren't barred."""
    refusals = upkeep.barred.get(instance.instance_id, {})
    barred = tuple(sorted(node for node, found in refusals.items() if found.until > now))
    request = msgspec.structs.replace(instance.request, excluded_nodes=(*instance.request.excluded_nodes, *barred))
    return place(view, request, now, default_parallel=rules.default_parallel)


def placement_of(
    upkeep: Upkeep, view: ClusterView, instance: Instance, now: float, rules: Rules
) -> InstanceAssigned | None:
    """The assignment of an instance to the best node that isn't barred; None where none fits."""
    return assigned_by(decision_on(upkeep, view, instance, now, rules), instance)


def assigned_by(decision: PlacementDecision, instance: Instance) -> InstanceAssigned | None:
    """The event that a decision stands for; None where it places nothing."""
    if decision.outcome != "placed":
        return None
    assignment = assign(decision, instance.instance_id, instance.last_epoch + 1)
    return InstanceAssigned(instance_id=instance.instance_id, assignment=assignment)


def _refused(view: ClusterView, instances: Iterable[Instance]) -> Iterator[Event]:
    for instance in instances:
        status = runner_of(view, instance)
        reason = "refused" if status is None or status.error is None else status.error.detail
        yield InstanceUnassigned(instance_id=instance.instance_id, reason=reason)


def _drained(
    upkeep: Upkeep, view: ClusterView, instances: Iterable[Instance], now: float, rules: Rules
) -> Iterator[Event]:
    for instance in instances:
        if instance.assignment is None or (drain := drain_of(view, instance.assignment.node_id)) is None:
            continue
        reason = f"node {instance.assignment.node_id} is drained" + (f": {drain.reason}" if drain.reason else "")
        moved = placement_of(upkeep, view, instance, now, rules)
        if moved is not None:
            yield msgspec.structs.replace(moved, reason=reason)
        else:
            yield InstanceUnassigned(instance_id=instance.instance_id, reason=f"{reason}; no other node fits")


def _moved(
    upkeep: Upkeep, view: ClusterView, instances: Iterable[Instance], now: float, rules: Rules
) -> Iterator[Event]:
    if now < upkeep.settles_at or not upkeep.missing:
        return
    patience_s = max(rules.replace_after_s, MINORITY_WAIT_S) if is_minority(view) else rules.replace_after_s
    for instance in instances:
        if instance.assignment is None:
            continue
        since = upkeep.missing.get(instance.assignment.node_id)
        if since is None:
            continue
        is_waited = instance.model_id in upkeep.waited and patience_s == rules.replace_after_s
        lost_s = NODE_CLOSED_S if instance.assignment.node_id in upkeep.heard else NODE_LOST_S
        if now - since < (min(lost_s, patience_s) if is_waited else patience_s):
            continue
        moved = placement_of(upkeep, view, instance, now, rules)
        if moved is not None:
            reason = _why_missing(view, instance.assignment.node_id, now - since)
            yield msgspec.structs.replace(moved, reason=reason)


def _why_missing(view: ClusterView, node_id: str, silent_s: float) -> str:
    node = view.nodes.get(node_id)
    if node is None:
        return f"node {node_id} has been silent for {silent_s:.0f} s"
    return f"node {node_id} speaks version {node.beat.protocol} of the bus contract by now"


def _placed(
    upkeep: Upkeep, view: ClusterView, instances: Iterable[Instance], now: float, rules: Rules
) -> Iterator[Event]:
    for instance in instances:
        decision = decision_on(upkeep, view, instance, now, rules)
        placed = assigned_by(decision, instance)
        if placed is not None:
            yield placed
        elif not instance.reason and decision.outcome == "unplaceable":
            # whoever made it died before it could say why it is on no node
            yield InstanceUnassigned(instance_id=instance.instance_id, reason=decision.reason)


def _returned(view: ClusterView) -> Iterator[Event]:
    for name, drain in sorted(view.state.drains.items()):
        if drain.active and drain.incarnation and name in view.nodes and drain_of(view, name) is None:
            yield NodeDrainEnded(node_id=name)


def _expired(view: ClusterView, wall: float) -> Iterator[Event]:
    old = tuple(sorted(name for name, found in view.state.tombstones.items() if wall - found.deleted_at > TOMBSTONE_S))
    if old:
        yield TombstonesExpired(instance_ids=old)
