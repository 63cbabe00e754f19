"""The ledger of memory: what a node has left when all that was promised is counted, for master and node alike.

    room = usable - sum over what is promised of max(0, reserved - measured)

``usable`` is the node's own figure and already lacks what its runners were measured to take when it was written. So
``measured`` must come from the same beat: a newer status could tell of memory that the older ``usable`` still counts as
free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from skulk.cluster.view import ClusterView, NodeView
from skulk.wire.beats import RunnerPhase, RunnerStatus

_GONE: frozenset[RunnerPhase] = frozenset({"refused", "stopped", "failed"})


def reserved_bytes(
    statuses: Iterable[RunnerStatus],
    assigned: Mapping[str, int],
    measured: Mapping[str, int],
) -> int:
    """What is promised on a node and not yet visible in its measured memory.

    Args:
        statuses: the newest status of each of the node's runners.
        assigned: need in bytes of each runner that the state wants on the node, by runner id.
        measured: memory in bytes of each runner at the moment ``usable`` was measured, by runner id.

    A wanted runner counts whole until it is measured, also before it is reported and while it is down between two
    starts; one that is no longer wanted counts until its process is gone. A refused one holds nothing.
    """
    promised = 0
    told: set[str] = set()
    for status in statuses:
        name = status.runner_id
        told.add(name)
        need = assigned.get(name, 0)
        if status.phase == "refused":
            need = 0
        elif status.phase not in _GONE and status.reserved_bytes > need:
            need = status.reserved_bytes
        unseen = need - measured.get(name, 0)
        if unseen > 0:
            promised += unseen
    for name, need in assigned.items():
        if name not in told:
            promised += max(0, need - measured.get(name, 0))
    return promised


def room(view: ClusterView, node_id: str) -> int:
    """Bytes that one more instance may take on a node now; 0 for an unknown node. Cost: that of `rooms`."""
    return rooms(view).get(node_id, 0)


def rooms(view: ClusterView) -> dict[str, int]:
    """`room` of every node. Cost: O(nodes + instances): a placement looks at all of both once, not for each node."""
    assigned: dict[str, dict[str, int]] = {}
    for instance in view.state.instances.values():
        if (found := instance.assignment) is not None:
            assigned.setdefault(found.node_id, {})[found.runner_id] = found.memory.need_bytes
    newest: dict[str, dict[str, RunnerStatus]] = {}
    for name, status in view.runners.items():
        newest.setdefault(status.node_id, {})[name] = status
    nothing: dict[str, int] = {}
    silent: dict[str, RunnerStatus] = {}
    return {
        node_id: _room(node, newest.get(node_id, silent), assigned.get(node_id, nothing))
        for node_id, node in view.nodes.items()
    }


def _room(node: NodeView, newest: Mapping[str, RunnerStatus], assigned: Mapping[str, int]) -> int:
    usable = node.beat.memory.usable_bytes
    told = node.beat.runners
    if not (told or newest or assigned):
        return max(0, usable)
    statuses = {status.runner_id: status for status in told}
    measured = {name: status.memory_bytes for name, status in statuses.items()}
    statuses.update(newest)
    return max(0, usable - reserved_bytes(statuses.values(), assigned, measured))
