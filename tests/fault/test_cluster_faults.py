"""Three nodes as users run them, joined by routes: master, nats-servers and a worker die amid ten streams."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.whole_node import MODEL, NAMED_PEERS, WholeNode, text_of, whole_node

STREAMS = 10
TOKENS = 60
MASTER_S = 10.0
MESSAGES = [{"role": "user", "content": "Tell me about the sea."}]
ASKED: dict[str, Any] = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
PLACE = {"model_id": MODEL, "context_length": 512, "n_parallel": STREAMS}
# Each stream computes the same bits whatever runs beside it, so that one text is every stream's.
EXACT = {"SKULK_LLAMA_CPP_FLASH_ATTN": "off", "SKULK_LLAMA_CPP_PARALLEL": str(STREAMS), "SKULK_REPLACE_AFTER": "2"}


class Cluster:
    """A leads and runs no models, B runs one, C is asked; the model's one text."""

    def __init__(self, nodes: list[WholeNode]) -> None:
        self.a, self.b, self.c = nodes
        self.text = ""

    async def master(self) -> str | None:
        """Whom the asked node follows."""
        return (await self.c.state())["master"]

    async def runners(self) -> dict[str, Any]:
        """Runner ids with their restarts, as each node tells."""
        _, told = await self.c.call("GET", "/v1/diagnostics/cluster")
        found = [runner for node in told["nodes"] for runner in node["diagnostics"]["supervisorRunners"]]
        return {runner["runnerId"]: runner["restarts"] for runner in found}


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with AsyncExitStack() as stack:

        async def start(name: str, *arguments: str) -> WholeNode:
            node = whole_node(tmp_path / name, *arguments, scope=NAMED_PEERS, **EXACT)
            return await stack.enter_async_context(node)

        first = await start("a", "--no-worker")
        peer = ("--bootstrap-peers", f"127.0.0.1:{first.facts['route_port']}")
        second = await start("b", *peer)
        await second.wait_state(lambda state: len(state["lastSeen"]) == 2 and state["master"] is not None)
        status, placed = await second.call("POST", "/place_instance", PLACE)
        assert status == 200, placed
        cluster = Cluster([first, second, await start("c", *peer)])
        await cluster.c.wait_state(lambda state: len(state["lastSeen"]) == 3 and state["master"] is not None)
        await cluster.c.wait_ready()
        cluster.text = text_of([event async for event in cluster.c.stream(MESSAGES, **ASKED)])
        yield cluster


class Streams:
    """Ten streams at once from one node, each to its end, however that comes."""

    def __init__(self, node: WholeNode) -> None:
        self.events: list[list[dict[str, Any]]] = [[] for _ in range(STREAMS)]
        self.has_begun = asyncio.Event()
        self.ended = asyncio.gather(*(self._read(node, events) for events in self.events))

    async def _read(self, node: WholeNode, events: list[dict[str, Any]]) -> None:
        async for event in node.stream(MESSAGES, **ASKED):
            events.append(event)
            if min(map(len, self.events)) > 5:
                self.has_begun.set()

    async def in_the_middle(self) -> None:
        """Returns when every stream has some of its text."""
        async with asyncio.timeout(30.0):
            await self.has_begun.wait()
        assert not self.ended.done()

    async def texts(self) -> list[str]:
        """The whole texts; each must have ended well."""
        async with asyncio.timeout(60.0):
            await self.ended
        assert all(events[-1] == {} for events in self.events), "a stream ended without [DONE]"
        return [text_of(events) for events in self.events]


async def test_streams_outlive_master_and_servers_and_a_lost_worker_s_instance_is_placed_again(
    cluster: Cluster,
) -> None:
    instances = list((await cluster.c.state())["instances"])
    runners = await cluster.runners()
    await the_master_dies(cluster, instances, runners)
    await servers_die(cluster, runners)
    await the_worker_dies(cluster, instances)


async def the_master_dies(cluster: Cluster, instances: list[str], runners: dict[str, Any]) -> None:
    """Ten streams complete, another master leads, and the instance is the same on the same runner."""
    old = cluster.a.facts["node_id"]
    assert await cluster.master() == old
    streams = Streams(cluster.c)
    await streams.in_the_middle()
    await cluster.a.stop(signal.SIGKILL)
    await cluster.c.wait_state(lambda state: state["master"] not in (None, old), MASTER_S)
    assert await streams.texts() == [cluster.text] * STREAMS
    assert list((await cluster.c.state())["instances"]) == instances
    assert await cluster.runners() == runners


async def servers_die(cluster: Cluster, runners: dict[str, Any]) -> None:
    """Of the node that computes, then of the node that is asked: not a character changes, on the same runner."""
    for node in (cluster.b, cluster.c):
        streams = Streams(cluster.c)
        await streams.in_the_middle()
        os.kill(node.children()["nats-server"], signal.SIGKILL)
        assert await streams.texts() == [cluster.text] * STREAMS
        assert await cluster.runners() == runners


async def the_worker_dies(cluster: Cluster, instances: list[str]) -> None:
    """Its streams go on at the replica, not a character changed; its instance comes to the node that is left."""
    here = cluster.c.facts["node_id"]
    status, placed = await cluster.c.call("POST", "/place_instance", {**PLACE, "node_ids": [here]})
    assert status == 200, placed
    replica = placed["instance_id"]
    await cluster.c.wait_state(lambda state: serves(state, replica, here), 60.0)
    streams = Streams(cluster.c)
    await streams.in_the_middle()
    assert {name for name, runner in (await cluster.c.state())["runners"].items() if "RunnerRunning" in runner} == {
        f"{instance}-1" for instance in (*instances, replica)
    }, "both compute"
    await cluster.b.stop(signal.SIGKILL)
    assert await streams.texts() == [cluster.text] * STREAMS
    state = await cluster.c.wait_state(lambda state: serves(state, instances[0], here), 40.0)
    assert set(state["instances"]) == {*instances, replica}


def serves(state: dict[str, Any], instance_id: str, node_id: str) -> bool:
    """Whether an instance is ready on a node."""
    body = state["instances"][instance_id]["MlxRingInstance"]
    runner = body["shardAssignments"]["nodeToRunner"].get(node_id)
    return runner is not None and bool({"RunnerReady", "RunnerRunning"} & set(state["runners"].get(runner, {})))
