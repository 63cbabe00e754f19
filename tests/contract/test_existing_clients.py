"""What the clients of the earlier system send and read, endpoint by endpoint, field by field."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from skulk.errors import RequestError
from tests.support.http import MODEL, NODE, Gateway, chat_body, events_of, running_gateway
from tests.support.stores import FakeStore


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    """One node with a ready instance, its files and a store."""
    async with running_gateway(tmp_path) as running:
        store = FakeStore()
        await store.start(running.cluster.bus)
        await running.serve_model()
        yield running
        await store.service.close(drain_s=0.0)


async def read(gateway: Gateway, path: str) -> Any:
    answer = await gateway.call("GET", path)
    assert answer.status == 200, answer.body
    return answer.json


def only(tagged: dict[str, Any]) -> tuple[str, Any]:
    """The one key of a tagged object, and what it holds."""
    ((tag, body),) = tagged.items()
    return tag, body


async def test_node_id_is_a_bare_string(gateway: Gateway) -> None:
    assert await read(gateway, "/node_id") == NODE


async def test_state(gateway: Gateway) -> None:
    state = await read(gateway, "/state")
    tag, instance = only(state["instances"]["i1"])
    assert (tag, instance["instanceId"], instance["contextTokenLimit"]) == ("MlxRingInstance", "i1", 4096)
    shards = instance["shardAssignments"]
    assert (shards["modelId"], shards["nodeToRunner"]) == (MODEL, {NODE: "i1-1"})
    tag, shard = only(shards["runnerToShard"]["i1-1"])
    assert tag == "PipelineShardMetadata"
    assert (shard["deviceRank"], shard["worldSize"], shard["resolvedBackend"]) == (0, 1, "llama_cpp-cpu")
    assert shard["modelCard"]["modelId"] == MODEL
    assert {name: only(runner)[0] for name, runner in state["runners"].items()} == {"i1-1": "RunnerReady"}
    assert {"friendlyName", "skulkVersion", "skulkCommit", "osVersion", "chipId"} <= set(state["nodeIdentities"][NODE])
    assert list(state["lastSeen"]) == [NODE]
    assert datetime.fromisoformat(state["lastSeen"][NODE]).tzinfo is not None
    for name in ("ramTotal", "ramAvailable"):
        assert state["nodeMemory"][NODE][name]["inBytes"] > 0
    for name in ("total", "available"):
        assert state["nodeDisk"][NODE][name]["inBytes"] > 0
    assert "accelerator" in state["nodeSystem"][NODE]
    assert all(only(entry)[0].startswith("Download") for entry in state["downloads"][NODE])
    assert state["lastEventAppliedIdx"] == gateway.cluster.state.position.seq


@pytest.mark.parametrize("path", ["/models", "/v1/models"])
async def test_models(gateway: Gateway, path: str) -> None:
    entry = next(one for one in (await read(gateway, path))["data"] if one["id"] == MODEL)
    assert entry["model_id"] == entry["hugging_face_id"] == entry["id"]
    for name, kind in (("name", str), ("family", str), ("context_length", int), ("storage_size_megabytes", int)):
        assert isinstance(entry[name], kind), name
    assert entry["tasks"] == ["TextGeneration"]
    assert isinstance(entry["tags"], list) and isinstance(entry["capabilities"], list)
    capabilities = entry["resolved_capabilities"]
    assert {"supports_thinking_toggle", "supports_image_input", "supports_tool_calling"} <= set(capabilities)


async def test_a_preview_is_posted_verbatim_and_appears_under_its_id(gateway: Gateway) -> None:
    told = await read(gateway, f"/instance/previews?model_id={MODEL}&excluded_node_ids=x&excluded_node_ids=y")
    preview = told["previews"][0]
    assert (preview["model_id"], preview["sharding"], preview["instance_meta"]) == (MODEL, "Pipeline", "MlxRing")
    assert preview["error"] is None and preview["memory_delta_by_node"][NODE] > 0
    _, proposed = only(preview["instance"])
    made = await gateway.call("POST", "/instance", {"instance": preview["instance"]})
    assert made.status == 200, made.body
    assert proposed["instanceId"] in (await read(gateway, "/state"))["instances"]


async def test_place_and_delete(gateway: Gateway) -> None:
    sent = {"model_id": MODEL, "sharding": "Pipeline", "instance_meta": "MlxRing", "min_nodes": 1, "excluded_nodes": []}
    placed = (await gateway.call("POST", "/place_instance", sent)).json
    assert {"message", "command_id", "instance_id", "model_card"} <= set(placed)
    instance_id = placed["instance_id"]
    assert instance_id in (await read(gateway, "/state"))["instances"]
    deleted = await gateway.call("DELETE", f"/instance/{instance_id}")
    assert deleted.status == 200
    assert {"message", "command_id", "instance_id"} <= set(deleted.json)
    assert instance_id not in (await read(gateway, "/state"))["instances"]
    assert (await gateway.call("GET", f"/instance/{instance_id}")).status == 404
    assert (await gateway.call("DELETE", f"/instance/{instance_id}")).status == 404


async def test_downloads_by_node_and_by_an_id_with_its_slash(gateway: Gateway) -> None:
    shard = {"PipelineShardMetadata": {"modelCard": {"modelId": MODEL}, "deviceRank": 0, "worldSize": 1}}
    for _ in range(2):
        begun = await gateway.call("POST", "/download/start", {"targetNodeId": NODE, "shardMetadata": shard})
        assert begun.status == 200, begun.body
    entry = next(one for one in (await read(gateway, "/store/registry"))["entries"] if one["model_id"] == MODEL)
    assert entry["total_bytes"] > 0 and "downloaded_at" in entry
    assert "/" in MODEL
    assert "status" in (await gateway.call("POST", f"/store/models/{MODEL}/download", {})).json
    assert "status" in await read(gateway, f"/store/models/{MODEL}/download/status")
    assert (await gateway.call("DELETE", f"/store/models/{MODEL}")).status == 200


async def test_diagnostics(gateway: Gateway) -> None:
    node = await read(gateway, "/v1/diagnostics/node")
    assert {"nodeId", "masterNodeId", "skulkVersion"} <= set(node["runtime"])
    runner = node["supervisorRunners"][0]
    assert (runner["runnerId"], runner["statusKind"], runner["modelId"]) == ("i1-1", "RunnerReady", MODEL)
    assert runner["phase"] == "ready"
    told = await read(gateway, "/v1/diagnostics/cluster")
    assert told["localNodeId"] == NODE
    assert {"nodeId", "ok", "url", "diagnostics"} <= set(told["nodes"][0])
    assert (await read(gateway, "/v1/diagnostics/cluster/timeline"))["events"]


async def test_a_stream_has_its_comments_and_a_chunk_a_token(gateway: Gateway) -> None:
    body = chat_body(stream=True, enable_thinking=True, reasoning_effort="high")
    answer = await gateway.call("POST", "/v1/chat/completions", body)
    assert answer.status == 200, answer.body
    events = events_of(answer.body)
    comments = [event for event in events if isinstance(event, str) and event.startswith(":")]
    assert comments[0].startswith(": command_id ")
    assert comments[-1].startswith(": generation_stats ")
    for name in ("prompt_tps", "generation_tps", "prompt_tokens", "generation_tokens", "peak_memory_usage"):
        assert f'"{name}"' in comments[-1]
    assert '"serving_batches"' in comments[-1] and '"in_flight_at_admission"' in comments[-1]
    deltas = [event["choices"][0]["delta"] for event in events if isinstance(event, dict)]
    assert [delta["content"] for delta in deltas if delta.get("content")] == ["Hello", " world"]


async def test_the_bench_call(gateway: Gateway) -> None:
    told = (await gateway.call("POST", "/bench/chat/completions", chat_body(stream=False))).json
    assert told["generation_stats"]["peak_memory_usage"]["inBytes"] >= 0
    assert told["choices"][0]["message"]["content"] == "Hello world"


async def test_a_follow_up_turn_with_calls_and_their_answers_is_accepted(gateway: Gateway) -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "a cat"},
    ]
    answer = await gateway.call("POST", "/v1/chat/completions", {"model": MODEL, "messages": messages})
    assert answer.status == 200, answer.body


async def test_more_tokens_than_the_context_is_a_400_before_any_event(gateway: Gateway) -> None:
    gateway.cluster.runners["i1-1"].refusal = RequestError(
        "context_length_exceeded", "5 prompt tokens and 90,000 more exceed 4,096", param="max_tokens"
    )
    answer = await gateway.call("POST", "/v1/chat/completions", chat_body(stream=True, max_tokens=90_000))
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
