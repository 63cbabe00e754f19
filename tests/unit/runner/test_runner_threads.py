"""The node's cores, shared among its runners."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import msgspec
import pytest

from skulk.bus.subjects import NODE_BEAT
from skulk.engines.protocol import Engine, EngineInfo
from skulk.runner.threads import thread_share
from skulk.wire.beats import DiskFacts, MemoryFacts, NodeBeat, RunnerPhase, RunnerStatus, SystemFacts
from tests.support.runners import RUNNER, runner_world


def status(name: str, backend: str = "llama_cpp-cpu", phase: RunnerPhase = "ready") -> RunnerStatus:
    return RunnerStatus(
        runner_id=name, instance_id="i", epoch=1, node_id="n", model_id="m", phase=phase, backend=backend
    )


def beat(*runners: RunnerStatus, node_id: str = "n") -> NodeBeat:
    return NodeBeat(
        node_id=node_id,
        incarnation="a",
        name="n",
        version="1",
        at=0.0,
        started_at=0.0,
        tags=(),
        system=SystemFacts(hostname="n", os="", architecture="", chip="", physical_cores=8),
        memory=MemoryFacts(total_bytes=1, available_bytes=1, usable_bytes=1),
        disk=DiskFacts(total_bytes=1, available_bytes=1),
        runners=runners,
    )


@pytest.mark.parametrize(
    ("runners", "threads"),
    [
        ((), 8),
        ((status("a"),), 8),
        ((status("a"), status("b")), 4),
        ((status("b"),), 4),
        ((status("a"), status("b"), status("c")), 2),
        ((status("a"), status("b", phase="loading")), 4),
        ((status("a"), status("b", phase="failed"), status("c", phase="accepted")), 8),
        ((status("a"), status("b", "llama_cpp-vulkan")), 8),
        (tuple(status(str(number)) for number in range(20)), 1),
    ],
)
def test_runners_on_the_processor_share_its_cores(runners: tuple[RunnerStatus, ...], threads: int) -> None:
    assert thread_share(8, "a", beat(*runners)) == threads


class Counting:
    """A fake engine that notes its threads, and says that it has eight."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def info(self) -> EngineInfo:
        return msgspec.structs.replace(self._engine.info, n_threads=8)

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)


async def test_a_runner_follows_its_own_nodes_beats(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[int] = asyncio.Queue()

    class Noting(Counting):
        def set_threads(self, count: int) -> None:
            loop.call_soon_threadsafe(heard.put_nowait, count)

    async with runner_world(tmp_path, wrap=lambda engine: cast("Engine", Noting(engine))) as world:
        node_id = world.runner.status.now.node_id
        other = status("other")
        await world.bus.publish(NODE_BEAT, beat(other, other, node_id="elsewhere"), node="elsewhere")
        for runners in ((other,), (other,), (status(RUNNER),)):
            await world.bus.publish(NODE_BEAT, beat(*runners, node_id=node_id), node=node_id)
        async with asyncio.timeout(20.0):
            assert [await heard.get(), await heard.get()] == [4, 8]
        assert heard.empty()
