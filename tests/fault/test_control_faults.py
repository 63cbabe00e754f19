"""Several whole nodes on one bus: the master is killed in the middle of streams, and a node is stopped in order."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

from tests.support.child_processes import no_process_left
from tests.support.nats import NatsServer
from tests.support.whole_node import MODEL, WholeNode, whole_node

QUESTION = [{"role": "user", "content": "Count from one to one hundred."}]
STREAMS = 4
TOKENS = 64
SMALL = {"model_id": MODEL, "context_length": 512, "n_parallel": STREAMS}
LOAD_S = 60.0


async def streamed(node: WholeNode, begun: asyncio.Event) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    async for event in node.stream(QUESTION, temperature=0, max_tokens=TOKENS):
        events.append(event)
        if any(choice["delta"].get("content") for choice in event.get("choices", [])):
            begun.set()
    return events


def runner_of(state: dict[str, Any], instance_id: str) -> dict[str, str]:
    """The runner of an instance, by node."""
    (instance,) = state["instances"][instance_id].values()
    return instance["shardAssignments"]["nodeToRunner"]


async def test_the_masters_end_and_an_orderly_stop(tmp_path: Path) -> None:
    with no_process_left(), NatsServer() as bus:
        async with (
            whole_node(tmp_path / "1", SKULK_NATS_URL=bus.url) as one,
            whole_node(tmp_path / "2", SKULK_NATS_URL=bus.url) as two,
        ):
            state = await two.wait_state(lambda told: len(told["topology"]["nodes"]) == 2 and told["master"])
            leads, stays = (one, two) if state["master"] == one.facts["node_id"] else (two, one)
            status, placed = await stays.call(
                "POST", "/place_instance", {**SMALL, "excluded_nodes": [leads.facts["node_id"]]}
            )
            assert status == 200, placed
            instance_id = await stays.wait_ready(LOAD_S)
            before = runner_of(await stays.state(), instance_id)
            await the_master_is_killed(leads, stays)
            assert runner_of(await stays.state(), instance_id) == before
            async with whole_node(tmp_path / "3", SKULK_NATS_URL=bus.url) as three:
                await a_node_is_stopped(stays, three, instance_id)


async def the_master_is_killed(leads: WholeNode, stays: WholeNode) -> None:
    """Streams that another node's runner serves go on to their end; the survivor leads and places."""
    begun = [asyncio.Event() for _ in range(STREAMS)]
    async with asyncio.TaskGroup() as tasks:
        streams = [tasks.create_task(streamed(stays, one)) for one in begun]
        await asyncio.gather(*(one.wait() for one in begun))
        leads.process.kill()
        await leads.process.wait()
    assert [stream.result()[-1] for stream in streams] == [{}] * STREAMS
    own = stays.facts["node_id"]
    await stays.wait_state(lambda told: told["master"] == own)
    status, again = await stays.call("POST", "/place_instance", SMALL)
    assert status == 200, again
    status, _ = await stays.call("DELETE", f"/instance/{again['instance_id']}")
    assert status == 200


async def a_node_is_stopped(stays: WholeNode, other: WholeNode, instance_id: str) -> None:
    """By SIGTERM: its instance moves, under its id, and the other node leads."""
    await stays.wait_state(lambda told: other.facts["node_id"] in told["topology"]["nodes"])
    assert await stays.stop(signal.SIGTERM) == 0
    own = other.facts["node_id"]

    def has_moved(told: dict[str, Any]) -> bool:
        runners = runner_of(told, instance_id)
        ready = any("RunnerReady" in told["runners"][name] for name in runners.values())
        return set(runners) == {own} and ready and told["master"] == own

    state = await other.wait_state(has_moved, LOAD_S)
    assert runner_of(state, instance_id) == {own: f"{instance_id}-2"}
