"""A placement decision as ``GET /instance/previews`` tells it: one preview per outcome, and our reports beside it."""

from __future__ import annotations

from typing import Any

import msgspec

from skulk.gateway.compat.instances import shape_json
from skulk.ids import runner_id
from skulk.wire.placement import NodeReport, PlacementDecision, PlacementRequest


def previews_json(request: PlacementRequest, decision: PlacementDecision, instance_id: str) -> dict[str, Any]:
    """The answer; ``instance_id``: the one that a proposed instance would get when it is sent back."""
    return {
        "previews": [preview_json(request, decision, instance_id)],
        "decision": decision_json(decision),
    }


def decision_json(decision: PlacementDecision) -> dict[str, Any]:
    """A decision with its reports, in our own words."""
    return {
        "outcome": decision.outcome,
        "reason": decision.reason,
        "nodes": list(decision.nodes),
        "warnings": list(decision.warnings),
        "reports": [msgspec.to_builtins(report) for report in decision.reports],
    }


def preview_json(request: PlacementRequest, decision: PlacementDecision, instance_id: str) -> dict[str, Any]:
    """One preview; ``instance`` is null where ``error`` says why."""
    chosen = chosen_report(decision)
    return {
        "model_id": request.card.model_id,
        "sharding": request.sharding,
        "instance_meta": request.instance_meta,
        "instance": None if chosen is None else proposed_json(request, chosen, instance_id),
        "memory_delta_by_node": None
        if chosen is None or chosen.memory is None
        else {chosen.node_id: chosen.memory.need_bytes},
        "error": decision.reason if chosen is None else None,
    }


def chosen_report(decision: PlacementDecision) -> NodeReport | None:
    """The report on the chosen node; None where none was chosen."""
    return decision.report_of(decision.nodes[0]) if decision.outcome == "placed" and decision.nodes else None


def proposed_json(request: PlacementRequest, chosen: NodeReport, instance_id: str) -> dict[str, Any]:
    """The instance that the decision would make."""
    return shape_json(
        instance_id,
        request.card,
        node_id=chosen.node_id,
        runner_id=runner_id(instance_id, 1),
        backend=chosen.backend or "",
        context_length=chosen.context_length,
    )
