"""Clusters that have more to their story: nodes of a newer version, or of an incompatible one, or runners that hang.

Each draws from dice of its own, so that the rest of a seed's story is what it is without them.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from skulk.bus.replica import Replica
from skulk.cluster.liveness import RUNNER_SILENT_S, RUNNER_STATUS_S
from skulk.cluster.view import phase_of, with_state
from skulk.placement.decision import place
from skulk.wire.state import ClusterState, Instance, Position, Term
from tests.support.simulated_cluster import SimulatedCluster
from tests.support.simulated_node import Disk, Life, Machine
from tests.support.simulated_versions import FOREIGN, ForeignBus, Version, colours_of, known_hash, paint, whole
from tests.support.states import GIB
from tests.support.virtual_time import VirtualClock

TOGETHER_S: Final = 40.0
ONE_LOOK_S: Final = 0.1
REST_S: Final = 8.0
STABLE_S: Final = 3.0
COLOURS: Final = ("red", "green", "blue")
HANG_NOTICED_S: Final = RUNNER_SILENT_S + 2 * RUNNER_STATUS_S + 0.5
"""The bound, the look for it, and what the runner said last."""


async def together(cluster: SimulatedCluster) -> None:
    """Waits until all agree; that they do within the bound is what is demanded."""
    loop = asyncio.get_running_loop()
    end = loop.time() + TOGETHER_S
    while (why := cluster.disagreement()) and loop.time() < end:
        await asyncio.sleep(0.5)
        cluster.check()
    assert not why, f"after {TOGETHER_S:.0f} s without faults: {why}"
    cluster.check()


class MixedCluster(SimulatedCluster):
    """Some nodes, others at each start, are of a newer version: see `tests.support.simulated_versions`.

    What every version knows of the state is the same wherever the position is. In the end the colours are the same on
    all nodes, also those that know no colours, and survive masters that know none; and nobody asks for snapshots
    without end because another version has another digest of the same state.
    """

    may_clone = False

    def __init__(self, seed: int, nodes: int) -> None:
        super().__init__(seed, nodes)
        self._partial_since: dict[str, tuple[bool, float]] = {}
        self._snapshots = 0

    def version_for(self, name: str) -> Version:
        version: Version = "newer" if self.dice.random() < 0.5 else ""
        self.note(f"{name} is of the {version or 'present'} version")
        return version

    def digest_of(self, sender: str, position: Position, told: str) -> str:
        del told
        life = self.lives.get(sender)
        states = () if life is None else (life.replica.view.state, life.state)
        return next((known_hash(state) for state in states if state.position == position), "")

    def is_like(self, replica: Replica, state: ClusterState, digest: str) -> bool:
        del digest
        return whole(replica.view.state) == whole(state)

    def better_than(self, candidate: str) -> str:
        # not what a node is now counts, but what it was when it was asked
        order = self._order_of(candidate)
        if order is None or candidate in self._leads_since or self.now() - self._paused_at.get(candidate, -1e9) < 5.0:
            return ""
        others = ((name, self._order_of(name)) for name in self.lives if self.have_heard(candidate, name))
        return next((name for name, other in others if other is not None and other < order), "")

    def _order_of(self, name: str) -> tuple[bool, str] | None:
        """A node's place among candidates; None while its state has just become whole or partial."""
        is_partial, since = self._partial_since.get(name, (False, self.now()))
        return (is_partial, name) if self.now() - since > STABLE_S else None

    def _note_apart(self) -> None:
        super()._note_apart()
        seen = {name: self._is_partial(life) for name, life in self.lives.items()}
        before = self._partial_since
        self._partial_since = {
            name: before[name] if name in before and before[name][0] == is_partial else (is_partial, self.now())
            for name, is_partial in seen.items()
        }

    @staticmethod
    def _is_partial(life: Life) -> bool:
        """Whether a node holds what its version doesn't know."""
        return life.version == "" and bool(life.replica.view.state.unknown)

    def _disturb(self, sender: str, receiver: str, message: Any) -> Any:
        self._snapshots += ".node.snapshot." in message.subject
        return super()._disturb(sender, receiver, message)

    async def side_story(self) -> None:
        while True:
            await asyncio.sleep(self.dice.expovariate(1 / 2.0))
            self._paint()

    def _paint(self) -> bool:
        """A master of the newer version, if one leads, gives an instance a colour."""
        for name, life in self.lives.items():
            if life.is_leading and life.version == "newer" and not self._is_frozen(name) and life.state.instances:
                instance_id = self.dice.choice(sorted(life.state.instances))
                colour = self.dice.choice(COLOURS)
                self.note(f"{name} paints {instance_id} {colour}")
                return paint(life.master._leader, life.context, instance_id, colour)
        return False

    async def last_story(self) -> None:
        self._paint()
        await together(self)
        self._snapshots = 0
        await asyncio.sleep(REST_S)
        asked = self._snapshots
        assert asked <= len(self._replicas()), f"{asked} snapshots were asked for in {REST_S} s of rest"
        leading = next(name for name, life in self.lives.items() if life.is_leading)
        state = self.lives[leading].state
        colours = colours_of(state)
        is_minority = 2 * (len(self.lives) - 1) < len(self.clocks)
        if not colours or is_minority or not self.is_safe_to_lose(leading):
            return
        # the next master may know nothing of colours; who joins it then may
        self.note(f"{leading} dies; there are {colours}")
        await self.kill_node(leading)
        await together(self)
        await self.start_node(leading)
        await together(self)
        found = next(life.state for life in self.lives.values() if life.is_leading)
        kept = {name: colour for name, colour in colours.items() if name in found.instances}
        assert colours_of(found) == kept, f"of the colours {kept} there are {colours_of(found)} left"


class ForeignCluster(SimulatedCluster):
    """A node becomes one of an incompatible version for a while, or for good; at times another such one is there, too.

    It is shown as what it is, gets no placements, keeps none, and is no part of anything else.
    """

    may_clone = False

    def __init__(self, seed: int, nodes: int) -> None:
        super().__init__(seed, nodes)
        self.foreign: dict[str, Life] = {}
        self._stays = self.dice.random() < 0.5

    def counted(self) -> set[str]:
        return set(self.clocks) - self.foreign.keys()

    def knows_foreign(self, sender: str, node_id: str) -> bool:
        life = self.lives.get(sender)
        node = None if life is None else life.replica.view.nodes.get(node_id)
        if node is None or node.beat.protocol != FOREIGN or life is None:
            return False
        # what it sends now may have been decided in the moment before it heard that
        return life.bus.clock.now() - node.heard_at > ONE_LOOK_S

    async def start_node(self, name: str) -> Life:
        if name in self.foreign:
            await self.foreign.pop(name).kill()
        return await super().start_node(name)

    async def start_foreign(self, name: str) -> None:
        """Starts a node of the other version on a copy of a node's disk, if there is one."""
        disk = Disk()
        known = self.disks.get(name)
        disk.bodies = [] if known is None else known.bodies[-1:]
        clock = self.clocks.get(name) or VirtualClock()
        self._closed_at.pop(name, None)
        life = Life(self.hub, name, name, clock, Machine(9 * GIB, self.dice), disk, version="foreign")
        assert isinstance(life.bus, ForeignBus)
        term = Term(number=900, node_id=name, incarnation="9")
        life.bus.claims = {
            "master": self.dice.choice(sorted(self.clocks)),
            "unmerged": True,
            "position": {"term": vars_of(term), "seq": 9000},
            "state_hash": "9" * 16,
        }
        self.foreign[name] = life
        await life.start()

    async def side_story(self) -> None:
        if self.dice.random() < 0.5:
            await self.start_foreign("x0")
        while True:
            await asyncio.sleep(self.dice.uniform(2.0, 8.0))
            name = self.dice.choice(sorted(self.clocks))
            if name not in self.lives or not self.is_safe_to_lose(name):
                continue
            self.note(f"{name} comes back as an incompatible version")
            await self.kill_node(name)
            await self.start_foreign(name)
            await asyncio.sleep(self.dice.choice((4.0, 12.0, 20.0)))
            if name in self.foreign:
                self.note(f"{name} comes back as our version")
                await self.start_node(name)

    def may_return(self, name: str) -> bool:
        return not (self._stays and name in self.foreign)

    async def last_story(self) -> None:
        await asyncio.sleep(2.0)
        for name, replica in self._replicas():
            for other in self.foreign:
                node = replica.view.nodes.get(other)
                assert node is not None and node.beat.protocol == FOREIGN, f"{name} doesn't show {other}"
                assert all(status.node_id != other for status in replica.view.runners.values()), f"{other} runs nothing"
        master = next(life for life in self.lives.values() if life.is_leading)
        term = master.state.position.term
        await asyncio.sleep(5.0)
        assert master.is_leading and master.state.position.term == term, f"at rest {term} has ended"
        for instance in master.state.instances.values():
            decision = place(with_state(master.replica.view, master.state), instance.request, master.bus.clock.now())
            filters = {report.node_id: report.filter for report in decision.reports}
            found = {filters.get(other) for other in self.foreign}
            assert found <= {"incompatible"}, f"{sorted(self.foreign)} are {found} to a placement"

    async def stop(self) -> None:
        await super().stop()
        for life in self.foreign.values():
            await life.kill()


class HangingCluster(SimulatedCluster):
    """Runners hang: they live and say nothing. Their node notices in time, kills them, and they come back."""

    may_clone = False  # a copy's runners would speak for those that hang

    def __init__(self, seed: int, nodes: int) -> None:
        super().__init__(seed, nodes)
        self._deaf_at: dict[str, float] = {}

    def machine_for(self, name: str) -> Machine:
        machine = super().machine_for(name)
        machine.speaks = True
        return machine

    async def side_story(self) -> None:
        while True:
            await asyncio.sleep(self.dice.uniform(0.5, 6.0))
            serving = [
                process
                for life in self.lives.values()
                for process in life.machine.serving_now.values()
                if process.hangs_since is None
            ]
            if serving:
                victim = self.dice.choice(sorted(serving, key=lambda process: process.runner_id))
                self.note(f"{victim.runner_id} hangs")
                victim.hangs_since = self.now()

    def _note_apart(self) -> None:
        super()._note_apart()
        for name, life in self.lives.items():
            if life.bus.state != "connected" or self._is_frozen(name):
                self._deaf_at[name] = self.now()
            self._check_hangs(name, life)

    def _check_hangs(self, name: str, life: Life) -> None:
        deaf_at = max(self._deaf_at.get(name, -1e9), self._paused_at.get(name, -1e9) + 1.0)
        for process in life.machine.serving_now.values():
            since = self.now() if process.hangs_since is None else max(process.hangs_since, deaf_at)
            hung_s = self.now() - since
            assert hung_s <= HANG_NOTICED_S, f"{process.runner_id} has been hanging for {hung_s:.1f} s on {name}"

    def disagreement(self) -> str:
        found = super().disagreement()
        if found:
            return found
        master = next(life for life in self.lives.values() if life.is_leading)
        view = with_state(master.replica.view, master.state)
        placed = {found.instance_id: found for name in self.lives for found in _on(view.state, name)}
        phases = {name: phase_of(view, instance) for name, instance in placed.items()}
        return "".join(f"{name} is {phase}; " for name, phase in phases.items() if phase != "ready")


def _on(state: ClusterState, node_id: str) -> list[Instance]:
    found = state.instances.values()
    return [one for one in found if one.assignment is not None and one.assignment.node_id == node_id]


def vars_of(term: Term) -> dict[str, Any]:
    return {"number": term.number, "node_id": term.node_id, "incarnation": term.incarnation}


KINDS: Final[tuple[tuple[float, type[SimulatedCluster]], ...]] = (
    (0.16, MixedCluster),
    (0.30, ForeignCluster),
    (0.42, HangingCluster),
    (1.0, SimulatedCluster),
)
"""Of all seeds, up to which share which cluster."""
