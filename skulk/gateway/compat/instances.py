"""Instances and runners in the clients' words. The tags are the old system's, for every engine."""

from __future__ import annotations

from typing import Any, Final, assert_never

from skulk.cluster.view import ClusterView, phase_of, runner_of
from skulk.gateway.compat.cards import card_json
from skulk.wire.beats import RunnerPhase, RunnerStatus
from skulk.wire.model import ModelCard
from skulk.wire.state import Instance

INSTANCE_TAG: Final = "MlxRingInstance"
SHARD_TAG: Final = "PipelineShardMetadata"


def instance_json(view: ClusterView, instance: Instance) -> dict[str, Any]:
    """An instance, tagged; ``phase``, ``reason`` and what follows them are ours."""
    assigned = instance.assignment
    body = shape_json(
        instance.instance_id,
        instance.request.card,
        node_id=None if assigned is None else assigned.node_id,
        runner_id="" if assigned is None else assigned.runner_id,
        backend="" if assigned is None else assigned.backend,
        context_length=0 if assigned is None else assigned.context_length,
    )
    status = runner_of(view, instance)
    body[INSTANCE_TAG] |= {
        "phase": phase_of(view, instance),
        "reason": instance.reason,
        "createdAt": instance.created_at,
        "nParallel": 0 if assigned is None else assigned.n_parallel,
        "kvCells": 0 if assigned is None else assigned.kv_cells,
        "reservedBytes": 0 if assigned is None else assigned.memory.need_bytes,
        "loadedContextLength": 0 if status is None else status.n_ctx,
    }
    return body


def shape_json(
    instance_id: str,
    card: ModelCard,
    *,
    node_id: str | None,
    runner_id: str,
    backend: str,
    context_length: int,
) -> dict[str, Any]:
    """The part that clients know, also of an instance that is only proposed."""
    runners: dict[str, Any] = {}
    if node_id is not None:
        runners[runner_id] = shard_json(card, backend)
    return {
        INSTANCE_TAG: {
            "instanceId": instance_id,
            "shardAssignments": {
                "modelId": card.model_id,
                "nodeToRunner": {} if node_id is None else {node_id: runner_id},
                "runnerToShard": runners,
            },
            "contextTokenLimit": context_length,
        }
    }


def shard_json(card: ModelCard, backend: str) -> dict[str, Any]:
    """A whole model as the one shard of a pipeline of one."""
    return {
        SHARD_TAG: {
            "modelCard": card_json(card),
            "deviceRank": 0,
            "worldSize": 1,
            "startLayer": 0,
            "endLayer": card.layers,
            "nLayers": card.layers,
            "resolvedBackend": backend,
        }
    }


def runner_json(status: RunnerStatus | None) -> dict[str, Any]:
    """A runner's state, tagged; one that nobody has spoken of yet is idle."""
    if status is None:
        return {"RunnerIdle": {}}
    tag = _tag(status.phase, is_busy=status.active + status.waiting > 0)
    body: dict[str, Any] = {"progress": status.progress} if tag == "RunnerLoading" else {}
    if status.loaded_bytes and tag in ("RunnerReady", "RunnerRunning"):
        body["memory"] = _memory_json(status)
    if tag == "RunnerFailed":
        body["errorMessage"] = "no reason is known" if status.error is None else status.error.detail
    return {tag: body}


def _memory_json(status: RunnerStatus) -> dict[str, Any]:
    """What it took after its load, against the estimate; the ratio is null where nothing was estimated."""
    expected, loaded = status.expected_bytes, status.loaded_bytes
    return {
        "expectedBytes": expected,
        "loadedBytes": loaded,
        "ratio": round(loaded / expected, 3) if expected else None,
    }


def _tag(phase: RunnerPhase, *, is_busy: bool) -> str:
    match phase:
        case "accepted" | "starting":
            return "RunnerIdle"
        case "loading":
            return "RunnerLoading"
        case "warming":
            return "RunnerWarmingUp"
        case "ready":
            return "RunnerRunning" if is_busy else "RunnerReady"
        case "draining" | "stopped":
            return "RunnerShutdown"
        case "failed" | "refused":
            return "RunnerFailed"
        case _:
            assert_never(phase)


def instance_of_json(body: dict[str, Any]) -> tuple[str, str, str] | None:
    """Instance id, model id and node id of an instance that a client sends back; None where it isn't of that shape."""
    for tag in ("MlxRingInstance", "MlxJacclInstance"):
        match body.get(tag):
            case {
                "instanceId": str(instance_id),
                "shardAssignments": {"modelId": str(model_id), "nodeToRunner": {**nodes}},
            } if len(nodes) == 1:
                return instance_id, model_id, next(iter(nodes))
            case _:
                pass
    return None
