"""``GET /v1/diagnostics/…``: what each node says of itself in its beats; and the log as a timeline."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from skulk.cluster.view import ClusterView
from skulk.gateway.compat.instances import runner_json
from skulk.gateway.compat.times import iso_time
from skulk.wire.events import (
    Event,
    EventRecord,
    InstanceAssigned,
    InstanceCreated,
    InstanceDeleted,
    InstanceKept,
    InstanceUnassigned,
    NodeDrainEnded,
    NodeDrainStarted,
    TermBegan,
    TombstonesExpired,
)


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


def timeline_json(records: Iterable[EventRecord], local_node_id: str) -> dict[str, Any]:
    """The log as clients show it: when, what kind, which instance, model and node, and why."""
    return {"localNodeId": local_node_id, "events": [_entry(record) for record in records]}


def _entry(record: EventRecord) -> dict[str, Any]:
    about = _about(record.event, record.position.term.node_id)
    return {
        "seq": record.position.seq,
        "term": record.position.term.number,
        "at": iso_time(record.at),
        "kind": record.event.__struct_config__.tag,
        "instanceId": about.instance_id or None,
        "modelId": about.model_id or None,
        "nodeId": about.node_id or None,
        "reason": about.reason or None,
    }


class _About(NamedTuple):
    instance_id: str = ""
    model_id: str = ""
    node_id: str = ""
    reason: str = ""


def _about(event: Event, master: str) -> _About:
    match event:
        case TermBegan():
            return _About(node_id=master)
        case InstanceCreated(instance=made):
            return _About(made.instance_id, made.model_id, reason=made.reason)
        case InstanceAssigned(instance_id=instance_id, assignment=assigned, reason=reason):
            return _About(instance_id, node_id=assigned.node_id, reason=reason)
        case InstanceUnassigned(instance_id=instance_id, reason=reason):
            return _About(instance_id, reason=reason)
        case InstanceKept(instance_id=instance_id) | InstanceDeleted(instance_id=instance_id):
            return _About(instance_id)
        case NodeDrainStarted(drain=drain):
            return _About(node_id=drain.node_id, reason=drain.reason)
        case NodeDrainEnded(node_id=node_id):
            return _About(node_id=node_id)
        case TombstonesExpired():
            return _About()
