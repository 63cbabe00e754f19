"""``GET /state``: the whole cluster in one object, camelCase, as existing clients poll it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from skulk.cluster.view import ClusterView, NodeView, drain_of
from skulk.gateway.compat.downloads import download_json, model_shard_json
from skulk.gateway.compat.health import seen_reasons
from skulk.gateway.compat.instances import instance_json, runner_json
from skulk.gateway.compat.times import iso_time
from skulk.wire.beats import Accelerator, HealthReason, NodeBeat, RunnerStatus
from skulk.wire.model import HeldModel, ModelCard


def state_json(view: ClusterView, cards: Mapping[str, ModelCard], now: float, wall: float) -> dict[str, Any]:
    """The view as ``/state``.

    Args:
        view: what is known now.
        cards: of models that lie on disks, by model id.
        now: of the clock that the view's ``heard_at`` is of.
        wall: the same moment in seconds since the epoch.
    """
    beats = {name: node.beat for name, node in sorted(view.nodes.items())}
    position = view.state.position
    assigned = [
        instance.assignment.runner_id for instance in view.state.instances.values() if instance.assignment is not None
    ]
    return {
        "instances": {name: instance_json(view, instance) for name, instance in view.state.instances.items()},
        "runners": {runner: runner_json(view.runners.get(runner)) for runner in assigned},
        "downloads": {name: _downloads_json(beat, cards) for name, beat in beats.items()},
        "topology": {
            "nodes": list(beats),
            "connections": {
                name: {peer: [] for peer in sorted(beat.hears) if peer != name} for name, beat in beats.items()
            },
        },
        "nodeIdentities": {name: _identity_json(beat) for name, beat in beats.items()},
        "nodeMemory": {name: _memory_json(beat) for name, beat in beats.items()},
        "nodeSystem": {name: _system_json(beat) for name, beat in beats.items()},
        "nodeDisk": {name: _disk_json(beat) for name, beat in beats.items()},
        "nodeHealth": {name: _health_json(view, beat) for name, beat in beats.items()},
        "nodeBackends": {name: list(beat.tags) for name, beat in beats.items()},
        "lastSeen": {name: _seen_at(node, now, wall) for name, node in sorted(view.nodes.items())},
        "lastEventAppliedIdx": position.seq,
        "master": None if view.master is None else view.master.node_id,
        "term": position.term.number,
        "draining": sorted(name for name in view.state.drains if drain_of(view, name) is not None),
    }


def _identity_json(beat: NodeBeat) -> dict[str, Any]:
    return {
        "friendlyName": beat.name,
        "hostname": beat.system.hostname,
        "skulkVersion": beat.version,
        "skulkCommit": beat.commit,
        "osVersion": beat.system.os,
        "architecture": beat.system.architecture,
        "chipId": beat.system.chip,
        "role": beat.role,
        "api": beat.api,
    }


def _memory_json(beat: NodeBeat) -> dict[str, Any]:
    return {
        "ramTotal": {"inBytes": beat.memory.total_bytes},
        "ramAvailable": {"inBytes": beat.memory.available_bytes},
        "usable": {"inBytes": beat.memory.usable_bytes},
    }


def _system_json(beat: NodeBeat) -> dict[str, Any]:
    gpus = beat.system.accelerators
    return {
        "accelerator": _accelerator_json(gpus[0]) if gpus else None,
        "accelerators": [_accelerator_json(gpu) for gpu in gpus],
        "physicalCores": beat.system.physical_cores,
        "load": beat.load,
    }


def _accelerator_json(gpu: Accelerator) -> dict[str, Any]:
    return {
        "vendor": gpu.vendor,
        "name": gpu.name,
        "vramTotalBytes": gpu.vram_total_bytes,
        "vramUsedBytes": gpu.vram_used_bytes,
        "gttTotalBytes": gpu.gtt_total_bytes,
    }


def _disk_json(beat: NodeBeat) -> dict[str, Any]:
    return {"total": {"inBytes": beat.disk.total_bytes}, "available": {"inBytes": beat.disk.available_bytes}}


def _health_json(view: ClusterView, beat: NodeBeat) -> dict[str, Any]:
    reasons = (
        *beat.warnings,
        *seen_reasons(view, beat),
        *(_failure(runner) for runner in beat.runners if runner.phase == "failed"),
    )
    levels = {reason.level for reason in reasons}
    return {
        "level": "error" if "error" in levels else "warn" if levels else "ok",
        "reasons": [
            {"code": reason.code, "message": reason.message, "remediation": reason.remediation} for reason in reasons
        ],
    }


def _failure(runner: RunnerStatus) -> HealthReason:
    """A runner that is down, as its node's health tells it; the supervisor's sentence says what follows."""
    return HealthReason(
        level="error",
        code="runner_failed" if runner.error is None else runner.error.code,
        message=f"{runner.model_id}: {'the runner failed' if runner.error is None else runner.error.detail}",
        remediation=f"If it does not come back by itself: skulk rm {runner.instance_id}, then place the model again",
    )


def _downloads_json(beat: NodeBeat, cards: Mapping[str, ModelCard]) -> list[dict[str, Any]]:
    """What lies on a node's disk, and what is on its way there."""
    return [
        *(_held_json(held, cards) for held in beat.models),
        *(download_json(status, cards) for status in beat.downloads),
    ]


def _held_json(held: HeldModel, cards: Mapping[str, ModelCard]) -> dict[str, Any]:
    shard = model_shard_json(held.model_id, cards)
    return {"DownloadCompleted": {"shardMetadata": shard, "total": {"inBytes": held.size_bytes}}}


def _seen_at(node: NodeView, now: float, wall: float) -> str:
    return iso_time(wall - (now - node.heard_at))
