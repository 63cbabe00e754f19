"""Streams through lost messages, lost runners and lost gateways: the real inboxes, outboxes and dispatchers (DESIGN 6).

A seed is one of three stories, each with its own demand besides "once and in order":

    messages   chunks, life signs and resends are lost, doubled and late   every answer whole, at its first runner
    runners    a node dies or stands still, another has a replica          every answer whole, no gap above 4.5 s
    gateways   clients leave, a gateway dies or comes back as another one  6.5 s later no runner works for the gone
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Final
from unittest import mock

import msgspec

from skulk.bus import core
from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.port import Call
from skulk.bus.streams import Inbox, Outbox, StreamWriter
from skulk.bus.subjects import GATEWAY_BEAT, MASTER_PLACE, RUNNER_CANCEL, RUNNER_GENERATE, RUNNER_RESEND
from skulk.bus.transport import Raw
from skulk.cluster.reconcile import Wanted
from skulk.cluster.view import ready_instances
from skulk.errors import RequestError, ServiceError, SkulkError
from skulk.gateway import dispatch
from skulk.gateway.dispatch import Dispatcher
from skulk.gateway.loading import Loads
from skulk.gateway.run import Generation, Run
from skulk.wire.base import ErrorBody
from skulk.wire.commands import PlaceModel
from skulk.wire.gateway import GatewaySpec
from skulk.wire.generation import (
    Accepted,
    Cancel,
    Cancelled,
    Generate,
    Limits,
    Resend,
    Resent,
    Sampling,
    StreamEnd,
    TextPrompt,
)
from skulk.wire.model import ModelCard
from skulk.wire.placement import PlacementRequest
from tests.support.simulated_client import Client
from tests.support.simulated_cluster import SimulatedCluster
from tests.support.simulated_faults import Decoded
from tests.support.simulated_node import MODELS, Machine
from tests.support.states import GIB, card
from tests.support.virtual_time import VirtualClock, VirtualLoop

MODEL: Final = MODELS[0]
REQUEST_S: Final = 120.0
BURST_S: Final = 1.0
BURST_EVERY_S: Final = 3.0
GAP_S: Final = 4.5
"""2.5 s of silence, the look for it, the question to the next runner and the prompt there."""
GONE_S: Final = 6.5
"""5 s of a gateway's silence, its last beat on the way, and the look for it."""


class SimulatedRunner:
    """A runner without an engine: token i of every answer is i. Serves from its making until `run` is cancelled."""

    def __init__(self, cluster: StreamCluster, machine: Machine, name: str, wanted: Wanted) -> None:
        self._cluster = cluster
        self._machine = machine
        self.runner_id = wanted.assignment.runner_id
        self.bus = MemoryBus(cluster.hub, cluster="test", name=name, clock=cluster.clocks[name])
        self.outbox = Outbox(self.bus, self.runner_id, cluster.clocks[name])
        self.answers: dict[tuple[str, int], Accepted] = {}
        self.open: dict[tuple[str, int], tuple[StreamWriter, asyncio.Task[None]]] = {}

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[None]:
        """Takes requests inside."""
        handlers = {RUNNER_GENERATE: self._generate, RUNNER_CANCEL: self._cancel, RUNNER_RESEND: self._resend}
        await self.bus.serve("runner", handlers, runner=self.runner_id)
        await self.bus.subscribe(GATEWAY_BEAT, lambda beat: self.outbox.gateway_heard(beat.message))
        tasks = [asyncio.create_task(self.outbox.run()), asyncio.create_task(self._keep_up())]
        self._cluster.runners.append(self)
        try:
            yield
            for writer, _ in self.open.values():
                writer.end(StreamEnd(reason="error", error=ErrorBody.of(ServiceError("draining", "stopped"))))
            await asyncio.sleep(0.2)
        finally:
            self._cluster.runners.remove(self)
            if self._machine.is_off:
                self.bus.memory.hub.forget(self.bus.memory)
                self.bus.memory.break_off("closed")
            for task in (*tasks, *(task for _, task in self.open.values())):
                task.cancel()
            if not self._machine.is_off:
                await self.bus.close()

    async def _generate(self, call: Call[Generate]) -> Accepted:
        asked = call.message
        key = (asked.request_id, asked.attempt)
        if key not in self.answers:
            self._end(asked.request_id)
            self.answers[key] = Accepted(
                request_id=asked.request_id,
                runner_id=self.runner_id,
                prompt_tokens=3,
                prompt_ids=() if asked.resume is not None else (7, 8, 9),
            )
            writer = self.outbox.open(asked)
            self.open[key] = writer, asyncio.create_task(self._compute(writer), name=f"compute {key}")
        return self.answers[key]

    async def _compute(self, writer: StreamWriter) -> None:
        asked, dice = writer.request, self._machine.dice
        emitted = () if asked.resume is None else asked.resume.emitted_tokens
        writer.set_phase("prefill", 0, 3)
        await asyncio.sleep(dice.uniform(0.1, self._cluster.prefill_s))
        assert asked.limits.max_tokens is not None
        for token in range(len(emitted), asked.limits.max_tokens):
            writer.send(0, f"{token} ", (token,))
            self.outbox.step_finished(self.outbox.clock.now())
            await asyncio.sleep(dice.uniform(0.02, 0.3))
        writer.end(StreamEnd(reason="length"))
        self.open.pop((asked.request_id, asked.attempt), None)

    async def _cancel(self, call: Call[Cancel]) -> Cancelled:
        return Cancelled(request_id=call.message.request_id, was_running=self._end(call.message.request_id))

    async def _resend(self, call: Call[Resend]) -> Resent:
        return self.outbox.resend(call.message)

    def _end(self, request_id: str) -> bool:
        found = [key for key in self.open if key[0] == request_id]
        for key in found:
            writer, task = self.open.pop(key)
            task.cancel()
            writer.end(StreamEnd(reason="cancelled"))
        return bool(found)

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            for request_id in self.outbox.orphans(self.outbox.clock.now()):
                self._end(request_id)


class Gateway(Client):
    """A client with the streams of a gateway."""

    def __init__(self, hub: MemoryHub, name: str, clock: VirtualClock, incarnation: str = "0001") -> None:
        super().__init__(hub, name, clock)
        self.incarnation = incarnation
        spec = GatewaySpec(
            gateway_id=name,
            incarnation=incarnation,
            node_id="n0",
            node_name="n0",
            version="0",
            cluster="test",
            nats_url="",
            models_dir="",
            verified_file="",
        )
        self.inbox = Inbox(self.bus, name, clock)
        loads = Loads(self.masters, self.replica, "off", _card_of)
        self.dispatcher = Dispatcher(self.bus, self.replica, self.inbox, clock, spec, loads)
        self.open: set[str] = set()

    async def run(self, dice: random.Random) -> None:
        await self.inbox.start()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.inbox.run())
            tasks.create_task(super().run(dice))

    async def ask(self, tokens: int, leave_after: int | None = None) -> None:
        """One request, read as a client reads it; ``leave_after`` so many tokens it goes away.

        Raises:
            AssertionError: a token came twice, not at all or too late.
        """
        generation = Generation(
            model_id=MODEL,
            prompt=TextPrompt(text="p"),
            sampling=Sampling(seed=1),
            limits=Limits(max_tokens=tokens),
        )
        async with self.dispatcher.begin(generation, REQUEST_S) as run:
            self.open.add(run.request_id)
            try:
                got = await self._read(run, tokens if leave_after is None else leave_after)
            finally:
                self.open.discard(run.request_id)
        assert leave_after is not None or got == tokens, f"{run.request_id} ended after {got} of {tokens} tokens"

    async def _read(self, run: Run, enough: int) -> int:
        got, read_at = 0, 0.0
        while run.end is None and (got < enough or got == run.generation.limits.max_tokens):
            now = self.bus.clock.now()
            gap_s = now - read_at if read_at else 0.0
            for chunk in await run.take(0.5):
                expected = tuple(range(got, got + len(chunk.tokens)))
                assert chunk.tokens == expected, f"{run.request_id} has {chunk.tokens} where {expected} belongs"
                assert chunk.text == "".join(f"{token} " for token in expected)
                got += len(chunk.tokens)
                run.has_sent, read_at = True, now
            assert gap_s <= GAP_S, f"{run.request_id} stood still for {gap_s:.1f} s"
        assert run.end is None or run.end.error is None, f"{run.request_id} ended with {run.end}"
        return got


async def _card_of(model_id: str) -> ModelCard:
    raise RequestError("model_not_found", model_id)


class StreamCluster(SimulatedCluster):
    """Three nodes, two of them with a replica of the model, and two gateways.

    Attributes:
        is_lossy: chunks, life signs and resends are lost, doubled and late.
        prefill_s: how long a prompt takes at most.
        runners: those that serve now.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed, 3)
        self.is_lossy = False
        self.prefill_s = 1.0
        self.runners: list[SimulatedRunner] = []
        self.gateways = [Gateway(self.hub, client.name, VirtualClock()) for client in self.clients]
        self.clients = list(self.gateways)

    def machine_for(self, name: str) -> Machine:
        machine = Machine(9 * GIB, self.random)
        machine.serving = lambda wanted: SimulatedRunner(self, machine, name, wanted).serving()
        return machine

    def _disturb(self, sender: str, receiver: str, message: Raw) -> Sequence[float]:
        delays = super()._disturb(sender, receiver, message)
        tokens = message.subject.split(".")
        if not self.is_lossy or tokens[0] != "skulk" or not {"stream", "alive", "resend"} & set(tokens):
            return delays
        dice = self.random.random()
        # messages are lost in bursts, as with a server that dies: a hole that may stay for 2.5 s is always mended
        if self.now() % BURST_EVERY_S < BURST_S and dice < 0.5:
            return ()
        if dice < 0.2:
            return (*delays, self.random.uniform(0.0, 1.0))
        return delays if dice < 0.7 else (self.random.uniform(0.0, 0.3),)

    async def until_ready(self, count: int) -> None:
        """Waits for so many replicas, as both gateways see them."""
        async with asyncio.timeout(60.0):
            for gateway in self.gateways:
                await gateway.replica.wait_until(lambda view: len(ready_instances(view, MODEL)) >= count, 60.0)

    async def replace_gateway(self, incarnation: str | None) -> None:
        """The second gateway dies without a word; with an incarnation it is there again at once."""
        gone = self.gateways.pop()
        assert gone.task is not None
        gone.bus.memory.hub.forget(gone.bus.memory)
        gone.bus.memory.break_off("closed")
        gone.task.cancel()
        await asyncio.wait({gone.task})
        self.clients.remove(gone)
        if incarnation is not None:
            fresh = Gateway(self.hub, gone.name, VirtualClock(), incarnation)
            self.gateways.append(fresh)
            self.clients.append(fresh)
            await fresh.replica.start()
            fresh.task = asyncio.create_task(fresh.run(self.random), name=fresh.name)

    def hosts(self) -> tuple[str, ...]:
        """The nodes that run something."""
        return tuple(name for name, life in self.lives.items() if life.machine.used)

    def orphaned(self) -> list[str]:
        """Requests that a runner works at and nobody reads."""
        read = {request_id for gateway in self.gateways for request_id in gateway.open}
        return sorted(key[0] for runner in self.runners for key in runner.open if key[0] not in read)


async def lost_messages(cluster: StreamCluster) -> None:
    """A network that loses, doubles and delays what streams say."""
    cluster.is_lossy, cluster.prefill_s = True, 6.0
    asking = [_asked(cluster, cluster.random.randrange(1, 60)) for _ in range(8)]
    await asyncio.gather(*asking)
    for gateway in cluster.gateways:
        assert not gateway.dispatcher.failovers, f"lost messages cost a runner: {gateway.dispatcher.failovers}"


async def lost_runners(cluster: StreamCluster) -> None:
    """The node of one replica dies or stands still; the other one is well."""
    asking = [asyncio.create_task(_asked(cluster, cluster.random.randrange(20, 120))) for _ in range(8)]
    await asyncio.sleep(cluster.random.uniform(1.0, 8.0))
    victim = cluster.random.choice([name for name in sorted(cluster.lives) if cluster.lives[name].machine.used])
    assert cluster.loop is not None
    if cluster.random.random() < 0.5:
        await cluster.kill_node(victim)
    else:
        cluster.note_pause(victim)
        cluster.loop.freeze(victim)
        await asyncio.sleep(cluster.random.uniform(2.0, 6.0))
        cluster.loop.thaw(victim)
    await asyncio.gather(*asking)


async def lost_gateways(cluster: StreamCluster) -> None:
    """Clients go away in the middle of their answers, and a gateway with all of its own."""
    leaving = [_asked(cluster, 2_000, leave_after=cluster.random.randrange(1, 30)) for _ in range(4)]
    staying = [asyncio.create_task(cluster.gateways[-1].ask(2_000)) for _ in range(3)]
    await asyncio.gather(*leaving)
    fresh = "0002" if cluster.random.random() < 0.5 else None
    await cluster.replace_gateway(fresh)
    await asyncio.sleep(2.5 if fresh else GONE_S)
    orphaned = cluster.orphaned()
    for task in staying:
        task.cancel()
    await asyncio.gather(*staying, return_exceptions=True)
    assert not orphaned, f"runners still work at {orphaned}, which nobody reads"


async def _asked(cluster: StreamCluster, tokens: int, leave_after: int | None = None) -> None:
    await asyncio.sleep(cluster.random.uniform(0.0, 6.0))
    gateway = cluster.random.choice(cluster.gateways)
    try:
        await gateway.ask(tokens, leave_after)
    except SkulkError as error:
        raise AssertionError(f"an answer of {tokens} tokens ended with {error.code}: {error.detail}") from error


STORIES: Final = (lost_messages, lost_runners, lost_gateways)


async def simulate_streams(seed: int) -> None:
    """One story.

    Raises:
        AssertionError: what didn't hold.
    """
    cluster = StreamCluster(seed)
    await cluster.start()
    try:
        async with asyncio.timeout(60.0):
            await cluster.gateways[0].replica.wait_until(lambda view: len(view.nodes) == 3, 60.0)
        plain = card(MODEL, weights_bytes=GIB)
        files = tuple(msgspec.structs.replace(file, sha256="5" * 64) for file in plain.files)
        pinned = msgspec.structs.replace(plain, files=files)
        request = PlacementRequest(card=pinned, context_length=2048, n_parallel=16)
        for number in range(2):
            elsewhere = msgspec.structs.replace(request, excluded_nodes=cluster.hosts())
            command = PlaceModel(command_id=f"p{number}", request=elsewhere)
            await cluster.gateways[0].masters.ask(MASTER_PLACE, command)
        await cluster.until_ready(2)
        async with asyncio.timeout(REQUEST_S * 2):
            await STORIES[seed % len(STORIES)](cluster)
        cluster.check()
    finally:
        await cluster.stop()


def run_streams(seed: int) -> None:
    """`simulate_streams` on a clock of its own."""
    numbers = map("request-{:08d}".format, itertools.count())
    with (
        mock.patch.object(core, "decode", Decoded()),
        mock.patch.object(dispatch, "new_id", side_effect=numbers),
        asyncio.Runner(loop_factory=VirtualLoop) as runner,
    ):
        runner.run(simulate_streams(seed))
