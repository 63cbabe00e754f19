"""The ledger of memory: what a node has left when all that was promised is counted, for master and node alike.

    room(pool) = usable - sum over what is promised there of max(0, reserved - measured)

    pool     of                                            usable
    main     the node's best backend: a GPU's memory,      `MemoryFacts.usable_bytes`
             unified memory, or main memory
    cpu      ``-cpu`` backends beside a discrete GPU       `MemoryFacts.cpu_usable_bytes`; None: they share the other

``usable`` is the node's own figure and already lacks what its runners were measured to take when it was written. So
``measured`` must come from the same beat: a newer status could tell of memory that the older ``usable`` still counts as
free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from skulk.cluster.view import ClusterView
from skulk.wire.beats import MemoryFacts, RunnerPhase, RunnerStatus
from skulk.wire.state import Assignment

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
        promised += _unseen(status, assigned.get(name, 0), measured.get(name, 0))
    for name, need in assigned.items():
        if name not in told:
            promised += max(0, need - measured.get(name, 0))
    return promised


def _unseen(status: RunnerStatus, wanted: int, measured: int) -> int:
    """What one runner may still take beyond what was measured; ``wanted``: its need by the state, or 0."""
    phase = status.phase
    if phase == "refused":
        return 0
    if phase not in _GONE and status.reserved_bytes > wanted:
        wanted = status.reserved_bytes
    return wanted - measured if wanted > measured else 0


class Rooms(NamedTuple):
    """Bytes that are left on each node, by pool; only nodes that have two stand in ``cpu``."""

    main: dict[str, int]
    cpu: dict[str, int]

    def of(self, node_id: str, backend: str) -> int:
        """What one more instance on this backend may take there; 0 for an unknown node."""
        if node_id in self.cpu and is_on_cpu(backend):
            return self.cpu[node_id]
        return self.main.get(node_id, 0)


def is_on_cpu(backend: str) -> bool:
    """Whether a resolved backend computes on the processor, in main memory."""
    return backend.endswith("-cpu")


def usable_by(memory: MemoryFacts, backend: str) -> int:
    """What a backend may take of its pool, before reservations, in bytes."""
    own = memory.cpu_usable_bytes
    return memory.usable_bytes if own is None or not is_on_cpu(backend) else own


def room(view: ClusterView, node_id: str, backend: str = "") -> int:
    """Bytes that one more instance may take on a node now; 0 for an unknown node. Cost: that of `rooms`."""
    return rooms(view).of(node_id, backend)


def rooms(view: ClusterView) -> Rooms:
    """What is left on every node. Cost: O(nodes + instances + runners), in one pass: each placement asks for all."""
    wanted = {
        found.runner_id: found
        for instance in view.state.instances.values()
        if (found := instance.assignment) is not None
    }
    ledger = _Ledger(view, wanted)
    newest = view.runners
    placed = ledger.placed
    seen = 0
    for node_id, node in view.nodes.items():
        for status in node.beat.runners:
            name, measured = status.runner_id, status.memory_bytes
            latest = newest.get(name)
            if latest is None or latest.node_id != node_id:  # one name may live on two nodes for a while
                latest = status
            else:
                seen += 1
            found = wanted.get(name)
            if found is not None and found.node_id == node_id and found.memory.need_bytes <= measured:
                placed.add(name)
                if latest.reserved_bytes <= measured:
                    continue  # all of it is seen, as of most
            ledger.add(node_id, latest, measured)
    if seen < len(newest):
        ledger.add_new()
    if len(ledger.placed) < len(wanted):
        ledger.add_unheard()
    return ledger.rooms()


class _Ledger:
    """What is promised on each node; gone when `rooms` returns. ``placed``: wanted runners that have been counted."""

    def __init__(self, view: ClusterView, wanted: Mapping[str, Assignment]) -> None:
        self.placed: Final[set[str]] = set()
        self._view = view
        self._wanted = wanted
        self._promised = dict.fromkeys(view.nodes, 0)
        self._on_cpu = {name: 0 for name, node in view.nodes.items() if node.beat.memory.cpu_usable_bytes is not None}

    def add(self, node_id: str, status: RunnerStatus, measured: int) -> None:
        """A runner by its newest status; ``measured``: by the beat that ``usable`` is from."""
        found = self._wanted.get(status.runner_id)
        need = 0
        if found is not None and found.node_id == node_id:
            self.placed.add(status.runner_id)
            need = found.memory.need_bytes
        unseen = _unseen(status, need, measured)
        if unseen:
            self._count(node_id, status.backend if found is None else found.backend, unseen)

    def add_new(self) -> None:
        """Runners that have spoken since their node's beat."""
        told = {(name, status.runner_id) for name, node in self._view.nodes.items() for status in node.beat.runners}
        for status in self._view.runners.values():
            if status.node_id in self._promised and (status.node_id, status.runner_id) not in told:
                self.add(status.node_id, status, 0)

    def add_unheard(self) -> None:
        """Wanted runners that nobody has heard of yet."""
        for name, found in self._wanted.items():
            if name not in self.placed and found.node_id in self._promised:
                self._count(found.node_id, found.backend, found.memory.need_bytes)

    def rooms(self) -> Rooms:
        """What is left."""
        nodes, promised = self._view.nodes, self._promised
        return Rooms(
            {name: max(0, node.beat.memory.usable_bytes - promised[name]) for name, node in nodes.items()},
            {
                name: max(0, (nodes[name].beat.memory.cpu_usable_bytes or 0) - taken)
                for name, taken in self._on_cpu.items()
            },
        )

    def _count(self, node_id: str, backend: str, promised: int) -> None:
        if node_id in self._on_cpu and is_on_cpu(backend):
            self._on_cpu[node_id] += promised
        else:
            self._promised[node_id] += promised
