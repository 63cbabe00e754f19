"""A gateway on a real socket over MemoryBus, and a scripted cluster (master, node, runner) beyond the bus."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from aiohttp import web
from multidict import CIMultiDictProxy

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.port import Bus, Call, Service
from skulk.bus.streams import Outbox, StreamWriter
from skulk.bus.subjects import (
    EVENT,
    EVENTS_HISTORY,
    MASTER_BEAT,
    MASTER_DELETE,
    MASTER_PLACE,
    MASTER_PREVIEW,
    NODE_BEAT,
    NODE_RESTART,
    NODE_SNAPSHOT,
    RUNNER_CANCEL,
    RUNNER_DETOKENIZE,
    RUNNER_EMBED,
    RUNNER_GENERATE,
    RUNNER_RESEND,
    RUNNER_STATUS,
    RUNNER_TOKENIZE,
)
from skulk.clock import SystemClock
from skulk.cluster.fold import fold, state_hash
from skulk.errors import SkulkError
from skulk.gateway.app import build_app
from skulk.gateway.http import listen_on
from skulk.gateway.keys import DISPATCHER, REPLICA
from skulk.gateway.process import listen
from skulk.models.catalogue import EMBEDDED_MODEL, Catalogue
from skulk.wire.base import ErrorBody
from skulk.wire.beats import MasterBeat, RunnerPhase, RunnerStatus
from skulk.wire.commands import (
    DeleteInstance,
    DeleteReply,
    History,
    HistoryRequest,
    PlacementReply,
    PlaceModel,
    PreviewPlacement,
    RestartNode,
    RestartReply,
    Snapshot,
    SnapshotRequest,
)
from skulk.wire.embedding import Detokenize, Detokenized, Embed, Embedded, Tokenize, Tokenized
from skulk.wire.events import Event, EventRecord, InstanceAssigned, InstanceCreated, InstanceDeleted, TermBegan
from skulk.wire.gateway import GatewaySpec
from skulk.wire.generation import Accepted, Cancel, Cancelled, Generate, StreamEnd, Timings, Usage
from skulk.wire.placement import NodeReport, PlacementDecision
from skulk.wire.state import ClusterState, Instance, Position, Term
from tests.support.states import assignment, beat, card, estimate, instance, status

NODE = "aaaa"
MODEL = EMBEDDED_MODEL
WAIT_S = 10.0
TERM = Term(number=1, node_id=NODE, incarnation="0001")
END = StreamEnd(
    reason="stop",
    usage=Usage(prompt_tokens=5, completion_tokens=2, cached_tokens=1),
    timings=Timings(queue_s=0.0, prefill_s=0.5, decode_s=0.25),
)

Script = Callable[["FakeRunner", StreamWriter], Awaitable[None]]


async def two_words(runner: FakeRunner, writer: StreamWriter) -> None:
    """The usual answer: two chunks and the end, for every choice."""
    del runner
    for choice in range(writer.request.n):
        writer.send(choice, "Hello", (1,))
        writer.send(choice, " world", (2,), finish_reason="stop")
    writer.end(END)


async def hold(runner: FakeRunner, writer: StreamWriter) -> None:
    """One chunk, then nothing until the runner is told to cancel."""
    writer.send(0, "Hello", (1,))
    async with asyncio.timeout(WAIT_S):
        await runner.cancelled.wait()
    writer.end(StreamEnd(reason="cancelled", usage=END.usage))


class FakeRunner:
    """A runner whose answers a test scripts; its outbox is the real one.

    Attributes:
        asked: every `Generate` as it came.
        refusal: what to answer instead of accepting.
        held_back: accepting waits for it.
    """

    def __init__(self, bus: Bus, runner_id: str) -> None:
        self.bus = bus
        self.runner_id = runner_id
        self.script: Script = two_words
        self.refusal: SkulkError | None = None
        self.held_back: asyncio.Event | None = None
        self.asked: list[Generate] = []
        self.writers: list[StreamWriter] = []
        self.asked_once = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.cancels: list[str] = []
        self.outbox = Outbox(bus, runner_id, SystemClock())
        self._tasks: set[asyncio.Task[Any]] = set()
        self._service: Service | None = None

    async def start(self) -> None:
        self._own(self.outbox.run())
        self._service = await self.bus.serve(
            "runner",
            {
                RUNNER_GENERATE: self._generate,
                RUNNER_CANCEL: self._cancel,
                RUNNER_RESEND: self._resend,
                RUNNER_EMBED: self._embed,
                RUNNER_DETOKENIZE: self._detokenize,
                RUNNER_TOKENIZE: self._tokenize,
            },
            runner=self.runner_id,
        )

    async def die(self) -> None:
        """Goes without a word, as a killed process does."""
        if self._service is not None:
            await self._service.close(drain_s=0.0)
            self._service = None
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))

    def _own(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _generate(self, call: Call[Generate]) -> Accepted:
        self.asked.append(call.message)
        self.asked_once.set()
        if self.held_back is not None:
            await self.held_back.wait()
        if self.refusal is not None:
            raise self.refusal
        if not self.outbox.knows(call.message.request_id, call.message.attempt):
            self.writers.append(self.outbox.open(call.message))
            self._own(self.script(self, self.writers[-1]))
        prompt_ids = () if call.message.resume is not None else (7, 8, 9)
        return Accepted(
            request_id=call.message.request_id, runner_id=self.runner_id, prompt_tokens=5, prompt_ids=prompt_ids
        )

    async def _cancel(self, call: Call[Cancel]) -> Cancelled:
        known = any(call.message.request_id in (asked.request_id, asked.part_of) for asked in self.asked)
        self.cancels.append(call.message.request_id)
        if known:
            self.cancelled.set()
        return Cancelled(request_id=call.message.request_id, was_running=known)

    async def _resend(self, call: Call[Any]) -> Any:
        return self.outbox.resend(call.message)

    async def _embed(self, call: Call[Embed]) -> Embedded:
        """Each input's number and a quarter."""
        vectors = tuple(struct.pack("<2f", index, 0.25) for index in range(len(call.message.inputs)))
        return Embedded(vectors=vectors, prompt_tokens=3)

    async def _tokenize(self, call: Call[Tokenize]) -> Tokenized:
        words = call.message.text.split()
        return Tokenized(tokens=tuple(range(len(words))), pieces=tuple(word.encode() for word in words))

    async def _detokenize(self, call: Call[Detokenize]) -> Detokenized:
        return Detokenized(text="".join(f"<{token}>" for token in call.message.tokens))


class FakeCluster:
    """One node that leads and holds what the test says."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.state = ClusterState(cluster=bus.cluster)
        self.records: list[EventRecord] = []
        self.histories = 0
        self.restarts = 0
        self.statuses: dict[str, RunnerStatus] = {}
        self.runners: dict[str, FakeRunner] = {}
        self.models: tuple[str, ...] = (MODEL,)
        self.placed: list[PlaceModel] = []
        self.deleted: list[DeleteInstance] = []
        self.previewed: list[PreviewPlacement] = []
        self.refusal: SkulkError | None = None
        self.decision = PlacementDecision(
            outcome="placed",
            nodes=(NODE,),
            reason="placed on host-aaaa",
            reports=(
                NodeReport(
                    node_id=NODE,
                    name="host-aaaa",
                    backend="llama_cpp-cpu",
                    context_length=4096,
                    n_parallel=4,
                    kv_cells=4096,
                    memory=estimate(),
                    available_bytes=1 << 30,
                    score={"room": 1.0},
                ),
            ),
        )
        self.leads = True
        self.more_of_beat: dict[str, Any] = {}
        self._services: list[Service] = []
        self._beats: asyncio.Task[None] | None = None

    async def start(self) -> None:
        serve = self.bus.serve
        self._services = [
            await serve(
                "master",
                {MASTER_PLACE: self._place, MASTER_PREVIEW: self._preview, MASTER_DELETE: self._delete},
                node=NODE,
            ),
            await serve("node", {NODE_SNAPSHOT: self._snapshot, NODE_RESTART: self._restart}, node=NODE),
            await serve("events", {EVENTS_HISTORY: self._history}),
        ]
        self._beats = asyncio.create_task(self._beat())
        await self.append(TermBegan(state_hash=state_hash(self.state)))

    async def close(self) -> None:
        assert self._beats is not None
        self._beats.cancel()
        await asyncio.wait({self._beats})
        for runner in self.runners.values():
            await runner.die()
        for service in self._services:
            await service.close(drain_s=0.0)
        await self.bus.close()

    async def beat(self) -> None:
        """One beat of the node, and of the master where it leads."""
        spoken = beat(NODE, models=self.models, runners=tuple(self.statuses.values()))
        spoken = msgspec.structs.replace(spoken, **self.more_of_beat)
        await self.bus.publish(NODE_BEAT, spoken, node=NODE)
        if self.leads:
            spoken = MasterBeat(
                node_id=NODE, term=TERM, position=self.state.position, state_hash=state_hash(self.state), at=0.0
            )
            await self.bus.publish(MASTER_BEAT, spoken, node=NODE)

    async def append(self, event: Event) -> None:
        """Writes an event and sends it."""
        record = EventRecord(position=Position(term=TERM, seq=self.state.position.seq + 1), at=1000.0, event=event)
        self.state = fold(self.state, record)
        self.records.append(record)
        await self.bus.publish(EVENT, record, kind=str(type(event).__struct_config__.tag), subject="x")

    async def say(self, spoken: RunnerStatus) -> None:
        """A runner's status, as its supervisor tells it."""
        self.statuses[spoken.runner_id] = spoken
        await self.bus.publish(RUNNER_STATUS, spoken, runner=spoken.runner_id)

    async def serve_model(
        self,
        instance_id: str = "i1",
        *,
        model_id: str = MODEL,
        phase: RunnerPhase = "ready",
        size_bytes: int = 0,
        active: int = 0,
    ) -> FakeRunner:
        """An instance with a runner in that phase, at work for so many.

        ``size_bytes``: of its weights, where they are others than usual.
        """
        made = instance(instance_id, model_id=model_id)
        if size_bytes:
            weights = card(model_id, weights_bytes=size_bytes)
            made = msgspec.structs.replace(made, request=msgspec.structs.replace(made.request, card=weights))
        await self.append(InstanceCreated(instance=made))
        assigned = assignment(instance_id, node_id=NODE)
        await self.append(InstanceAssigned(instance_id=instance_id, assignment=assigned))
        runner = self.runners[assigned.runner_id] = FakeRunner(self.bus, assigned.runner_id)
        await runner.start()
        await self.set_phase(instance_id, phase, active=active)
        return runner

    async def run_placed(self) -> FakeRunner:
        """A ready runner of the one instance that the master was asked to place."""
        (instance_id,) = self.state.instances
        assigned = self.state.instances[instance_id].assignment
        assert assigned is not None
        runner = self.runners[assigned.runner_id] = FakeRunner(self.bus, assigned.runner_id)
        await runner.start()
        await self.set_phase(instance_id, "ready")
        return runner

    async def set_phase(self, instance_id: str, phase: RunnerPhase, **fields: Any) -> None:
        """Changes the phase of an instance's runner."""
        found = self.state.instances[instance_id]
        assert found.assignment is not None
        known = self.statuses.get(found.assignment.runner_id)
        since = 1.0 if known is None else known.since + 1.0
        spoken = status(found.assignment, phase, instance_id=instance_id, model_id=found.model_id, since=since)
        await self.say(msgspec.structs.replace(spoken, **fields))

    async def set_gone(self, runner_id: str) -> None:
        """A runner was stopped: its node says so and names it no more."""
        spoken = self.statuses.pop(runner_id)
        await self.bus.publish(RUNNER_STATUS, msgspec.structs.replace(spoken, phase="stopped"), runner=runner_id)
        await self.beat()

    async def kill(self, instance_id: str, detail: str = "killed by signal 9") -> None:
        """A runner dies, and its supervisor says so."""
        found = self.state.instances[instance_id]
        assert found.assignment is not None
        await self.runners[found.assignment.runner_id].die()
        await self.set_phase(instance_id, "failed", error=ErrorBody(code="runner_failed", detail=detail))

    async def _beat(self) -> None:
        while True:
            with contextlib.suppress(SkulkError):
                await self.beat()
            await asyncio.sleep(0.2)

    async def _snapshot(self, call: Call[SnapshotRequest]) -> Snapshot:
        del call
        return Snapshot(node_id=NODE, state=self.state)

    async def _restart(self, call: Call[RestartNode]) -> RestartReply:
        self.restarts += 1
        return RestartReply(command_id=call.message.command_id, node_id=NODE)

    async def _history(self, call: Call[HistoryRequest]) -> History:
        self.histories += 1
        wanted = [record for record in self.records if record.position.seq > call.message.since]
        return History(node_id=NODE, events=tuple(wanted[-call.message.limit :]))

    async def _place(self, call: Call[PlaceModel]) -> PlacementReply:
        command = call.message
        self.placed.append(command)
        if self.refusal is not None:
            raise self.refusal
        instance_id = command.instance_id or f"new-{len(self.placed)}"
        names = (instance_id, *(f"{instance_id}-{number}" for number in range(2, command.replicas + 1)))
        for name in names if self.decision.outcome == "placed" else ():
            await self.append(InstanceCreated(instance=Instance(instance_id=name, request=command.request)))
            await self.append(InstanceAssigned(instance_id=name, assignment=assignment(name, node_id=NODE)))
        return PlacementReply(
            command_id=command.command_id,
            instance_id=instance_id,
            instance_ids=names,
            decision=self.decision,
            position=self.state.position,
            warnings=self.decision.warnings,
        )

    async def _preview(self, call: Call[PreviewPlacement]) -> PlacementDecision:
        self.previewed.append(call.message)
        return self.decision

    async def _delete(self, call: Call[DeleteInstance]) -> DeleteReply:
        self.deleted.append(call.message)
        await self.append(InstanceDeleted(instance_id=call.message.instance_id, deleted_at=1.0))
        return DeleteReply(
            command_id=call.message.command_id,
            instance_id=call.message.instance_id,
            position=self.state.position,
        )


class Gateway:
    """A running gateway, a client of it, and the cluster behind it."""

    def __init__(
        self, hub: MemoryHub, app: web.Application, cluster: FakeCluster, address: tuple[str, int], bus: MemoryBus
    ) -> None:
        self.hub = hub
        self.app = app
        self.cluster = cluster
        self.address = address
        self.bus = bus
        self.url = f"http://{address[0]}:{address[1]}"
        self.client = aiohttp.ClientSession(self.url)
        self.waits = _event_at(app[DISPATCHER], "_wait")
        self.asks = _event_at(bus, "request")

    @property
    def view(self) -> Any:
        return self.app[REPLICA].view

    async def sees(self, is_so: Callable[[Any], bool]) -> None:
        """Waits until the gateway's own view is so."""
        assert await self.app[REPLICA].wait_until(is_so, WAIT_S), "the gateway never saw it"

    async def serve_model(self, instance_id: str = "i1", **how: Any) -> FakeRunner:
        """An instance that the gateway knows of."""
        runner = await self.cluster.serve_model(instance_id, **how)
        await self.sees(lambda view: runner.runner_id in view.runners and instance_id in view.state.instances)
        return runner

    async def set_phase(self, instance_id: str, phase: RunnerPhase, **fields: Any) -> None:
        """A phase that the gateway knows of."""
        await self.cluster.set_phase(instance_id, phase, **fields)
        wanted = self.cluster.state.instances[instance_id].assignment
        assert wanted is not None
        await self.sees(lambda view: view.runners[wanted.runner_id].phase == phase)

    async def call(self, method: str, path: str, body: Any = None, **how: Any) -> Answer:
        """One request; ``body`` as JSON, bytes as they are."""
        if body is not None:
            how["data"] = body if isinstance(body, bytes) else msgspec.json.encode(body)
        async with self.client.request(method, path, **how) as response:
            return Answer(response.status, response.headers, await response.read())

    async def chat(self, **fields: Any) -> Answer:
        """One chat request."""
        return await self.call("POST", "/v1/chat/completions", chat_body(**fields))

    @asynccontextmanager
    async def open_chat(self, **fields: Any) -> AsyncGenerator[aiohttp.ClientResponse]:
        """A chat stream, read by the test."""
        body = msgspec.json.encode(chat_body(stream=True, **fields))
        async with self.client.post("/v1/chat/completions", data=body) as response:
            yield response


def _event_at(owner: Any, method: str) -> asyncio.Event:
    """An event that is set when a method of ``owner`` is called."""
    called, plain = asyncio.Event(), getattr(owner, method)

    def noted(*args: Any, **named: Any) -> Any:
        called.set()
        return plain(*args, **named)

    setattr(owner, method, noted)
    return called


class Answer(msgspec.Struct, frozen=True):
    """An answer that was read whole."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The envelope's inside, checked to be exactly the four fields; beside it only how far a load is."""
        whole = self.json
        assert set(whole) - {"loading"} == {"error"}, whole
        assert set(whole["error"]) == {"message", "type", "param", "code"}, whole
        return whole["error"]


def chat_body(**fields: Any) -> dict[str, Any]:
    """A chat request with these fields changed."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "Name three rivers."}], **fields}


def events_of(body: bytes) -> list[Any]:
    """The JSON of each event in SSE bytes; ``[DONE]`` as that text, comments as ``:`` and their text."""
    found: list[Any] = []
    for block in body.decode().split("\n\n")[:-1]:
        if block.startswith(":"):
            found.append(block)
            continue
        data = block.removeprefix("data: ")
        found.append(data if data == "[DONE]" else msgspec.json.decode(data))
    return found


def spec(home: Path, **changes: Any) -> GatewaySpec:
    """A gateway's instruction for tests."""
    plain = GatewaySpec(
        gateway_id="g-aaaa",
        incarnation="00000001",
        node_id=NODE,
        node_name="host-aaaa",
        version="0.1.0",
        cluster="test",
        nats_url="",
        models_dir=str(home / "models"),
        verified_file=str(home / "verified.json"),
        load_wait_s=WAIT_S,
        request_timeout_s=30.0,
    )
    return msgspec.structs.replace(plain, **changes)


@asynccontextmanager
async def running_gateway(home: Path, **changes: Any) -> AsyncGenerator[Gateway]:
    """A gateway on a free port of loopback that has heard its master."""
    hub = MemoryHub()
    cluster = FakeCluster(MemoryBus(hub, cluster="test", name="cluster"))
    bus = MemoryBus(hub, cluster="test", name="gateway")
    told = spec(home, **changes)
    catalogue = Catalogue(Path(told.models_dir), verified_file=Path(told.verified_file))
    catalogue.rescan()
    app = build_app(told, bus, catalogue, SystemClock())
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
    listening = listen("127.0.0.1", 0)
    await cluster.start()
    await runner.setup()
    server = await listen_on(runner, listening)
    gateway = Gateway(hub, app, cluster, listening.getsockname()[:2], bus)
    try:
        await cluster.beat()
        await gateway.sees(
            lambda view: (
                view.master is not None and NODE in view.nodes and view.state.position == cluster.state.position
            )
        )
        yield gateway
    finally:
        server.close()
        await gateway.client.close()
        await runner.cleanup()
        await cluster.close()
        await bus.close()
