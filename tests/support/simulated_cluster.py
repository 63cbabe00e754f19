"""One to nine nodes and two clients on one MemoryBus, a seeded network between them, and every fault that it knows.

``run(seed)`` is the same run each time: time, dice and ids come from the seed.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, Final, TypeVar

import msgspec

from skulk.bus.memory_bus import MemoryHub
from skulk.bus.replica import Replica
from skulk.bus.subjects import MASTER_DELETE, MASTER_DRAIN, MASTER_PLACE, Endpoint
from skulk.bus.transport import Raw
from skulk.cluster.fold import state_hash
from skulk.cluster.merge import lacks, merge
from skulk.cluster.reconcile import wanted_of
from skulk.cluster.view import drain_of, with_state
from skulk.errors import SkulkError
from skulk.ids import ensured_instance_id
from skulk.wire.commands import DeleteInstance, DeleteReply, DrainNode, PlacementReply, PlaceModel
from skulk.wire.events import EventRecord
from skulk.wire.placement import PlacementRequest
from skulk.wire.state import ClusterState, Position, Term
from tests.support.simulated_client import Client
from tests.support.simulated_node import MODELS, Disk, Life, Machine
from tests.support.simulated_versions import Version
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
CLOSED_LOST_S: Final = 2.0 + 0.5 + 0.2
"""2 s since the routes closed, the next look at that, and what was still on its way."""
DRIFT: Final = 0.001
"""A quartz is ten times better; what goes wrong by it shows sooner so."""


class SimulatedCluster:
    """The nodes, two clients, the network and the dice.

    Attributes:
        dice: of what its kind adds to the story, so that the rest of it stays the same.
        may_clone: homes may be copied in its story.
        is_rough: messages are lost, doubled and late.
        lives: the nodes that run, by id; a clone runs beside its original under another name.
        closes_routes: a node that dies closes its routes, as a process does; else it is only silent, as without power.
    """

    may_clone = True

    def __init__(self, seed: int, nodes: int) -> None:
        self.random = random.Random(seed)
        self.dice = random.Random(seed ^ 0xD1CE)
        drifts = random.Random(seed ^ 0x5EED)
        is_drifting = drifts.random() < 0.5
        self.clocks = {
            f"n{number}": VirtualClock(1.0 + is_drifting * drifts.uniform(-DRIFT, DRIFT)) for number in range(nodes)
        }
        self.witness = Witness(self)
        self.hub = MemoryHub(seed=seed)
        self.hub.disturb = self._disturb
        self.is_rough = False
        self.closes_routes = seed % 4 == 1
        self._closed_at: dict[str, float] = {}
        self._rough_at = -1e9
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
        self._beat_at: dict[tuple[str, str], float] = {}
        self._leads_since: dict[str, float] = {}
        self._paused: dict[Term, float] = {}
        self._paused_at: dict[str, float] = {}
        self._asked = 0
        self._watch: asyncio.Task[None] | None = None
        self.loop: VirtualLoop | None = None
        self.story: Callable[[str], None] | None = None

    def note(self, text: str) -> None:
        """A line of the story; `story`, where it is set, is given each."""
        if self.story is not None:
            self.story(f"{self.now():9.3f} {text}")

    # The network

    def _disturb(self, sender: str, receiver: str, message: Raw) -> Sequence[float]:
        tokens = message.subject.split(".")
        is_control = tokens[0] == "skulk" and tokens[2] == "v1" and tokens[3] in CONTROL
        if is_control:
            self.witness.hear(sender, message)
        delays = self._delays(sender, receiver)
        if delays and tokens[3:5] == ["beat", "node"]:
            pair = (sender.removesuffix("-clone"), receiver)
            self._beat_at[pair] = max(self._beat_at.get(pair, 0.0), self.now() + max(delays))
        return delays

    def _delays(self, sender: str, receiver: str) -> Sequence[float]:
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
            client.task = asyncio.create_task(client.run(self.random), name=client.name)
        for name in self.clocks:
            await self.start_node(name)
        self._watch = asyncio.create_task(self._look(), name="watch")

    async def start_node(self, name: str) -> Life:
        """Starts a node on what its disk holds."""
        machine = self.machine_for(name)
        clock = self.clocks[name]
        self._closed_at.pop(name, None)
        life = self.lives[name] = Life(
            self.hub,
            name,
            name,
            clock,
            machine,
            self.disks[name],
            lambda: self._closed_for(name, clock),
            self.version_for(name),
        )
        self._note_apart_from(name)
        await life.start()
        return life

    def machine_for(self, name: str) -> Machine:
        """What a node that starts runs on."""
        del name
        return Machine(self.random.choice((3, 5, 9)) * GIB, self.random)

    def version_for(self, name: str) -> Version:
        """The version that a node that starts is of."""
        del name
        return ""

    async def kill_node(self, name: str) -> None:
        """Ends a node as by SIGKILL."""
        life = self.lives.pop(name)
        if self.closes_routes:
            self._closed_at[name] = self.now()
        await life.kill()

    def _closed_for(self, name: str, clock: VirtualClock) -> Mapping[str, float]:
        """Since when routes are closed, by a node's own clock; what a partition hides it doesn't see close."""
        side = self.sides.get(name, 0)
        seen = {other: at for other, at in self._closed_at.items() if self.sides.get(other, 0) == side}
        return {other: at * clock.rate for other, at in seen.items()}

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
        old = ClusterState.opened(msgspec.json.decode(self.random.choice(disk.bodies)))
        term = Term(number=old.position.term.number + 50, node_id=name, incarnation=f"old{len(disk.bodies)}")
        aged = msgspec.structs.replace(
            old, position=Position(term=term, seq=old.position.seq + self.random.randint(0, 5))
        )
        disk.bodies.append(msgspec.json.encode(aged))

    # Looking

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            now = self.now()
            self._note_apart()
            leading = {name for name, life in self.lives.items() if life.is_leading}
            self._leads_since = {name: self._leads_since.get(name, now) for name in leading}
            for name in leading:
                assert self.lives[name].bus.state == "connected", f"{name} leads without a bus"
            self._check_closed(now)
            self.meetings.look(leading, {pair for pair, until in self._apart_until.items() if until > now}, now)

    def _check_closed(self, now: float) -> None:
        """A node whose routes closed isn't waited for as one that is only silent."""
        if self.is_rough or self.slow or self.sides or self.clones:
            self._rough_at = now
        if now - self._rough_at < 12.0:
            return  # its last words may be on their way still
        for gone, closed_at in self._closed_at.items():
            for name, life in self.lives.items():
                paused_at = self._paused_at.get(name, -1e9)
                is_late = now - max(closed_at, life.born_at, paused_at + 15.0) > CLOSED_LOST_S
                if is_late and life.bus.state == "connected" and not self._is_frozen(name):
                    assert gone not in life.replica.view.nodes, f"{name} still counts {gone}, whose routes closed"

    def _is_frozen(self, name: str) -> bool:
        assert self.loop is not None
        return self.loop.is_frozen(name)

    def now(self) -> float:
        return self.clients[0].bus.clock.now()

    def note_trouble(self, seconds: float) -> None:
        """Nobody is held to what takes a quiet network for a while."""
        for one in self.clocks:
            for other in self.clocks:
                pair = frozenset((one, other))
                self._apart_until[pair] = max(self._apart_until.get(pair, 0.0), self.now() + seconds)

    def _note_apart(self) -> None:
        """Pairs that can't hear each other now, and half a second more: the next beat has to cross first."""
        if self.is_rough or self.slow or self._two_of_one():
            self.note_trouble(1.0)
        apart = {pair for name in self.clocks for pair in self._pairs_apart(name)}
        for pair in apart:
            self._apart_until[pair] = max(self._apart_until.get(pair, 0.0), self.now() + 0.6)

    def _clone_lives(self) -> bool:
        return any(clone.refusal is None for clone in self.clones)

    def _two_of_one(self) -> bool:
        """Whether a clone and its original both speak under one name."""
        originals = ((clone, self.lives.get(clone.node_id)) for clone in self.clones if clone.refusal is None)
        return any(original is not None and original.refusal is None for _, original in originals)

    def _note_apart_from(self, name: str) -> None:
        for other in self.clocks:
            pair = frozenset((name, other))
            self._apart_until[pair] = max(self._apart_until.get(pair, 0.0), self.now() + 1.0)

    def _pairs_apart(self, one: str) -> set[frozenset[str]]:
        assert self.loop is not None
        others = [name for name in self.clocks if name != one]
        life = self.lives.get(one)
        if life is None or life.bus.state != "connected" or self.loop.is_frozen(one):
            return {frozenset((one, other)) for other in others}
        return {
            frozenset((one, other))
            for other in others
            if (one, other) in self.cuts
            or (other, one) in self.cuts
            or self.sides.get(one, 0) != self.sides.get(other, 0)
        }

    def note_pause(self, name: str) -> None:
        """A node is suspended, or has lost its bus: the term that it leads now, if any, is over."""
        life = self.lives.get(name)
        self._paused_at[name] = self.now()
        self._note_apart_from(name)  # its silence begins anew, however short the break
        if life is not None and life.is_leading:
            self._paused.setdefault(life.state.position.term, self.now())

    # What the witness asks

    def have_heard(self, one: str, other: str) -> bool:
        return (
            one in self.lives
            and other in self.lives
            and self.now() > self._apart_until.get(frozenset((one, other)), 0.0) + 2.4
        )

    def better_than(self, candidate: str) -> str:
        if candidate in self._leads_since or self.now() - self._paused_at.get(candidate, -1e9) < 5.0:
            return ""
        quiet = (name for name in self.lives if name < candidate and self.have_heard(candidate, name))
        return next((name for name in quiet if not self.lives[name].replica.view.state.partial), "")

    def others_hear(self, candidate: str) -> str:
        if candidate in self._leads_since or candidate not in self.lives:
            return ""
        for master, since in self._leads_since.items():
            if master not in self.lives or not self.lives[master].is_leading or self.now() - since < 3.0:
                continue
            between = (name for name in self.lives if self.have_heard(candidate, name))
            if any(name == master or self.have_heard(name, master) for name in between):
                return master
        return ""

    def is_stale(self, record: EventRecord, writer: str) -> bool:
        paused_at = self._paused.get(record.position.term)
        if paused_at is None or writer not in self.clocks:
            return False
        written_at = self.clocks[writer].true_time(record.at)
        return paused_at + 0.15 < written_at <= self.now() + 0.01

    def is_minority(self, name: str) -> bool:
        life, counted = self.lives.get(name), self.counted()
        if life is None or len(life.replica.view.known) < len(counted):
            return False
        others = counted - {name}
        far = sum(1 for other in others if self.now() - self._beat_at.get((other, name), -1e9) >= 6.0)
        return 2 * (len(counted) - far) < len(counted)

    def counted(self) -> set[str]:
        """The nodes that a side may be a minority of."""
        return set(self.clocks)

    def digest_of(self, sender: str, position: Position, told: str) -> str:
        """The digest of what every version must know at a position; empty where that can't be told."""
        del sender, position
        return told

    def knows_foreign(self, sender: str, node_id: str) -> bool:
        """Whether a node that places hears that another one is of an incompatible version."""
        del sender, node_id
        return False

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
        clone_lived = self._clone_lives()
        reply = await self._ask(client, MASTER_PLACE, command)
        if isinstance(reply, PlacementReply) and reply.decision.outcome == "placed":
            self.told[reply.instance_id] = command.command_id
            if clone_lived or self._clone_lives():
                # a clone that stops takes what only it knew along
                self.unsure.add(reply.instance_id)

    async def delete(self, client: Client, instance_id: str) -> None:
        """Deletes an instance; without an answer nobody knows whether it is deleted."""
        self._asked += 1
        self.unsure.add(instance_id)
        reply = await self._ask(
            client, MASTER_DELETE, DeleteInstance(command_id=f"c{self._asked}", instance_id=instance_id)
        )
        if isinstance(reply, DeleteReply) and not self._clone_lives():
            self.deleted.add(instance_id)

    async def drain(self, client: Client, name: str, *, undo: bool) -> None:
        """Drains a node or takes that back."""
        self._asked += 1
        await self._ask(client, MASTER_DRAIN, DrainNode(command_id=f"c{self._asked}", node=name, undo=undo))

    async def _ask(self, client: Client, endpoint: Endpoint[Any, R], command: object) -> R | SkulkError:
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
            if not self.is_like(replica, state, digest):
                return f"{name} stands at {replica.view.state.position}, the master at {state.position}"
            if replica.view.master is None or replica.view.master.node_id != leading[0]:
                return f"{name} follows {replica.view.master}"
        for name, life in self.lives.items():
            wanted, running = set(wanted_of(state, name)), set(life.machine.used)
            if wanted != running:
                return f"{name} runs {sorted(running)}, not {sorted(wanted)}"
        return self._misplaced(self.lives[leading[0]])

    def is_like(self, replica: Replica, state: ClusterState, digest: str) -> bool:
        """Whether a copy is the master's state, whose digest is given."""
        del state
        return replica.hash == digest

    def may_return(self, name: str) -> bool:
        """Whether a node that doesn't run is to run again in the end."""
        del name
        return True

    async def side_story(self) -> None:
        """What its kind adds to the rough times, until it is cancelled."""

    async def last_story(self) -> None:
        """What its kind does once all has come together."""

    def _misplaced(self, master: Life) -> str:
        """An instance that lies where it shouldn't, or nowhere though a node fits."""
        view = with_state(master.replica.view, master.state)
        for instance in view.state.instances.values():
            node = None if instance.assignment is None else instance.assignment.node_id
            if node is not None and node in self.lives and drain_of(view, node) is None:
                continue
            if node is not None and node in self.lives:
                return f"{instance.instance_id} is on {node}, which is drained"
            if master.fits(view, instance, self.witness.refused):
                where = "is pending" if node is None else f"is on {node}, which is lost,"
                return f"{instance.instance_id} {where} though a node fits"
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
            assert instance.assignment is not None or instance.reason, (
                f"{instance.instance_id} is pending without a reason"
            )

    def _made_again(self) -> set[str]:
        """Ids that an ``ensure`` may have used again after their deletion."""
        return {ensured_instance_id(model_id) for model_id in MODELS}
