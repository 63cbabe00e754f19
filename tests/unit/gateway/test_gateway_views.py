"""What existing clients read, rendered from a fixed view: golden JSON."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from skulk.cluster.view import ClusterView, NodeView, with_node_beat
from skulk.gateway.compat.instances import instance_json, instance_of_json, runner_json
from skulk.gateway.compat.previews import previews_json
from skulk.gateway.compat.state import state_json
from skulk.gateway.waiting import death_of, why_not_ready
from skulk.wire.base import ErrorBody
from skulk.wire.beats import Accelerator, HealthReason, MasterBeat, RunnerPhase
from skulk.wire.placement import NodeReport, PlacementDecision, PlacementRequest
from tests.support.states import TERM, assignment, beat, card, estimate, instance, state_of, status

ASSIGNED = assignment("i1")
GPU = Accelerator(vendor="amd", name="Radeon 8060S", vram_total_bytes=1, vram_used_bytes=2, gtt_total_bytes=3)

CARD_JSON: dict[str, Any] = {
    "modelId": "org/model",
    "name": "org/model",
    "family": "llama",
    "quantization": "Q4_K_M",
    "storageSize": {"inBytes": 100_000_000},
    "nLayers": 30,
    "hiddenSize": 576,
    "contextLength": 8192,
    "supportsTensor": False,
    "tasks": ["TextGeneration"],
    "capabilities": ["text"],
    "compatibleBackends": ["llama_cpp-vulkan", "llama_cpp-rocm", "llama_cpp-cuda", "llama_cpp-cpu"],
}


def shard(backend: str) -> dict[str, Any]:
    return {
        "PipelineShardMetadata": {
            "modelCard": CARD_JSON,
            "deviceRank": 0,
            "worldSize": 1,
            "startLayer": 0,
            "endLayer": 30,
            "nLayers": 30,
            "resolvedBackend": backend,
        }
    }


def view_of(**phases: Any) -> ClusterView:
    state = state_of(instance("i1", assigned=ASSIGNED), seq=7)
    system = msgspec.structs.replace(beat().system, accelerators=(GPU,))
    warning = HealthReason(level="warn", code="no_gpu", message="CPU only", remediation="reinstall")
    spoken = msgspec.structs.replace(beat(), system=system, warnings=(warning,), hears=("aaaa", "bbbb"), load=0.5)
    return ClusterView(
        state=state,
        nodes={"aaaa": NodeView(beat=spoken, heard_at=95.0)},
        runners={"i1-1": status(ASSIGNED, "ready", **phases)},
        master=MasterBeat(node_id="aaaa", term=TERM, position=state.position, state_hash="", at=0.0),
        master_heard_at=95.0,
    )


STATE_JSON: dict[str, Any] = {
    "instances": {
        "i1": {
            "MlxRingInstance": {
                "instanceId": "i1",
                "shardAssignments": {
                    "modelId": "org/model",
                    "nodeToRunner": {"aaaa": "i1-1"},
                    "runnerToShard": {"i1-1": shard("llama_cpp-cpu")},
                },
                "contextTokenLimit": 4096,
                "phase": "ready",
                "reason": "",
                "createdAt": 0.0,
                "nParallel": 4,
                "kvCells": 4096,
                "reservedBytes": 300_000_000,
                "loadedContextLength": 0,
            }
        }
    },
    "runners": {"i1-1": {"RunnerReady": {}}},
    "downloads": {"aaaa": [{"DownloadCompleted": {"shardMetadata": shard(""), "total": {"inBytes": 100_000_000}}}]},
    "topology": {"nodes": ["aaaa"], "connections": {"aaaa": {"bbbb": []}}},
    "nodeIdentities": {
        "aaaa": {
            "friendlyName": "host-aaaa",
            "hostname": "aaaa",
            "skulkVersion": "0.1.0",
            "skulkCommit": "0123abcd",
            "osVersion": "Linux",
            "architecture": "x86_64",
            "chipId": "test",
            "role": "full",
            "api": None,
        }
    },
    "nodeMemory": {
        "aaaa": {
            "ramTotal": {"inBytes": 16 * 1024**3},
            "ramAvailable": {"inBytes": 16 * 1024**3},
            "usable": {"inBytes": 16 * 1024**3},
        }
    },
    "nodeSystem": {
        "aaaa": {
            "accelerator": {
                "vendor": "amd",
                "name": "Radeon 8060S",
                "vramTotalBytes": 1,
                "vramUsedBytes": 2,
                "gttTotalBytes": 3,
            },
            "accelerators": [
                {
                    "vendor": "amd",
                    "name": "Radeon 8060S",
                    "vramTotalBytes": 1,
                    "vramUsedBytes": 2,
                    "gttTotalBytes": 3,
                }
            ],
            "physicalCores": 2,
            "load": 0.5,
        }
    },
    "nodeDisk": {"aaaa": {"total": {"inBytes": 100 * 1024**3}, "available": {"inBytes": 50 * 1024**3}}},
    "nodeHealth": {
        "aaaa": {
            "level": "warn",
            "reasons": [{"code": "no_gpu", "message": "CPU only", "remediation": "reinstall"}],
        }
    },
    "nodeBackends": {"aaaa": ["llama_cpp", "llama_cpp-cpu"]},
    "lastSeen": {"aaaa": "2023-11-14T22:13:20+00:00"},
    "lastEventAppliedIdx": 7,
    "master": "aaaa",
    "term": 1,
    "draining": [],
}


def test_the_whole_state() -> None:
    rendered = state_json(view_of(), {"org/model": card()}, now=100.0, wall=1_700_000_005.0)
    assert msgspec.json.decode(msgspec.json.encode(rendered)) == STATE_JSON


def test_an_empty_view() -> None:
    rendered = state_json(ClusterView(state=state_of()), {}, now=0.0, wall=0.0)
    assert rendered["instances"] == rendered["runners"] == rendered["lastSeen"] == {}
    assert (rendered["master"], rendered["topology"]) == (None, {"nodes": [], "connections": {}})


def test_weights_without_a_card_still_show() -> None:
    held = state_json(view_of(), {}, now=100.0, wall=0.0)["downloads"]["aaaa"][0]["DownloadCompleted"]
    assert held["shardMetadata"]["PipelineShardMetadata"]["modelCard"] == {"modelId": "org/model"}


@pytest.mark.parametrize(
    ("phase", "tag"),
    [
        ("accepted", "RunnerIdle"),
        ("starting", "RunnerIdle"),
        ("loading", "RunnerLoading"),
        ("warming", "RunnerWarmingUp"),
        ("ready", "RunnerReady"),
        ("draining", "RunnerShutdown"),
        ("stopped", "RunnerShutdown"),
        ("failed", "RunnerFailed"),
        ("refused", "RunnerFailed"),
    ],
)
def test_runner_tags(phase: RunnerPhase, tag: str) -> None:
    rendered = runner_json(status(ASSIGNED, phase))
    assert list(rendered) == [tag]
    assert ("errorMessage" in rendered[tag]) == (tag == "RunnerFailed")


def test_a_busy_runner_runs_and_a_failed_one_says_why() -> None:
    assert runner_json(status(ASSIGNED, active=1)) == {"RunnerRunning": {}}
    error = ErrorBody(code="runner_failed", detail="out of memory")
    failed = msgspec.structs.replace(status(ASSIGNED, "failed"), error=error)
    assert runner_json(failed) == {"RunnerFailed": {"errorMessage": "out of memory"}}
    assert runner_json(None) == {"RunnerIdle": {}}


def test_a_pending_instance_names_no_runner() -> None:
    view = ClusterView(state=state_of(msgspec.structs.replace(instance("i1"), reason="nothing fits")))
    body = instance_json(view, view.state.instances["i1"])["MlxRingInstance"]
    assert body["shardAssignments"] == {"modelId": "org/model", "nodeToRunner": {}, "runnerToShard": {}}
    assert (body["phase"], body["reason"], body["contextTokenLimit"]) == ("pending", "nothing fits", 0)
    assert state_json(view, {}, now=0.0, wall=0.0)["runners"] == {}


def test_a_preview_reads_back_as_what_it_proposed() -> None:
    report = NodeReport(node_id="aaaa", backend="llama_cpp-cpu", context_length=4096, memory=estimate())
    decision = PlacementDecision(outcome="placed", nodes=("aaaa",), reports=(report,))
    preview = previews_json(PlacementRequest(card=card()), decision, "new-1")["previews"][0]
    assert instance_of_json(preview["instance"]) == ("new-1", "org/model", "aaaa")
    assert preview["instance"]["MlxRingInstance"]["shardAssignments"]["nodeToRunner"] == {"aaaa": "new-1-1"}


@pytest.mark.parametrize(
    "body", [{}, {"MlxRingInstance": None}, {"MlxRingInstance": {"instanceId": "x"}}, {"Other": {}}]
)
def test_what_is_no_instance(body: dict[str, Any]) -> None:
    assert instance_of_json(body) is None


def test_the_most_hopeful_instance_speaks() -> None:
    loading, pending = instance("i2", assigned=assignment("i2")), instance("i3")
    state = state_of(pending, loading)
    busy = msgspec.structs.replace(status(assignment("i2"), "loading", instance_id="i2"), progress=0.5)
    view = ClusterView(state=state, runners={"i2-1": busy})
    assert "50% done" in why_not_ready(view, (pending, loading)).detail
    assert "is being placed" in why_not_ready(ClusterView(state=state), (pending, loading)).detail
    told = why_not_ready(view, (pending,))
    assert (told.code, told.http_status) == ("instance_not_ready", 503)


def test_the_views_word_for_a_death() -> None:
    known = status(ASSIGNED)
    view = view_of()
    assert death_of(view, known) is None
    for change, word in (
        (
            {"phase": "failed", "error": ErrorBody(code="runner_failed", detail="killed by SIGKILL")},
            "killed by SIGKILL",
        ),
        ({"phase": "stopped"}, "was stopped"),
        ({"restarts": 1}, "started again"),
    ):
        now = msgspec.structs.replace(known, **change)
        error = death_of(msgspec.structs.replace(view, runners={"i1-1": now}), known)
        assert error is not None
        assert (error.code, word in error.detail) == ("runner_failed", True)
    gone = death_of(msgspec.structs.replace(view, runners={}), known)
    assert gone is not None
    assert "lost" in gone.detail
    draining = msgspec.structs.replace(view, runners={"i1-1": status(ASSIGNED, "draining")})
    assert death_of(draining, known) is None, "a draining runner finishes its streams"


def test_a_runner_that_is_down_shows_in_its_nodes_health() -> None:
    error = ErrorBody(code="child_failed", detail="5 crashes within 10 min: not started again.")
    down = msgspec.structs.replace(status(assignment(), "failed"), error=error)
    view = with_node_beat(ClusterView(state=state_of(instance(assigned=assignment()))), beat(runners=(down,)), 0.0)
    health = state_json(view, {}, 0.0, 0.0)["nodeHealth"]["aaaa"]
    assert health["level"] == "error"
    assert health["reasons"][0]["code"] == "child_failed"
    assert "5 crashes" in health["reasons"][0]["message"]
    assert "skulk rm i1" in health["reasons"][0]["remediation"]
