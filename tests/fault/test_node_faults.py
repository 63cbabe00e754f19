"""A whole node whose parts fail beneath it: the bus dies mid-command, the bus asks for a token."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest

from skulk.bus.nats_bus import NatsBus
from skulk.bus.subjects import NODE_BEAT
from skulk.errors import StartError
from tests.support.whole_node import MODEL, text_of, whole_node

PLACE = {"model_id": MODEL, "instance_meta": "MlxRing", "min_nodes": 1, "context_length": 512, "n_parallel": 1}


def server_pid(node_pid: int) -> int:
    """The nats-server of a launcher."""
    children = psutil.Process(node_pid).children()
    return next(child.pid for child in children if "nats-server" in child.name())


async def test_a_command_outlives_the_bus_and_is_carried_out_once(tmp_path: Path) -> None:
    async with whole_node(tmp_path, "--place", MODEL) as node:
        first = await node.wait_ready()
        placing = asyncio.create_task(node.call("POST", "/place_instance", PLACE))
        os.kill(server_pid(node.process.pid), signal.SIGKILL)
        status, answer = await placing
        assert status == 200, answer
        state = await node.state()
        assert set(state["instances"]) == {first, answer["instance_id"]}
        status, answer = await node.call("DELETE", f"/instance/{answer['instance_id']}")
        assert status == 200, answer
        events = [
            event async for event in node.stream([{"role": "user", "content": "Hi."}], max_tokens=4, temperature=0.0)
        ]
        assert text_of(events)
        assert set((await node.state())["instances"]) == {first}


async def test_a_guarded_bus_serves_its_own_node_and_nobody_without_the_token(tmp_path: Path) -> None:
    token = "mit Leerzeichen und $HOME"
    (tmp_path / "skulk.toml").write_text(f'cluster_token = "{token}"\n')
    async with whole_node(tmp_path, "--place", MODEL) as node:
        await node.wait_ready()
        line = await node.wait_output("watch ")
        assert line.rstrip().endswith("--user skulk --password \"$SKULK_CLUSTER_TOKEN\" sub 'skulk.>'")
        assert not any(token in printed for printed in node.output)
        url = node.facts["nats_url"]
        bus = NatsBus(url, cluster="skulk", name="watcher", user="skulk", password=token)
        await bus.connect()
        heard = asyncio.Event()
        await bus.subscribe(NODE_BEAT, lambda _: heard.set())
        await asyncio.wait_for(heard.wait(), 5.0)
        await bus.close()
        with pytest.raises(StartError, match="refused our credentials"):
            await NatsBus(url, cluster="skulk", name="stranger").connect()


async def test_an_instance_outlives_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    """A disk gone bad is told; what runs goes on, and what was placed meanwhile is kept when it is mended."""
    async with whole_node(tmp_path) as node:
        (tmp_path / "state.json").unlink(missing_ok=True)
        (tmp_path / "state.json").mkdir()
        status, answer = await node.call("POST", "/place_instance", PLACE)
        assert status == 200, answer
        await node.wait_output("is not on disk")
        await node.wait_ready()
        (tmp_path / "state.json").rmdir()
        assert await node.stop() == 0
    async with whole_node(tmp_path) as again:
        assert await again.wait_ready() == answer["instance_id"]
