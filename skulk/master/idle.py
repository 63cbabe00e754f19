"""Which models that were placed on demand may leave, and which have to for another one's room. Pure.

    asked for again, or a request waits for it     stays
    loading                                        stays: somebody began it
    ready, work in flight                          stays
    ready, idle                                    may leave: after the time to live, or for room
    failed, pending, not placed for so long        leaves after the time to live

The least recently used one leaves first. What a person placed, or asked for by ``ensure``, never leaves by itself.
"""

from __future__ import annotations

from collections.abc import Set

import msgspec

from skulk.cluster.view import ClusterView, phase_of, runner_of
from skulk.placement.decision import place
from skulk.placement.rooms import is_on_cpu
from skulk.wire.beats import MemoryFacts, RunnerStatus
from skulk.wire.placement import PlacementRequest
from skulk.wire.state import Instance


class Idle(msgspec.Struct, frozen=True, kw_only=True):
    """An instance that nobody uses, since ``idle_s`` seconds."""

    instance: Instance
    idle_s: float


def idle_instances(view: ClusterView, waited: Set[str], wall: float) -> tuple[Idle, ...]:
    """Those that nobody uses, the least recently used first. ``wall``: seconds since the epoch. O(instances)."""
    found: list[Idle] = []
    for instance in view.state.instances.values():
        if instance.on_demand and instance.model_id not in waited:
            idle_s = _idle_s(view, instance, wall)
            if idle_s > 0:
                found.append(Idle(instance=instance, idle_s=idle_s))
    return tuple(sorted(found, key=lambda one: (-one.idle_s, one.instance.instance_id)))


def _idle_s(view: ClusterView, instance: Instance, wall: float) -> float:
    status = runner_of(view, instance)
    match phase_of(view, instance):
        case "ready":
            assert status is not None
            return 0.0 if status.active or status.waiting else status.idle_s
        case "failed":
            assert status is not None
            return max(0.0, wall - status.since)
        case "pending":
            return max(0.0, wall - instance.created_at)
        case "placing" | "loading":
            return 0.0


def room_for(
    view: ClusterView, request: PlacementRequest, idle: tuple[Idle, ...], now: float, default_parallel: int
) -> tuple[Idle, ...]:
    """The fewest of the least recently used that must leave so that a request can be placed; empty: that helps nobody.

    O(idle x placement).
    """
    leaving: list[Idle] = []
    for one in idle:
        if runner_of(view, one.instance) is None:
            continue
        leaving.append(one)
        if _fits(_without(view, leaving), request, now, default_parallel):
            break
    else:
        return ()
    # those that went before and make no difference stay
    for one in tuple(leaving[:-1]):
        rest = [other for other in leaving if other is not one]
        if _fits(_without(view, rest), request, now, default_parallel):
            leaving = rest
    return tuple(leaving)


def _freed(memory: MemoryFacts, left: tuple[RunnerStatus, ...]) -> MemoryFacts:
    """Memory as it will be: of the pool that each one has held."""
    own = memory.cpu_usable_bytes
    freed = sum(status.memory_bytes for status in left)
    on_cpu = 0 if own is None else sum(status.memory_bytes for status in left if is_on_cpu(status.backend))
    return msgspec.structs.replace(
        memory,
        usable_bytes=min(max(memory.total_bytes, memory.usable_bytes), memory.usable_bytes + freed - on_cpu),
        cpu_usable_bytes=None if own is None else min(memory.total_bytes, own + on_cpu),
        available_bytes=min(memory.total_bytes, memory.available_bytes + freed),
    )


def _fits(view: ClusterView, request: PlacementRequest, now: float, default_parallel: int) -> bool:
    return place(view, request, now, default_parallel=default_parallel).outcome == "placed"


def _without(view: ClusterView, leaving: list[Idle]) -> ClusterView:
    """The view as it will be when these have left: their memory is free again."""
    nodes = dict(view.nodes)
    gone = {one.instance.instance_id for one in leaving}
    runners = {one.instance.assignment.runner_id for one in leaving if one.instance.assignment is not None}
    for name, node in view.nodes.items():
        left = tuple(status for status in node.beat.runners if status.runner_id in runners)
        if not left:
            continue
        memory = _freed(node.beat.memory, left)
        kept = tuple(status for status in node.beat.runners if status.runner_id not in runners)
        beat = msgspec.structs.replace(node.beat, runners=kept, memory=memory)
        nodes[name] = msgspec.structs.replace(node, beat=beat)
    instances = {name: found for name, found in view.state.instances.items() if name not in gone}
    return msgspec.structs.replace(
        view,
        state=msgspec.structs.replace(view.state, instances=instances),
        nodes=nodes,
        runners={name: status for name, status in view.runners.items() if name not in runners},
    )
