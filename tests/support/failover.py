"""Replicas that are killed for real: runner processes on real nats-servers, and a gateway that a client streams from.

    client ── HTTP ──> gateway of the test's own ──> nats-server a ── runner "a"  (asked first; it is the one that dies)
                                                        │ route
                                                     nats-server b ── runner "b"

What the control plane would say (assignments, a supervisor's word) is said by `FakeCluster`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from skulk.bus.nats_bus import NatsBus
from skulk.bus.port import Received
from skulk.bus.subjects import RUNNER_STATUS
from skulk.clock import SystemClock
from skulk.engines.fake import FakeOptions
from skulk.gateway.app import build_app
from skulk.gateway.http import listen_on
from skulk.gateway.keys import DISPATCHER, REPLICA
from skulk.gateway.process import listen
from skulk.gateway.run import Run
from skulk.models.catalogue import EMBEDDED_MODEL, Catalogue
from skulk.supervision.child import Child
from skulk.wire.base import ErrorBody
from skulk.wire.beats import RunnerStatus
from skulk.wire.events import InstanceAssigned, InstanceCreated
from skulk.wire.runner import RunnerSpec
from skulk.wire.state import Instance
from tests.support.http import FakeCluster, chat_body, events_of, spec
from tests.support.runner_processes import child_of
from tests.support.runners import spec_of
from tests.support.states import assignment, instance

WAIT_S = 30.0
MODEL = EMBEDDED_MODEL


class Heard:
    """What a client has read of a stream: its bytes, and the text of each choice so far."""

    def __init__(self) -> None:
        self.body = b""

    @property
    def events(self) -> list[Any]:
        return events_of(self.body)

    def texts(self) -> dict[int, str]:
        """The text of each choice."""
        texts: dict[int, str] = {}
        for event in self.events:
            for choice in event.get("choices", []) if isinstance(event, dict) else []:
                texts[choice["index"]] = texts.get(choice["index"], "") + (choice["delta"].get("content") or "")
        return texts

    def plain(self) -> dict[int, list[Any]]:
        """The events of each choice, and under -1 what belongs to none, without what no two answers have in common.

        That is ids, times, statistics, and how much of the prompt was computed before.
        """
        events: dict[int, list[Any]] = {}
        for event in self.events:
            if isinstance(event, dict):
                plain = {name: value for name, value in event.items() if name not in ("id", "created")}
                if plain.get("usage"):
                    plain["usage"] = {**plain["usage"], "prompt_tokens_details": None}
                choices = [choice["index"] for choice in event["choices"]]
                events.setdefault(choices[0] if choices else -1, []).append(plain)
            elif not event.startswith(":"):
                events.setdefault(-1, []).append(event)
        return events

    @property
    def is_whole(self) -> bool:
        return self.body.endswith(b"data: [DONE]\n\n")


class Replicas:
    """A gateway and runner processes that serve one model."""

    def __init__(self, folder: Path, app: web.Application, bus: NatsBus, cluster: FakeCluster, url: str) -> None:
        self.folder = folder
        self.app = app
        self.bus = bus
        self.cluster = cluster
        self.client = aiohttp.ClientSession(url)
        self.children: dict[str, Child] = {}
        self.specs: dict[str, RunnerSpec] = {}
        self.runs: list[Run] = []

    @property
    def dispatcher(self) -> Any:
        return self.app[DISPATCHER]

    async def serve(self, name: str, told: RunnerSpec) -> None:
        """An instance ``name`` whose runner is a process; returns when the gateway may ask it."""
        await self.cluster.append(InstanceCreated(instance=instance(name, model_id=MODEL)))
        assigned = msgspec.structs.replace(assignment(name, node_id="aaaa"), n_parallel=told.load.n_parallel)
        await self.cluster.append(InstanceAssigned(instance_id=name, assignment=assigned))
        self.specs[name] = msgspec.structs.replace(
            told, runner_id=assigned.runner_id, instance_id=name, node_id="aaaa", model_id=MODEL, cluster="test"
        )
        await self.start(name)

    async def start(self, name: str) -> None:
        """Starts a runner's process, or starts it again."""
        told = self.specs[name]
        child = self.children[name] = child_of(told)
        await child.start()
        await self._sees(
            lambda status: status is not None and status.phase == "ready" and status.restarts == told.restarts, name
        )

    async def _sees(self, is_so: Any, name: str) -> None:
        runner = self.specs[name].runner_id
        assert await self.app[REPLICA].wait_until(lambda view: is_so(view.runners.get(runner)), WAIT_S), name

    async def kill(self, name: str, *, is_told: bool = True) -> None:
        """SIGKILL, unless it is dead already; ``is_told``: its supervisor says so, as soon as it sees it."""
        child = self.children[name]
        if child.exited.done():
            return
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        if is_told:
            await child.exited
            error = ErrorBody(code="runner_failed", detail="killed by signal 9", retryable=True)
            told = self.specs[name]
            await self.cluster.say(
                msgspec.structs.replace(
                    self.cluster.statuses[told.runner_id], phase="failed", error=error, restarts=told.restarts + 1
                )
            )

    async def revive(self, name: str, **changes: Any) -> None:
        """Starts a killed runner again as its supervisor would, perhaps with other settings of its load."""
        told = self.specs[name]
        load = msgspec.structs.replace(told.load, **changes)
        self.specs[name] = msgspec.structs.replace(told, restarts=told.restarts + 1, load=load)
        await self.start(name)

    @asynccontextmanager
    async def open(self, **fields: Any) -> AsyncGenerator[tuple[aiohttp.ClientResponse, Heard]]:
        """A chat stream; what is read of it is heard."""
        body = msgspec.json.encode(chat_body(stream=True, stream_options={"include_usage": True}, **fields))
        async with self.client.post("/v1/chat/completions", data=body) as response:
            assert response.status == 200, await response.text()
            yield response, Heard()

    async def whole(self, **fields: Any) -> Heard:
        """A stream that nobody disturbs."""
        async with self.open(**fields) as (response, heard), asyncio.timeout(WAIT_S):
            heard.body = await response.read()
        assert heard.is_whole, heard.body[-500:]
        return heard

    async def killed_at(self, count: int, kill: Any, **fields: Any) -> Heard:
        """A stream during which ``kill`` is awaited, once ``count`` tokens have come to the gateway."""
        async with self.open(**fields) as (response, heard), asyncio.timeout(WAIT_S):
            while self.tokens_of_last() < count:
                heard.body += await response.content.readany()
            await kill()
            heard.body += await response.read()
        assert heard.is_whole, heard.body[-500:]
        return heard

    def tokens_of_last(self) -> int:
        """Tokens that the gateway has of the newest run."""
        return self.runs[-1].progress.usage(0).completion_tokens if self.runs else 0

    def ids_of_last(self) -> list[tuple[int, ...]]:
        """The token ids that the gateway has of each choice of the newest run."""
        return [choice.emitted_tokens for choice in self.runs[-1].progress.resume(()).choices]


@asynccontextmanager
async def replicas(
    folder: Path, nats_url: str, *, user: str = "", password: str = "", **told: Any
) -> AsyncGenerator[Replicas]:
    """A gateway on a real socket over a real nats-server, and no runner yet."""
    login: dict[str, Any] = {"user": user or None, "password": password or None}
    buses = [NatsBus(nats_url, cluster="test", name=name, **login) for name in ("cluster", "gateway")]
    async with AsyncExitStack() as stack:
        for bus in buses:
            await bus.connect()
            stack.push_async_callback(bus.close)
        cluster = FakeCluster(buses[0])
        await cluster.start()
        stack.push_async_callback(cluster.close)
        await buses[0].subscribe(RUNNER_STATUS, lambda heard: _note(cluster, heard))
        catalogue = Catalogue(folder / "models", verified_file=folder / "verified.json")
        catalogue.rescan()
        app = build_app(spec(folder, **told), buses[1], catalogue, SystemClock())
        server = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
        await server.setup()
        stack.push_async_callback(server.cleanup)
        listening = listen("127.0.0.1", 0)
        accepting = await listen_on(server, listening)
        stack.callback(accepting.close)
        host, port = listening.getsockname()[:2]
        world = Replicas(folder, app, buses[1], cluster, f"http://{host}:{port}")
        stack.push_async_callback(world.client.close)
        stack.push_async_callback(_end, world.children)
        _watch(world)
        assert await app[REPLICA].wait_until(lambda view: view.master is not None and "aaaa" in view.nodes, WAIT_S)
        yield world


def _watch(world: Replicas) -> None:
    """Keeps every run that is begun, for its token ids: clients read text only."""
    find = world.dispatcher._find

    async def noted(run: Run, *rest: Any) -> Any:
        if run not in world.runs:
            world.runs.append(run)
        return await find(run, *rest)

    world.dispatcher._find = noted
    ordered = world.dispatcher._router.ordered

    def by_name(*known: Any) -> tuple[Instance, ...]:
        """The one that is to die is asked first, whatever speaks for another one."""
        return tuple(sorted(ordered(*known), key=lambda instance: instance.instance_id))

    world.dispatcher._router.ordered = by_name


def _note(cluster: FakeCluster, heard: Received[RunnerStatus]) -> None:
    cluster.statuses[heard.message.runner_id] = heard.message


async def _end(children: dict[str, Child]) -> None:
    for child in children.values():
        child.kill()
        await child.exited


def fake_runner(folder: Path, name: str, nats_url: str, *, hang_at: int | None = None, **changes: Any) -> RunnerSpec:
    """A runner of the fake engine; ``hang_at``: a step that doesn't come back, so that exactly those before it did."""
    options = {key: changes.pop(key) for key in tuple(changes) if key in FakeOptions.__struct_fields__}
    return spec_of(
        str(options_file(folder, name, hang_at=hang_at, **options)), nats_url=nats_url, max_waiting=64, **changes
    )


def options_file(folder: Path, name: str, *, hang_at: int | None = None, **options: Any) -> Path:
    """A file of options of the fake engine; one a step at which it hangs."""
    path = folder / f"{name}-{hang_at}.json"
    told: dict[str, Any] = {"answer_tokens": 60, "hang_at_step": hang_at, **options}
    path.write_bytes(msgspec.json.encode(FakeOptions(**told)))
    return path


def assert_same(disturbed: Heard, undisturbed: Heard) -> None:
    """Every event is equal, but for ids, times and statistics."""
    left, right = disturbed.plain(), undisturbed.plain()
    assert left.keys() == right.keys()
    for choice, events in left.items():
        for place, (one, other) in enumerate(zip(events, right[choice], strict=False)):
            assert one == other, f"choice {choice}, event {place} of {len(events)} and {len(right[choice])}"
        assert len(events) == len(right[choice])


def every(count: int, *, step: int) -> Sequence[int]:
    """Token indexes 1 to ``count``, every ``step``-th of them."""
    return range(step, count + 1, step)
