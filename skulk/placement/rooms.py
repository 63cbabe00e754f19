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
    known = {status.runner_id: status for status in statuses}
    promised = {name: need for name, need in assigned.items() if name not in known}
    for name, status in known.items():
        wanted = assigned.get(name, 0) if status.phase != "refused" else 0
        held = 0 if status.phase in _GONE else status.reserved_bytes
        promised[name] = max(wanted, held)
    return sum(max(0, need - measured.get(name, 0)) for name, need in promised.items())


def room(view: ClusterView, node_id: str) -> int:
    """Bytes that one more instance may take on a node now; 0 for an unknown node. Cost: that of `rooms`."""
    return rooms(view).get(node_id, 0)


def rooms(view: ClusterView) -> dict[str, int]:
    """`room` of every node. Cost: O(nodes + instances): a placement looks at all of both once, not for each node."""
    assigned: dict[str, dict[str, int]] = {}
    for instance in view.state.instances.values():
        if (found := instance.assignment) is not None:
            assigned.setdefault(found.node_id, {})[found.runner_id] = found.memory.need_bytes
    newest: dict[str, dict[str, RunnerStatus]] = {
        node_id: {status.runner_id: status for status in node.beat.runners} for node_id, node in view.nodes.items()
    }
    for name, status in view.runners.items():
        if status.node_id in newest:
            newest[status.node_id][name] = status
    return {node_id: _room(node, newest[node_id], assigned.get(node_id, {})) for node_id, node in view.nodes.items()}


def _room(node: NodeView, newest: Mapping[str, RunnerStatus], assigned: Mapping[str, int]) -> int:
    measured = {status.runner_id: status.memory_bytes for status in node.beat.runners}
    return max(0, node.beat.memory.usable_bytes - reserved_bytes(newest.values(), assigned, measured))
