"""Real runner processes on a real nats-server, and a gateway of the test's own that reads their streams."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from skulk.bus.nats_bus import NatsBus
from skulk.bus.streams import Inbox
from skulk.bus.subjects import RUNNER_CANCEL, RUNNER_GENERATE, RUNNER_STATUS
from skulk.clock import SystemClock
from skulk.engines.fake import FakeOptions
from skulk.supervision.child import Child, ChildSpec
from skulk.wire.base import encode
from skulk.wire.generation import Accepted, Cancel, Cancelled, Generate
from skulk.wire.runner import RunnerSpec
from tests.support.child_processes import ROOT
from tests.support.gguf import embedded_model
from tests.support.nats import NatsServer
from tests.support.runners import GATEWAY, RUNNER, WAIT_S, StatusWatch, Stream, spec_of

START_S = 60.0


FAULTY = Path(__file__).with_name("faulty_engine")


def faulty_environment(told: Path) -> dict[str, str]:
    """Variables under which runners' llama.cpp is faulty in the way that a file says (`faulty_engine`)."""
    return {"PYTHONPATH": f"{FAULTY}:{ROOT}", "FAULTY_DECODE": str(told)}


def child_of(spec: RunnerSpec, env: Mapping[str, str] | None = None) -> Child:
    """A runner's process, not started; ``env``: variables besides."""
    return Child(
        ChildSpec(
            name=f"runner {spec.runner_id}",
            argv=(sys.executable, "-m", "skulk.runner"),
            env={"PYTHONPATH": str(ROOT), "GOMP_SPINCOUNT": "1000", "GGML_NO_BACKTRACE": "1", **(env or {})},
            stdin=encode(spec),
            ready_timeout_s=START_S,
            drain_s=10.0,
        )
    )


def fake_spec(folder: Path, server: NatsServer, options: FakeOptions | None = None, **changes: Any) -> RunnerSpec:
    """A runner of the fake engine."""
    path = folder / "fake.json"
    path.write_bytes(msgspec.json.encode(options or FakeOptions()))
    return spec_of(str(path), **{"nats_url": server.url, **changes})


def model_spec(server: NatsServer, path: Path | None = None, **changes: Any) -> RunnerSpec:
    """A runner of the embedded model: four sequences of 512 tokens on one thread."""
    loads: dict[str, Any] = {
        "backend": "llama_cpp-cpu",
        "context_length": 512,
        "n_parallel": 4,
        "kv_cells": 2048,
        "n_threads": 1,
        "n_ubatch": 64,
    }
    return spec_of(str(path or embedded_model()), nats_url=server.url, **{**loads, **changes})


class Gateway:
    """What a gateway does with runners, and what it hears of them."""

    def __init__(self, bus: NatsBus, inbox: Inbox, statuses: StatusWatch) -> None:
        self.bus = bus
        self.inbox = inbox
        self.statuses = statuses

    async def generate(self, generate: Generate) -> Stream:
        """Asks and begins to read."""
        reader = self.inbox.open(generate.request_id, generate.attempt, RUNNER)
        accepted: Accepted = await self.bus.request(RUNNER_GENERATE, generate, timeout_s=WAIT_S, runner=RUNNER)
        return Stream(reader, accepted)

    async def cancel(self, request_id: str) -> Cancelled:
        return await self.bus.request(RUNNER_CANCEL, Cancel(request_id=request_id), timeout_s=WAIT_S, runner=RUNNER)


@contextlib.asynccontextmanager
async def gateway_on(server: NatsServer) -> AsyncGenerator[Gateway]:
    """A gateway that listens before any runner starts."""
    bus = NatsBus(server.url, cluster="home", name="gateway")
    await bus.connect()
    inbox = Inbox(bus, GATEWAY, SystemClock())
    statuses = StatusWatch()
    await inbox.start()
    await bus.subscribe(RUNNER_STATUS, statuses, runner=RUNNER)
    try:
        yield Gateway(bus, inbox, statuses)
    finally:
        await inbox.close()
        await bus.close()


@contextlib.asynccontextmanager
async def running(spec: RunnerSpec) -> AsyncGenerator[Child]:
    """A ready runner's process, killed at the end if it still runs."""
    child = child_of(spec)
    await child.start()
    try:
        yield child
    finally:
        child.kill()
        await child.exited
