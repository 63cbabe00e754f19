"""One to nine nodes and two clients on one MemoryBus, a seeded network between them, and every fault that it knows.

``run(seed)`` is the same run each time: time, dice and ids come from the seed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Final, TypeVar

import msgspec

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.replica import Replica
from skulk.bus.subjects import MASTER_DELETE, MASTER_DRAIN, MASTER_PLACE, Endpoint
from skulk.bus.transport import Raw
from skulk.cluster.fold import state_hash
from skulk.cluster.merge import lacks, merge
from skulk.cluster.reconcile import wanted_of
from skulk.errors import SkulkError
from skulk.gateway.masters import Masters
from skulk.wire.commands import DeleteInstance, DeleteReply, DrainNode, PlacementReply, PlaceModel
from skulk.wire.placement import PlacementRequest
from skulk.wire.state import ClusterState, Position, Term
from tests.support.simulated_node import MODELS, Disk, Life, Machine
from tests.support.simulated_witness import Meetings, Witness
from tests.support.states import GIB, card
from tests.support.virtual_time import VirtualClock, VirtualLoop

R = TypeVar("R")

LOST: Final = 0.05
TWICE: Final = 0.05
LATE: Final = 0.2
VERY_LATE: Final = 0.005
CONTROL: Final = ("event", "beat", "status", "election", "master", "node")
BUS_GIVES_UP_S: Final = 3.5


class Client:
    """A gateway's part in placing and deleting."""

    def __init__(self, hub: MemoryHub, name: str, clock: VirtualClock) -> None:
        self.name = name
        self.bus = MemoryBus(hub, cluster="test", name=name, clock=clock)
        self.replica = Replica(self.bus, clock)
        self.masters = Masters(self.bus, self.replica, clock)
        self.task: asyncio.Task[None] | None = None


class SimulatedCluster:
    """The nodes, two clients, the network and the dice.

    Attributes:
        is_rough: messages are lost, doubled and late.
        lives: the nodes that run, by id; a clone runs beside its original under another name.
    """

    def __init__(self, seed: int, nodes: int) -> None:
        self.random = random.Random(seed)
        self.clocks = {f"n{number}": VirtualClock() for number in range(nodes)}
        self.witness = Witness()
        self.hub = MemoryHub(seed=seed)
        self.hub.disturb = self._disturb
        self.is_rough = False
        self.slow: set[str] = set()
        self.cuts: set[tuple[str, str]] = set()
        self.sides: dict[str, int] = {}
        self.disks = {name: Disk() for name in self.clocks}
        self.lives: dict[str, Life] = {}
        self.clones: list[Life] = []
        self.clients = [Client(self.hub, f"client{number}", VirtualClock()) for number in range(2)]
        self.told: dict[str, str] = {}
        self.deleted: set[str] = set()
        self.unsure: set[str] = set()
        self.drained: set[str] = set()
        self.meetings = Meetings(2.5)
        self._apart_until: dict[frozenset[str], float] = {}
        self._asked = 0
        self._watch: asyncio.Task[None] | None = None
        self.loop: VirtualLoop | None = None
        self.story: Callable[[str], None] | None = None

    def note(self, text: str) -> None:
        """A line of the story; `story`, where it is set, is given each."""
        if self.story is not None:
            self.story(f"{self._now():9.3f} {text}")

    # The network

    def _disturb(self, sender: str, receiver: str, message: Raw) -> Sequence[float]:
        tokens = message.subject.split(".")
        is_control = tokens[0] == "skulk" and tokens[3] in CONTROL
        if is_control:
            self.witness.hear(sender, message)
        if sender == receiver:
            return (0.0,)
        if (sender, receiver) in self.cuts or self.sides.get(sender, 0) != self.sides.get(receiver, 0):
            return ()
        extra = self.random.uniform(0.0, 0.4) if self.slow and (sender in self.slow or receiver in self.slow) else 0.0
        if not self.is_rough:
            return (extra + 0.001,)
        dice = self.random.random()
        if dice < LOST:
            return ()
        if dice < LOST + TWICE:
            return (extra, extra + self.random.uniform(0.0, 0.5))
        if dice < LOST + TWICE + VERY_LATE:
            return (self.random.uniform(1.0, 10.0),)
        return (extra + 0.001,) if dice > LATE else (extra + self.random.uniform(0.0, 0.3),)

    # Lives

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.loop = loop
        for client in self.clients:
            await client.replica.start()
            client.task = asyncio.create_task(client.replica.run(), name=client.name)
        for name in self.clocks:
            await self.start_node(name)
        self._watch = asyncio.create_task(self._look(), name="watch")

    async def start_node(self, name: str) -> Life:
        """Starts a node on what its disk holds."""
        machine = Machine(self.random.choice((3, 5, 9)) * GIB, self.random)
        life = self.lives[name] = Life(self.hub, name, name, self.clocks[name], machine, self.disks[name])
        await life.start()
        return life

    async def kill_node(self, name: str) -> None:
        """Ends a node as by SIGKILL."""
        life = self.lives.pop(name)
        await life.kill()

    async def clone_node(self, name: str) -> Life:
        """A second process with the same identity and a copy of the disk."""
        disk = Disk()
        disk.bodies = list(self.disks[name].bodies)
        machine = Machine(5 * GIB, self.random)
        clone = Life(self.hub, f"{name}-clone", name, self.clocks[name], machine, disk)
        self.clones.append(clone)
        await clone.start()
        return clone

    async def stop(self) -> None:
        """Ends everything."""
        tasks = [client.task for client in self.clients if client.task is not None]
        if self._watch is not None:
            tasks.append(self._watch)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for life in (*self.lives.values(), *self.clones):
            await life.kill()
        for client in self.clients:
            await client.bus.close()

    def is_safe_to_lose(self, name: str) -> bool:
        """Whether what a node knows is known elsewhere too, so that its disk may burn."""
        others = [life.state for other, life in self.lives.items() if other != name]
        if not others or name not in self.lives:
            return False
        rest = reduce(merge, others)
        return not lacks(rest, self.lives[name].state, 0.0)

    def age_disk(self, name: str) -> None:
        """Puts an old state on a dead node's disk, of a term higher than any."""
        disk = self.disks[name]
        if len(disk.bodies) < 2:
            return
        old = msgspec.json.decode(self.random.choice(disk.bodies), type=ClusterState)
        term = Term(number=old.position.term.number + 50, node_id=name, incarnation="old")
        aged = msgspec.structs.replace(old, position=Position(term=term, seq=old.position.seq + self.random.randint(0, 5)))
        disk.bodies.append(msgspec.json.encode(aged))

    # Looking

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            self._note_apart()
            self.meetings.look(
                {name for name, life in self.lives.items() if life.is_leading},
                {pair for pair, until in self._apart_until.items() if until > self._now()},
                self._now(),
            )

    def _now(self) -> float:
        return self.clients[0].bus.clock.now()

    def note_trouble(self, seconds: float) -> None:
        """Nobody is held to the time of a meeting for a while."""
        for one in self.clocks:
            for other in self.clocks:
                pair = frozenset((one, other))
                self._apart_until[pair] = max(self._apart_until.get(pair, 0.0), self._now() + seconds)

    def _note_apart(self) -> None:
        """Pairs that can't hear each other now, and half a second more: the next beat has to cross first."""
        assert self.loop is not None
        if self.is_rough or self.slow or self.clones:
            self.note_trouble(1.0)
            return
        for one, life in self.lives.items():
            alone = life.bus.state != "connected" or self.loop.is_frozen(one)
            for other in self.lives:
                is_cut = (one, other) in self.cuts or (other, one) in self.cuts
                if alone or is_cut or self.sides.get(one, 0) != self.sides.get(other, 0):
                    self._apart_until[frozenset((one, other))] = self._now() + 0.6

    def check(self) -> None:
        """Raises what went wrong so far."""
        if self.witness.failure is not None:
            raise self.witness.failure
        if self._watch is not None and self._watch.done():
            self._watch.result()
        for life in (*self.lives.values(), *self.clones):
            assert not life.machine.beyond, f"{life.name}: {life.machine.beyond}"
            if life.failure is not None and life.refusal is None:
                raise AssertionError(f"{life.name} failed") from life.failure

    # Commands

    async def place(self, client: Client, *, ensure: bool = False) -> None:
        """Places a model of a random size."""
        self._asked += 1
        model_id = self.random.choice(MODELS)
        weights = int(self.random.choice((0.1, 0.5, 1.0, 2.0)) * GIB)
        request = PlacementRequest(card=card(model_id, weights_bytes=weights), context_length=2048, n_parallel=1)
        command = PlaceModel(command_id=f"c{self._asked}", request=request, ensure=ensure)
        reply = await self._ask(client, MASTER_PLACE, command)
        if isinstance(reply, PlacementReply) and reply.decision.outcome == "placed":
            self.told[reply.instance_id] = command.command_id

    async def delete(self, client: Client, instance_id: str) -> None:
        """Deletes an instance; without an answer nobody knows whether it is deleted."""
        self._asked += 1
        self.unsure.add(instance_id)
        reply = await self._ask(client, MASTER_DELETE, DeleteInstance(command_id=f"c{self._asked}", instance_id=instance_id))
        if isinstance(reply, DeleteReply):
            self.deleted.add(instance_id)

    async def drain(self, client: Client, name: str, *, undo: bool) -> None:
        """Drains a node or takes that back."""
        self._asked += 1
        await self._ask(client, MASTER_DRAIN, DrainNode(command_id=f"c{self._asked}", node=name, undo=undo))

    async def _ask(self, client: Client, endpoint: Endpoint[object, R], command: object) -> R | SkulkError:
        try:
            return await client.masters.ask(endpoint, command)
        except SkulkError as error:
            return error

    # The end

    def disagreement(self) -> str:
        """What isn't yet as it must be when all is well again; empty where nothing."""
        leading = [name for name, life in self.lives.items() if life.is_leading]
        if len(leading) != 1:
            return f"{leading} lead"
        state = self.lives[leading[0]].state
        digest = state_hash(state)
        for name, replica in self._replicas():
            if replica.hash != digest:
                return f"{name} stands at {replica.view.state.position}, the master at {state.position}"
            if replica.view.master is None or replica.view.master.node_id != leading[0]:
                return f"{name} follows {replica.view.master}"
        for name, life in self.lives.items():
            wanted, running = set(wanted_of(state, name)), set(life.machine.used)
            if wanted != running:
                return f"{name} runs {sorted(running)}, not {sorted(wanted)}"
        return ""

    def _replicas(self) -> list[tuple[str, Replica]]:
        return [
            *((client.name, client.replica) for client in self.clients),
            *((name, life.replica) for name, life in self.lives.items()),
        ]

    def check_kept(self) -> None:
        """No placement that was told is lost, no deletion undone."""
        state = next(life.state for life in self.lives.values() if life.is_leading)
        lost = {name for name in self.told if name not in state.instances} - self.unsure
        assert not lost, f"placements that were told are lost: {lost}"
        undone = self.deleted & state.instances.keys() - self._made_again()
        assert not undone, f"deletions that were told are undone: {undone}"
        for instance in state.instances.values():
            assert instance.assignment is not None or instance.reason, f"{instance.instance_id} is pending without a reason"

    def _made_again(self) -> set[str]:
        """Ids that an ``ensure`` may have used again after their deletion."""
        from skulk.ids import ensured_instance_id

        return {ensured_instance_id(model_id) for model_id in MODELS}
