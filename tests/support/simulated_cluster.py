"""One to three nodes and a client on one MemoryBus, a seeded network between them, and a witness of all they say."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeVar

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.replica import Replica
from skulk.bus.subjects import EVENT, MASTER_BEAT, MASTER_DELETE, MASTER_PLACE, NODE_BEAT, Endpoint
from skulk.bus.transport import Raw
from skulk.cluster.reconcile import wanted_of
from skulk.errors import SkulkError
from skulk.gateway.masters import Masters
from skulk.node.storage import StateFile
from skulk.wire.base import decode
from skulk.wire.commands import DeleteInstance, DeleteReply, PlacementReply, PlaceModel
from skulk.wire.events import InstanceCreated, InstanceDeleted
from skulk.wire.placement import PlacementRequest
from skulk.wire.state import Position, Term
from tests.support.control_plane import FakeMachine, FakeNode, FrozenBus
from tests.support.states import card
from tests.support.virtual_time import VirtualClock

R = TypeVar("R")

LOST: Final = 0.05
TWICE: Final = 0.05
LATE: Final = 0.2
CONTROL: Final = ("event", "beat", "status")


class NoFile(StateFile):
    """Writes nothing: a thread has no place in virtual time."""

    def __init__(self) -> None:
        super().__init__(Path())

    async def flush(self) -> bool:
        return True


class Witness:
    """Hears everything as it is sent, and checks what must hold at every moment."""

    def __init__(self) -> None:
        self.writers: dict[Term, str] = {}
        self.hashes: dict[Position, str] = {}
        self.created: dict[str, set[str]] = {}
        self.deleted: set[str] = set()

    def hear(self, sender: str, message: Raw) -> None:
        plane, noun = message.subject.split(".")[3:5]
        if plane == "event" and message.reply == "":
            self._event(sender, message.body)
        elif (plane, noun) == ("beat", "master"):
            beat = decode(message.body, MASTER_BEAT.payload)
            self._writes(beat.term, sender)
            self._stands(beat.position, beat.state_hash)
        elif (plane, noun) == ("beat", "node"):
            beat = decode(message.body, NODE_BEAT.payload)
            self._stands(beat.position, beat.state_hash)

    def _event(self, sender: str, body: bytes) -> None:
        record = decode(body, EVENT.payload)
        self._writes(record.position.term, sender)
        if isinstance(record.event, InstanceCreated):
            self.created.setdefault(record.event.command_id, set()).add(record.event.instance.instance_id)
        if isinstance(record.event, InstanceDeleted):
            self.deleted.add(record.event.instance_id)

    def _writes(self, term: Term, sender: str) -> None:
        assert self.writers.setdefault(term, sender) == sender, f"two writers of {term}"

    def _stands(self, position: Position, digest: str) -> None:
        if position.seq:
            assert self.hashes.setdefault(position, digest) == digest, f"two states at {position}"


class SimulatedCluster:
    """The nodes, a client, and the dice.

    Args:
        leaders: how many of the nodes may lead.
    """

    def __init__(self, seed: int, nodes: int, leaders: int) -> None:
        self.random = random.Random(seed)
        self.clock = VirtualClock()
        self.witness = Witness()
        self.hub = MemoryHub(seed=seed)
        self.hub.disturb = self._disturb
        self.is_rough = True
        self.nodes = [self._node(f"node{number}", can_lead=number < leaders) for number in range(nodes)]
        self.client = MemoryBus(self.hub, cluster="test", name="client", clock=self.clock)
        self.replica = Replica(self.client, self.clock)
        self.masters = Masters(self.client, self.replica, self.clock)
        self.failure: BaseException | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._asked = 0

    def _node(self, name: str, *, can_lead: bool) -> FakeNode:
        bus = FrozenBus(self.hub, cluster="test", name=name, clock=self.clock)
        return FakeNode(bus, NoFile(), name, FakeMachine(), patience_s=1.5, can_lead=can_lead)

    def _disturb(self, sender: str, receiver: str, message: Raw) -> Sequence[float]:
        tokens = message.subject.split(".")
        is_control = tokens[0] == "skulk" and tokens[3] in CONTROL
        if is_control:
            try:
                self.witness.hear(sender, message)
            except AssertionError as error:
                self.failure = self.failure or error
        dice = self.random.random()
        if not self.is_rough or sender == receiver or not is_control:
            return (0.0,) if dice > LATE or not self.is_rough else (self.random.uniform(0.0, 0.1),)
        if dice < LOST:
            return ()
        if dice < LOST + TWICE:
            return (0.0, self.random.uniform(0.0, 0.5))
        return (0.0,) if dice > LATE else (self.random.uniform(0.0, 0.3),)

    async def start(self) -> None:
        for name, replica, run in (
            ("client", self.replica, self.replica.run),
            *((node.bus.name, node.replica, node.run) for node in self.nodes),
        ):
            await replica.start()
            self._tasks.append(asyncio.create_task(run(), name=name))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for bus in (self.client, *(node.bus for node in self.nodes)):
            await bus.close()

    def check(self) -> None:
        """Raises what went wrong so far."""
        if self.failure is not None:
            raise self.failure
        for task in self._tasks:
            assert not task.done(), f"{task.get_name()} ended by itself: {task}"

    async def place(self, *, ensure: bool = False) -> tuple[PlaceModel, PlacementReply | SkulkError]:
        """One command from a client; its answer, or why there is none."""
        self._asked += 1
        request = PlacementRequest(card=card(weights_bytes=1_000_000), context_length=256, n_parallel=1)
        command = PlaceModel(command_id=f"c{self._asked}", request=request, ensure=ensure)
        return command, await self._ask(MASTER_PLACE, command)

    async def delete(self, instance_id: str) -> tuple[DeleteInstance, DeleteReply | SkulkError]:
        """One deletion from a client."""
        self._asked += 1
        command = DeleteInstance(command_id=f"c{self._asked}", instance_id=instance_id)
        return command, await self._ask(MASTER_DELETE, command)

    async def _ask(
        self, endpoint: Endpoint[PlaceModel, R] | Endpoint[DeleteInstance, R], command: object
    ) -> R | SkulkError:
        try:
            return await self.masters.ask(endpoint, command)
        except SkulkError as error:
            return error

    async def break_one(self) -> None:
        """One of them loses its server for a while."""
        bus = self.random.choice([self.client, *(node.bus for node in self.nodes)])
        if bus.state == "connected":
            self.hub.disconnect(bus)
            await asyncio.sleep(self.random.uniform(0.05, 4.0))
            self.hub.reconnect(bus)

    def agree(self) -> bool:
        """Whether all have one state, and every node runs what it says."""
        states = [self.replica.view.state, *(node.replica.view.state for node in self.nodes)]
        runs = all(
            set(wanted_of(states[0], node.bus.name))
            == {status.runner_id for status in node.hosting.statuses() if status.phase == "accepted"}
            for node in self.nodes
        )
        return runs and all(state == states[0] for state in states)
