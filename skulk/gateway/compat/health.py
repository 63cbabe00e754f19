"""What others see of a node and its own beat can't tell: a drain, another version, nodes that don't hear each other."""

from __future__ import annotations

from skulk.cluster.view import ClusterView, drain_of
from skulk.wire.base import PROTOCOL
from skulk.wire.beats import HealthReason, NodeBeat

SETTLED_S = 5.0


def seen_reasons(view: ClusterView, beat: NodeBeat) -> tuple[HealthReason, ...]:
    """Reasons that follow from the view."""
    return (*_drained(view, beat), *_incompatible(beat), *_deaf(view, beat))


def _drained(view: ClusterView, beat: NodeBeat) -> tuple[HealthReason, ...]:
    drain = drain_of(view, beat.node_id)
    if drain is None:
        return ()
    why = f": {drain.reason}" if drain.reason else ""
    reason = HealthReason(
        level="warn",
        code="draining",
        message=f"It takes no new work{why}",
        remediation=f"skulk drain {beat.node_id} --undo lets it take work again",
    )
    return (reason,)


def _incompatible(beat: NodeBeat) -> tuple[HealthReason, ...]:
    if beat.protocol == PROTOCOL:
        return ()
    reason = HealthReason(
        level="error",
        code="incompatible",
        message=f"It speaks version {beat.protocol} of the bus contract, not {PROTOCOL}, and gets no placements",
        remediation="Bring all nodes to one version of Skulk",
    )
    return (reason,)


def _deaf(view: ClusterView, beat: NodeBeat) -> tuple[HealthReason, ...]:
    """Pairs of live nodes of which this one doesn't hear the other; a node that has just started hears nobody yet."""
    if beat.at - beat.started_at < SETTLED_S:
        return ()
    missing = sorted(
        other.beat.name or name
        for name, other in view.nodes.items()
        if name not in beat.hears and name != beat.node_id and other.beat.at - other.beat.started_at >= SETTLED_S
    )
    if not missing:
        return ()
    reason = HealthReason(
        level="warn",
        code="not_heard",
        message=f"It doesn't hear {', '.join(missing)}",
        remediation="Check the network between them: each must reach the other's route port",
    )
    return (reason,)
