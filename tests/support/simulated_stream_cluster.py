"""What streams run on in a simulation: runners without an engine, and gateways with all that theirs have."""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Final

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.port import Call
from skulk.bus.streams import Inbox, Outbox, StreamWriter
from skulk.bus.subjects import GATEWAY_BEAT, RUNNER_CANCEL, RUNNER_GENERATE, RUNNER_RESEND
from skulk.bus.transport import Raw
from skulk.cluster.reconcile import Wanted
from skulk.cluster.view import ready_instances
from skulk.errors import RequestError, ServiceError
from skulk.gateway.dispatch import Dispatcher
from skulk.gateway.loading import Loads
from skulk.gateway.run import Generation, Run
from skulk.wire.base import ErrorBody
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
from tests.support.simulated_client import Client
from tests.support.simulated_cluster import SimulatedCluster
from tests.support.simulated_node import MODELS, Machine
from tests.support.states import GIB
from tests.support.virtual_time import OWNER, VirtualClock

MODEL: Final = MODELS[0]
REQUEST_S: Final = 120.0
BURST_S: Final = 1.0
BURST_EVERY_S: Final = 3.0
GAP_S: Final = 4.5
"""2.5 s of silence, the look for it, the question to the next runner and the prompt there."""
POISON: Final = "poison"
"""The prompt that crashes whatever runner computes it."""


class SimulatedRunner:
    """A runner without an engine: token i of every answer is i. Serves as long as `serving` is open.

    What it does is done in a name of its own (`owner`), so that it can hang while its node lives.
    """

    def __init__(self, cluster: StreamCluster, machine: Machine, name: str, wanted: Wanted) -> None:
        self._cluster = cluster
        self._machine = machine
        self.runner_id = wanted.assignment.runner_id
        self.node_id = name
        self.owner = f"{name}/{self.runner_id}"
        self._context = contextvars.copy_context()
        self._context.run(OWNER.set, self.owner)
        self.bus = self._context.run(
            lambda: MemoryBus(cluster.hub, cluster="test", name=name, clock=cluster.clocks[name])
        )
        self.outbox = Outbox(self.bus, self.runner_id, cluster.clocks[name])
        self.answers: dict[tuple[str, int], Accepted] = {}
        self.open: dict[tuple[str, int], tuple[StreamWriter, asyncio.Task[None]]] = {}

    @asynccontextmanager
    async def serving(self) -> AsyncGenerator[None]:
        """Takes requests inside."""
        handlers = {RUNNER_GENERATE: self._generate, RUNNER_CANCEL: self._cancel, RUNNER_RESEND: self._resend}
        await self.bus.serve("runner", handlers, runner=self.runner_id)
        await self.bus.subscribe(GATEWAY_BEAT, lambda beat: self.outbox.gateway_heard(beat.message))
        tasks = [
            asyncio.create_task(work, context=self._context, name=self.owner)
            for work in (self.outbox.run(), self._keep_up())
        ]
        self._cluster.runners.append(self)
        process = self._machine.serving_now[self.runner_id]
        try:
            yield
            if process.is_dead:
                return
            for writer, _ in self.open.values():
                writer.end(StreamEnd(reason="error", error=ErrorBody.of(ServiceError("draining", "stopped"))))
            await asyncio.sleep(0.2)
        finally:
            self._cluster.runners.remove(self)
            is_gone = self._machine.is_off or process.is_dead
            if is_gone:
                self.bus.memory.hub.forget(self.bus.memory)
                self.bus.memory.break_off("closed")
            for task in (*tasks, *(task for _, task in self.open.values())):
                task.cancel()
            assert self._cluster.loop is not None
            self._cluster.loop.thaw(self.owner)
            if not is_gone:
                await self.bus.close()

    def hang(self) -> None:
        """Says and does nothing from now on, and lives."""
        assert self._cluster.loop is not None
        self._machine.serving_now[self.runner_id].hangs_since = self._cluster.now()
        self._cluster.loop.freeze(self.owner)

    def _crash(self, asked: Generate) -> None:
        """Takes down with it whatever it works at."""
        self._cluster.crashes += 1
        self._cluster.hit.update(_text_of(writer.request) for writer, _ in self.open.values())
        self._machine.serving_now[self.runner_id].die(f"{asked.request_id} crashed it")

    async def _generate(self, call: Call[Generate]) -> Accepted:
        asked = call.message
        key = (asked.request_id, asked.attempt)
        if key not in self.answers:
            self._end(asked.request_id)
            self._cluster.resumed[asked.request_id] += asked.resume is not None
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
        if _text_of(asked) == POISON:
            self._crash(asked)
            return
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


def _text_of(asked: Generate) -> str:
    assert isinstance(asked.prompt, TextPrompt)
    return asked.prompt.text


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
        self.open: dict[str, Run] = {}

    async def run(self, dice: random.Random) -> None:
        await self.inbox.start()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.inbox.run())
            tasks.create_task(super().run(dice))

    async def ask(self, tokens: int, leave_after: int | None = None, text: str = "p") -> None:
        """One request, read as a client reads it; ``leave_after`` so many tokens it goes away.

        Raises:
            AssertionError: a token came twice, not at all or too late.
            SkulkError: the error that the client is told.
        """
        generation = Generation(
            model_id=MODEL,
            prompt=TextPrompt(text=text),
            sampling=Sampling(seed=1),
            limits=Limits(max_tokens=tokens),
        )
        async with self.dispatcher.begin(generation, REQUEST_S) as run:
            self.open[run.request_id] = run
            try:
                got = await self._read(run, tokens if leave_after is None else leave_after)
            finally:
                self.open.pop(run.request_id, None)
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
    """Nodes, some of them with a replica of the model, and two gateways.

    Attributes:
        crashes: runners that a poisonous request has taken down; ``hit``: how often each prompt was worked at there.
        resumed: how often runners were asked to go on with a request, by its id.
        is_lossy: chunks, life signs and resends are lost, doubled and late.
        prefill_s: how long a prompt takes at most.
        runners: those that serve now.
    """

    def __init__(self, seed: int, nodes: int) -> None:
        super().__init__(seed, nodes)
        self.crashes = 0
        self.hit: Counter[str] = Counter()
        self.resumed: Counter[str] = Counter()
        self.is_lossy = False
        self.prefill_s = 1.0
        self.runners: list[SimulatedRunner] = []
        self.gateways = [Gateway(self.hub, client.name, VirtualClock()) for client in self.clients]
        self.clients = list(self.gateways)

    def machine_for(self, name: str) -> Machine:
        machine = Machine(9 * GIB, self.random)
        machine.speaks = True
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

    def freeze(self, name: str) -> None:
        """A node stands still with its runners."""
        assert self.loop is not None
        self.note_pause(name)
        for owner in self._owners(name):
            self.loop.freeze(owner)

    def thaw(self, name: str) -> None:
        """It goes on."""
        assert self.loop is not None
        for owner in self._owners(name):
            self.loop.thaw(owner)

    def _owners(self, name: str) -> list[str]:
        return [name, *(runner.owner for runner in self.runners if runner.node_id == name)]

    def hosts(self) -> tuple[str, ...]:
        """The nodes that run something."""
        return tuple(name for name, life in self.lives.items() if life.machine.used)

    def orphaned(self) -> list[str]:
        """Requests that a runner works at and nobody reads."""
        read = {request_id for gateway in self.gateways for request_id in gateway.open}
        return sorted(key[0] for runner in self.runners for key in runner.open if key[0] not in read)
