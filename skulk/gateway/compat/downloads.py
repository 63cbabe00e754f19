"""Downloads in the clients' words: tagged in ``/state``, as a status, and as the registry of what lies on disks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from skulk.cluster.view import ClusterView
from skulk.gateway.compat.instances import shard_json
from skulk.gateway.compat.times import iso_time
from skulk.wire.model import ModelCard
from skulk.wire.store import DownloadStatus

_STATUS: Final = {
    "waiting": "queued",
    "fetching": "downloading",
    "verifying": "verifying",
    "done": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}


def download_json(status: DownloadStatus, cards: Mapping[str, ModelCard]) -> dict[str, Any]:
    """A download as ``/state`` has it: one tag, and what belongs to it."""
    body: dict[str, Any] = {"shardMetadata": model_shard_json(status.model_id, cards)}
    match status.phase:
        case "waiting":
            return {"DownloadPending": body}
        case "fetching" | "verifying":
            return {"DownloadOngoing": {**body, "downloadProgress": progress_json(status)}}
        case "failed" | "cancelled":
            reason = "no reason is known" if status.error is None else status.error.detail
            return {"DownloadFailed": {**body, "errorMessage": reason}}
        case "done":
            return {"DownloadCompleted": {**body, "total": {"inBytes": status.total_bytes}}}


def model_shard_json(model_id: str, cards: Mapping[str, ModelCard]) -> dict[str, Any]:
    """A whole model as a shard; of a model that this node doesn't know, its id alone."""
    card = cards.get(model_id)
    if card is not None:
        return shard_json(card, "")
    return {"PipelineShardMetadata": {"modelCard": {"modelId": model_id}, "deviceRank": 0, "worldSize": 1}}


def progress_json(status: DownloadStatus) -> dict[str, Any]:
    """How far it is; ``etaMs`` 0 where nobody knows."""
    return {
        "total": {"inBytes": status.total_bytes},
        "downloaded": {"inBytes": status.done_bytes},
        "speed": status.speed,
        "etaMs": 0 if status.eta_s is None else int(status.eta_s * 1000),
        "phase": status.phase,
        "sources": list(status.sources),
    }


def status_json(status: DownloadStatus, node_id: str) -> dict[str, Any]:
    """A download's status, with its numbers and the reason of a failure."""
    return {
        "status": _STATUS[status.phase],
        "model_id": status.model_id,
        "node_id": node_id,
        "downloaded_bytes": status.done_bytes,
        "total_bytes": status.total_bytes,
        "speed": status.speed,
        "eta_s": status.eta_s,
        "sources": list(status.sources),
        "error": None if status.error is None else {"code": status.error.code, "message": status.error.detail},
    }


def registry_json(view: ClusterView) -> list[dict[str, Any]]:
    """What lies on disks, each model once, with the nodes that have it."""
    found: dict[str, dict[str, Any]] = {}
    for node_id, node in sorted(view.nodes.items()):
        for held in node.beat.models:
            entry = found.setdefault(
                held.model_id,
                {
                    "model_id": held.model_id,
                    "total_bytes": held.size_bytes,
                    "downloaded_at": _time(held.added_at),
                    "nodes": [],
                },
            )
            entry["nodes"].append(node_id)
    return [found[model_id] for model_id in sorted(found)]


def _time(at: float) -> str | None:
    return iso_time(at) if at > 0 else None
