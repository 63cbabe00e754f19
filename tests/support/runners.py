"""A runner inside the test: memory bus, fake engine whose steps the test lets through, a gateway that reads it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import msgspec

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.port import Received
from skulk.bus.streams import Inbox, StreamReader
from skulk.bus.subjects import RUNNER_CANCEL, RUNNER_GENERATE, RUNNER_STATUS
from skulk.clock import Clock, SystemClock
from skulk.engines.fake import FakeLoader, FakeOptions, answer_of
from skulk.engines.protocol import Engine, EngineInfo, Progress
from skulk.errors import SkulkError
from skulk.runner.process import load_spec
from skulk.runner.runner import Runner
from skulk.wire.beats import RunnerStatus
from skulk.wire.generation import (
    Accepted,
    Cancel,
    Cancelled,
    Chunk,
    Generate,
    Limits,
    Sampling,
    StreamEnd,
    TextPrompt,
)
from skulk.wire.runner import RunnerLoad, RunnerSpec

WAIT_S = 20.0
GATEWAY = "gw"
RUNNER = "inst-1"
START = 257


class StepGate:
    """The fake engine's ``sleep``: each step waits here until the test lets it through."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._permits = threading.Semaphore(0)
        self._is_open = False
        self.arrivals = 0
        self._arrived = asyncio.Event()

    def sleep(self, _: float) -> None:
        """Called by the engine thread."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._note)
        if not self._is_open:
            self._permits.acquire(timeout=WAIT_S)

    def _note(self) -> None:
        self.arrivals += 1
        self._arrived.set()

    def let(self, steps: int = 1) -> None:
        """Lets so many steps through."""
        self._permits.release(steps)

    def open(self) -> None:
        """Lets everything through from now on."""
        self._is_open = True
        self._permits.release(10_000)

    async def arrived(self, count: int) -> None:
        """Waits until the engine stands at its ``count``-th step."""
        async with asyncio.timeout(WAIT_S):
            while self.arrivals < count:
                self._arrived.clear()
                await self._arrived.wait()


class Stream:
    """One request's stream as its gateway has read it."""

    def __init__(self, reader: StreamReader, accepted: Accepted) -> None:
        self.reader = reader
        self.accepted = accepted
        self.chunks: list[Chunk] = []

    async def read(self, until: Callable[[Stream], bool]) -> Stream:
        """Reads on until something is so."""
        async with asyncio.timeout(WAIT_S):
            while not until(self):
                self.chunks.extend(await self.reader.take())
        return self

    async def finish(self) -> Stream:
        """Reads to the end."""
        await self.read(lambda stream: bool(stream.chunks) and stream.chunks[-1].end is not None)
        await self.reader.close()
        return self

    def text(self, choice: int = 0) -> str:
        return "".join(chunk.text for chunk in self.chunks if chunk.choice == choice)

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.chunks for token in chunk.tokens]

    @property
    def end(self) -> StreamEnd:
        ends = [chunk.end for chunk in self.chunks if chunk.end is not None]
        assert len(ends) == 1
        return ends[0]

    @property
    def error_code(self) -> str:
        assert self.end.error is not None, self.end
        return self.end.error.code


class StatusWatch:
    """The statuses that a runner published."""

    def __init__(self) -> None:
        self.all: list[RunnerStatus] = []
        self._more = asyncio.Event()

    def __call__(self, received: Received[RunnerStatus]) -> None:
        self.all.append(received.message)
        self._more.set()

    @property
    def phases(self) -> list[str]:
        """Each phase once, in order."""
        phases: list[str] = []
        for status in self.all:
            if not phases or phases[-1] != status.phase:
                phases.append(status.phase)
        return phases

    async def until(self, is_so: Callable[[RunnerStatus], bool]) -> RunnerStatus:
        async with asyncio.timeout(WAIT_S):
            while not self.all or not is_so(self.all[-1]):
                self._more.clear()
                await self._more.wait()
        return self.all[-1]


class RunnerWorld:
    """A running runner and its gateway."""

    def __init__(
        self, runner: Runner, life: asyncio.Task[int], bus: MemoryBus, inbox: Inbox, watch: StatusWatch
    ) -> None:
        self.runner = runner
        self.life = life
        self.bus = bus
        self.inbox = inbox
        self.statuses = watch
        self.gate: StepGate
        self.hub: MemoryHub
        self.runner_bus: MemoryBus
        self.ready: list[EngineInfo] = []
        self.refused: list[SkulkError] = []

    async def ask(self, generate: Generate, timeout_s: float = WAIT_S) -> Accepted:
        return await self.bus.request(RUNNER_GENERATE, generate, timeout_s=timeout_s, runner=RUNNER)

    async def generate(self, generate: Generate) -> Stream:
        """Asks and begins to read."""
        reader = self.inbox.open(generate.request_id, generate.attempt, RUNNER)
        return Stream(reader, await self.ask(generate))

    async def cancel(self, request_id: str) -> Cancelled:
        return await self.bus.request(RUNNER_CANCEL, Cancel(request_id=request_id), timeout_s=WAIT_S, runner=RUNNER)

    async def exit_status(self) -> int:
        async with asyncio.timeout(WAIT_S):
            return await asyncio.shield(self.life)


def spec_of(path: str, **changes: Any) -> RunnerSpec:
    """A runner of the fake engine; ``load`` fields by their names."""
    loads = {name: changes.pop(name) for name in tuple(changes) if name in RunnerLoad.__struct_fields__}
    usual: dict[str, Any] = {
        "path": path,
        "backend": "fake-cpu",
        "context_length": 1024,
        "n_parallel": 4,
        "kv_cells": 4096,
    }
    load = RunnerLoad(**{**usual, **loads})
    fields: dict[str, Any] = {
        "runner_id": RUNNER,
        "instance_id": "inst",
        "epoch": 1,
        "node_id": "node",
        "model_id": "fake/model",
        "cluster": "home",
        "nats_url": "nats://127.0.0.1:1",
        "load": load,
        "max_waiting": 4,
    }
    return RunnerSpec(**{**fields, **changes})


def generate_of(
    name: str = "r1",
    text: str = "hello",
    *,
    max_tokens: int | None = None,
    stop: tuple[str, ...] = (),
    **fields: Any,
) -> Generate:
    """A greedy request for the fake engine."""
    usual: dict[str, Any] = {
        "request_id": name,
        "gateway_id": GATEWAY,
        "gateway_incarnation": "life1",
        "model_id": "fake/model",
        "prompt": TextPrompt(text=text),
        "sampling": Sampling(temperature=0.0),
        "limits": Limits(max_tokens=max_tokens, stop=stop),
    }
    return Generate(**{**usual, **fields})


def prompt_ids(text: str = "hello") -> tuple[int, ...]:
    return (*text.encode(), START)


def fake_answer(text: str = "hello", tokens: int = 48) -> str:
    """What the fake engine answers, greedily."""
    return answer_of(prompt_ids(text), "", tokens).decode()


@contextlib.asynccontextmanager
async def runner_world(
    folder: Path,
    *,
    options: FakeOptions | None = None,
    gated: bool = False,
    clock: Clock | None = None,
    wrap: Callable[[Engine], Engine] = lambda engine: engine,
    wait_ready: bool = True,
    **changes: Any,
) -> AsyncGenerator[RunnerWorld]:
    """A runner that serves; ended at the end, whatever happened.

    Args:
        options: of the fake engine.
        gated: its steps wait at the gate.
        wrap: changes the engine once it is loaded.
        changes: of the specification.
    """
    options = options or FakeOptions()
    gate = StepGate()
    if gated:
        options = msgspec.structs.replace(options, step_s=1.0)
    path = folder / "fake.json"
    path.write_bytes(msgspec.json.encode(options))
    spec = spec_of(str(path), **changes)
    hub = MemoryHub()
    bus = MemoryBus(hub, cluster="home", name="gateway")
    runner_bus = MemoryBus(hub, cluster="home", name="runner")
    inbox = Inbox(bus, GATEWAY, SystemClock())
    await inbox.start()
    watch = StatusWatch()
    await bus.subscribe(RUNNER_STATUS, watch, runner=RUNNER)

    def load(progress: Progress) -> Engine:
        return wrap(FakeLoader(gate.sleep)(load_spec(spec), progress))

    ready: list[EngineInfo] = []
    refused: list[SkulkError] = []
    runner = Runner(spec, runner_bus, clock or SystemClock(), load, on_ready=ready.append, on_refused=refused.append)
    life = asyncio.create_task(runner.run(), name="runner")
    world = RunnerWorld(runner, life, bus, inbox, watch)
    world.gate, world.ready, world.refused = gate, ready, refused
    world.hub, world.runner_bus = hub, runner_bus
    try:
        if wait_ready:
            await watch.until(lambda status: status.phase == "ready")
        yield world
    finally:
        gate.open()
        runner.stop()
        runner.stop()
        await asyncio.wait({life}, timeout=WAIT_S)
        await inbox.close()
        await runner_bus.close()
        await bus.close()
        assert life.done()
