"""A runner, or a whole node, is killed in the middle of an answer, and the client can't tell."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from skulk.gateway.keys import DISPATCHER
from tests.support.child_processes import no_process_left
from tests.support.failover import Replicas, assert_same, every, fake_runner, options_file, replicas
from tests.support.mesh import MeshNode, ending, until_full
from tests.support.nats import NatsServer

# the fake answers with 60 tokens, then its end token
IN_RUNS = {"temperature": 0, "max_tokens": 100}
# With a stop string, which never comes, each token is an event of its own.
GREEDY = {**IN_RUNS, "stop": ["\0"]}


@asynccontextmanager
async def two_fakes(folder: Path, *, hang_at: int, **options: Any) -> AsyncGenerator[Replicas]:
    """Two runners of the fake engine; the one that is asked first hangs at a step."""
    with no_process_left(), NatsServer() as server:
        async with replicas(folder, server.url) as world:
            await world.serve("a", fake_runner(folder, "a", server.url, hang_at=hang_at, **options))
            await world.serve("b", fake_runner(folder, "b", server.url, **options))
            yield world


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[Replicas]:
    async with two_fakes(tmp_path, hang_at=2) as running:
        yield running


async def kill_at(world: Replicas, index: int, **fields: object) -> None:
    """Runner ``a`` is killed when exactly ``index`` tokens were drawn; the answer is that of an undisturbed one."""
    path = options_file(world.folder, "a", hang_at=index + 1)
    await world.kill("a")
    await world.revive("a", path=str(path))
    disturbed = await world.killed_at(index, lambda: world.kill("a"), **fields)
    assert_same(disturbed, await world.whole(**fields))
    assert world.runs[-2].resumptions == 1


async def test_tokens_that_come_together_are_neither_lost_nor_sent_twice(world: Replicas) -> None:
    await world.kill("a")
    await world.revive("a", path=str(options_file(world.folder, "a", hang_at=21)))
    disturbed = await world.killed_at(20, lambda: world.kill("a"), **IN_RUNS)
    assert world.runs[-1].resumptions == 1
    undisturbed = await world.whole(**IN_RUNS)
    assert len(undisturbed.plain()[0]) < 20, "they come together"
    assert disturbed.texts() == undisturbed.texts()


async def test_every_tenth_token_of_a_greedy_answer_on_a_runner_kill(world: Replicas) -> None:
    for index in every(60, step=10):
        await kill_at(world, index, **GREEDY)
    assert world.app[DISPATCHER].failovers == {"resumed": 6}


async def test_several_choices_with_stop_strings_and_sampling_go_on_together(world: Replicas) -> None:
    asked = {"n": 3, "seed": 7, "temperature": 1.0, "max_tokens": 60, "stop": ["sea", "fox"]}
    # three choices a step: the first draws at step 1, all three from step 2 on
    await kill_at(world, 20, **asked)


async def test_a_killed_node_and_its_bus_cost_no_word(tmp_path: Path) -> None:
    """The nats-server and the runner of node b die at once; nobody is left there to say so."""
    with no_process_left():
        near = await MeshNode("a", tmp_path / "a").start()
        far = MeshNode("b", tmp_path / "b", (near.route,))
        async with ending(near, far):
            for index in (7, 41):
                await far.start()
                await until_full(near, far)
                await kill_node_at(near, far, index, tmp_path / str(index))


async def kill_node_at(near: MeshNode, far: MeshNode, index: int, folder: Path) -> None:
    await asyncio.to_thread(folder.mkdir)

    def login(node: MeshNode) -> dict[str, Any]:
        password = node.endpoint.password or ""
        return {"user": "skulk" if password else "", "password": password}

    async with replicas(folder, near.endpoint.client_url, **login(near)) as world:
        one = fake_runner(folder, "a", far.endpoint.client_url, hang_at=index + 1, **login(far))
        await world.serve("a", one)
        await world.serve("b", fake_runner(folder, "b", near.endpoint.client_url, **login(near)))

        async def kill() -> None:
            await asyncio.gather(world.kill("a", is_told=False), far.stop())

        disturbed = await world.killed_at(index, kill, **GREEDY)
        assert_same(disturbed, await world.whole(**GREEDY))


async def test_a_stopped_runner_is_silent_and_its_stream_goes_on_elsewhere(world: Replicas) -> None:
    """SIGSTOP: alive, and says nothing."""
    await world.kill("a")
    await world.revive("a", path=str(options_file(world.folder, "a", hang_at=12)))
    child = world.children["a"]
    assert child.pid is not None
    pid = child.pid

    async def stop() -> None:
        os.kill(pid, signal.SIGSTOP)

    disturbed = await world.killed_at(11, stop, **GREEDY)
    os.kill(pid, signal.SIGCONT)
    await world.kill("a")
    assert_same(disturbed, await world.whole(**GREEDY))
