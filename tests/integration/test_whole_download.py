"""Nodes as users run them, and a hub: a model that nobody has is placed, comes, answers, and is removed again.

And a second node that can't reach the hub gets it from the first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.gguf import embedded_model
from tests.support.hub import SmallHub
from tests.support.whole_node import NAMED_PEERS, WholeNode, skulk, whole_node

REPO = "org/smol-GGUF"
FILE = "smol.Q4_1.gguf"


@pytest.fixture(scope="module")
def small_hub() -> Iterator[SmallHub]:
    with SmallHub() as hub:
        hub.block_bytes = 1024 * 1024
        body = embedded_model().read_bytes()
        hub.add(REPO, {FILE: body, "smol.Q8_0.gguf": body, "README.md": b"x"})
        hub.add("org/gated", {"m-Q4_0.gguf": b"GGUF" + bytes(5000)}).gated = True
        yield hub


@pytest.fixture
async def node(small_hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[WholeNode]:
    monkeypatch.setenv("HF_ENDPOINT", small_hub.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    async with whole_node(tmp_path / "a", "--place", REPO, scope=NAMED_PEERS) as running:
        yield running


async def cli(node: WholeNode, *words: str) -> Any:
    return await asyncio.to_thread(skulk, node.home, *words)


def downloads_of(state: dict[str, Any]) -> dict[str, str]:
    """The tag of each download, by model."""
    found: dict[str, str] = {}
    for entries in state["downloads"].values():
        for entry in entries:
            ((tag, body),) = entry.items()
            found[body["shardMetadata"]["PipelineShardMetadata"]["modelCard"]["modelId"]] = tag
    return found


def is_ready(state: dict[str, Any]) -> bool:
    return any("RunnerReady" in runner for runner in state["runners"].values())


async def test_a_model_that_nobody_has_is_placed_fetched_served_handed_on_verified_and_removed(
    node: WholeNode, small_hub: SmallHub, tmp_path: Path
) -> None:
    await node.wait_state(lambda state: REPO in downloads_of(state))
    state = await node.wait_state(is_ready, 90.0)
    assert downloads_of(state)[REPO] == "DownloadCompleted"
    (instance_id,) = state["instances"]
    body = {"model": REPO, "messages": [{"role": "user", "content": "Say hi."}], "max_tokens": 4}
    status, answer = await node.call("POST", "/v1/chat/completions", body)
    assert status == 200 and answer["choices"][0]["message"]["content"]
    status, models = await node.call("GET", "/v1/models")
    assert models["data"][0]["id"] == REPO and models["data"][0]["state"] == "ready"

    await nothing_whole_comes_twice(node, small_hub)
    await refusals_have_their_codes(node)
    await a_node_without_the_hub_gets_it_from_its_neighbour(node, small_hub, tmp_path)

    status, refused = await node.call("DELETE", f"/store/models/{REPO}")
    assert (status, refused["error"]["code"]) == (400, "model_in_use")
    status, _ = await node.call("DELETE", f"/instance/{instance_id}")
    assert status == 200
    verified = await cli(node, "verify", REPO)
    assert (verified.returncode, "whole, as its card pins it" in verified.stdout) == (0, True), verified
    removed = await cli(node, "remove", REPO)
    assert (removed.returncode, "freed" in removed.stdout) == (0, True), removed
    assert not (node.home / "models" / "org").exists()


async def nothing_whole_comes_twice(node: WholeNode, small_hub: SmallHub) -> None:
    """The same quantization by its whole name is what lies there already."""
    name, before = f"{REPO}:Q4_1", small_hub.sent_bytes
    status, told = await node.call("GET", f"/instance/previews?model_id={name}")
    assert status == 200, told
    (report,) = told["decision"]["reports"]
    assert report["score"]["weights"] == 1
    pulled = await cli(node, "pull", name)
    assert (pulled.returncode, "is on" in pulled.stdout) == (0, True), pulled
    assert small_hub.sent_bytes == before
    # another quantization is another model; what it needs is known from its header alone
    status, told = await node.call("GET", f"/instance/previews?model_id={REPO}:Q8_0")
    assert status == 200, told
    (report,) = told["decision"]["reports"]
    assert report["score"]["weights"] == 0 and report["memory"]["weights_bytes"] > 0
    assert small_hub.sent_bytes - before < 32 * 1024 * 1024


async def a_node_without_the_hub_gets_it_from_its_neighbour(node: WholeNode, hub: SmallHub, tmp_path: Path) -> None:
    """Placed there by its name, fetched whole, served; the hub wasn't asked for a byte, and couldn't have been."""
    first, before = node.facts["node_id"], hub.sent_bytes
    route = f"127.0.0.1:{node.facts['route_port']}"
    blocked = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "no-hf")}
    async with whole_node(tmp_path / "b", "--bootstrap-peers", route, scope=NAMED_PEERS, **blocked) as second:
        await second.wait_state(lambda state: first in state["lastSeen"])
        request = {"model_id": REPO, "excluded_nodes": [first]}
        status, placed = await second.call("POST", "/place_instance", request)
        assert status == 200, placed
        mine = second.facts["node_id"]
        await second.wait_state(lambda state: is_ready_on(state, placed["instance_id"], mine), 90.0)
        here = second.home / "models" / REPO / FILE
        assert here.read_bytes() == embedded_model().read_bytes()
        assert hub.sent_bytes == before
        status, _ = await second.call("DELETE", f"/instance/{placed['instance_id']}")
        assert status == 200


def is_ready_on(state: dict[str, Any], instance_id: str, node_id: str) -> bool:
    """Whether an instance's runner is ready on a node."""
    for instance in state["instances"].values():
        (body,) = instance.values()
        runner = body["shardAssignments"]["nodeToRunner"].get(node_id)
        if body["instanceId"] == instance_id and runner is not None:
            return "RunnerReady" in state["runners"].get(runner, {})
    return False


async def refusals_have_their_codes(node: WholeNode) -> None:
    status, told = await node.call("POST", "/place_instance", {"model_id": "org/gated"})
    assert (status, told["error"]["code"]) == (403, "model_gated")
    status, told = await node.call("POST", "/place_instance", {"model_id": "org/missing"})
    assert (status, told["error"]["code"]) == (404, "model_not_found")
    assert "/models/search" in told["error"]["message"]
    status, told = await node.call("GET", "/models/search?query=gated")
    assert status == 200 and "org/gated" in [entry["id"] for entry in told["data"]]
