"""``GET /v1/diagnostics/…`` from the view: what each node says of itself in its beats."""

from __future__ import annotations

from typing import Any

from skulk.cluster.view import ClusterView
from skulk.gateway.compat.instances import runner_json


def node_json(view: ClusterView, node_id: str, version: str) -> dict[str, Any]:
    """One node's diagnosis."""
    node = view.nodes.get(node_id)
    return {
        "runtime": {
            "nodeId": node_id,
            "masterNodeId": None if view.master is None else view.master.node_id,
            "skulkVersion": version if node is None else node.beat.version,
        },
        "supervisorRunners": [
            {
                "runnerId": status.runner_id,
                "statusKind": next(iter(runner_json(status))),
                "modelId": status.model_id,
                "phase": status.phase,
                "restarts": status.restarts,
                "active": status.active,
                "waiting": status.waiting,
                "error": None if status.error is None else status.error.detail,
            }
            for status in sorted(view.runners.values(), key=lambda status: status.runner_id)
            if status.node_id == node_id
        ],
    }


def cluster_json(view: ClusterView, local_node_id: str, version: str) -> dict[str, Any]:
    """Every live node's diagnosis."""
    return {
        "localNodeId": local_node_id,
        "nodes": [
            {
                "nodeId": node_id,
                "ok": not any(warning.level == "error" for warning in node.beat.warnings),
                "url": None if node.beat.api is None else f"http://{node.beat.api}",
                "diagnostics": node_json(view, node_id, version),
            }
            for node_id, node in sorted(view.nodes.items())
        ],
    }
