"""Several whole nodes on one machine: they make one cluster, and a killed nats-server costs no stream a word."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from tests.support.child_processes import no_process_left
from tests.support.mesh import free_ports
from tests.support.whole_node import MODEL, WholeNode, text_of, whole_node

STREAMS = 10
QUESTION = [{"role": "user", "content": "Name three rivers."}]
GREEDY = {"temperature": 0, "max_tokens": 16, "ignore_eos": True}


@asynccontextmanager
async def two_nodes(folder: Path) -> AsyncGenerator[tuple[WholeNode, WholeNode]]:
    """A node that serves the model, and one that serves none; each names the other, both start at the same moment."""
    first, second = free_ports(2)
    async with AsyncExitStack() as stack:
        serving, other = await asyncio.gather(
            stack.enter_async_context(
                whole_node(
                    folder / "one",
                    *("--route-port", str(first), "--bootstrap-peers", f"127.0.0.1:{second}"),
                )
            ),
            stack.enter_async_context(
                whole_node(
                    folder / "two",
                    *("--route-port", str(second), "--bootstrap-peers", f"/ip4/127.0.0.1/tcp/{first}", "--no-worker"),
                )
            ),
        )
        yield serving, other


async def answers(node: WholeNode, kill: list[int]) -> list[str]:
    """The texts of ten streams; once each has begun, these processes are killed."""
    begun = [asyncio.Event() for _ in range(STREAMS)]

    async def one(number: int) -> str:
        events: list[dict[str, object]] = []
        async for event in node.stream(QUESTION, **GREEDY):
            events.append(event)
            begun[number].set()
        assert events[-1] == {}, f"no [DONE]: {events[-2:]}"
        return text_of(events)

    async with asyncio.TaskGroup() as tasks:
        streams = [tasks.create_task(one(number)) for number in range(STREAMS)]
        for event in begun:
            await event.wait()
        for pid in kill:
            os.kill(pid, signal.SIGKILL)
    return [stream.result() for stream in streams]


async def test_a_killed_nats_server_costs_no_stream_a_word(tmp_path: Path) -> None:
    with no_process_left():
        async with two_nodes(tmp_path) as (serving, other):
            names = {serving.facts["node_id"], other.facts["node_id"]}
            for node in (serving, other):
                await node.wait_state(lambda state: set(state["topology"]["nodes"]) == names)
            placing = {"model_id": MODEL, "context_length": 256, "n_parallel": STREAMS}
            status, placed = await other.call("POST", "/place_instance", placing)
            assert status == 200, placed
            await other.wait_ready(60.0)
            runner = serving.children()["runner"]
            expected = text_of([event async for event in other.stream(QUESTION, **GREEDY)])
            for node in (serving, other):
                server = node.children()["nats-server"]
                assert set(await answers(other, [server])) == {expected}
                await node.wait_replaced("nats-server", server)
            assert serving.children()["runner"] == runner
            await other.wait_state(lambda state: set(state["topology"]["nodes"]) == names)
