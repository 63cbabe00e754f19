"""A seed's story: rough times with faults at random moments, then all is mended, and the cluster must come together."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from typing import Any, Final
from unittest import mock

from skulk.bus import core
from skulk.wire.base import decode
from tests.support.simulated_cluster import BUS_GIVES_UP_S, SimulatedCluster
from tests.support.simulated_kinds import KINDS, MixedCluster, together
from tests.support.simulated_versions import newer_versions
from tests.support.virtual_time import VirtualLoop

KEPT_MESSAGES: Final = 2_000
ROUGH_S: Final = 25.0
COMMANDS_S: Final = 60.0


async def place(cluster: SimulatedCluster) -> None:
    await cluster.place(cluster.random.choice(cluster.clients))


async def ensure(cluster: SimulatedCluster) -> None:
    await cluster.place(cluster.random.choice(cluster.clients), ensure=True)


async def delete(cluster: SimulatedCluster) -> None:
    client = cluster.random.choice(cluster.clients)
    known = sorted(client.replica.view.state.instances)
    if known:
        await cluster.delete(client, cluster.random.choice(known))


async def drain(cluster: SimulatedCluster) -> None:
    name = cluster.random.choice(sorted(cluster.clocks))
    client = cluster.random.choice(cluster.clients)
    await cluster.drain(client, name, undo=False)
    if cluster.random.random() < 0.7:
        await asyncio.sleep(cluster.random.uniform(0.0, 10.0))
        await cluster.drain(client, name, undo=True)


async def rough_network(cluster: SimulatedCluster) -> None:
    """Loss, duplication, delay, reordering, and messages that come very late."""
    cluster.is_rough = True
    await asyncio.sleep(cluster.random.uniform(2.0, 15.0))
    cluster.is_rough = False


async def slow_node(cluster: SimulatedCluster) -> None:
    name = cluster.random.choice(sorted(cluster.clocks))
    cluster.slow.add(name)
    await asyncio.sleep(cluster.random.uniform(1.0, 10.0))
    cluster.slow.discard(name)


async def partition(cluster: SimulatedCluster) -> None:
    """Two or three sides that hear nothing of each other."""
    count = cluster.random.choice((2, 2, 3))
    names = (*cluster.clocks, *(client.name for client in cluster.clients))
    cluster.sides = {name: cluster.random.randrange(count) for name in sorted(names)}
    await asyncio.sleep(cluster.random.choice((1.0, 4.0, 12.0, 27.0)))
    cluster.sides = {}


async def cut(cluster: SimulatedCluster) -> None:
    """One link, in one direction or both; others stay, so that hearing is not transitive."""
    names = sorted(cluster.clocks)
    if len(names) < 2:
        return
    one, other = cluster.random.sample(names, 2)
    links = {(one, other), (other, one)} if cluster.random.random() < 0.5 else {(one, other)}
    cluster.cuts |= links
    await asyncio.sleep(cluster.random.uniform(1.0, 12.0))
    cluster.cuts -= links


async def crash(cluster: SimulatedCluster) -> None:
    """A node dies; its disk may burn where that loses nothing, or be replaced by an old one of a high term."""
    name = cluster.random.choice(sorted(cluster.clocks))
    if name not in cluster.lives:
        return
    throw = cluster.random.random()
    may_lose = cluster.is_safe_to_lose(name)
    await cluster.kill_node(name)
    if may_lose and throw < 0.3:
        cluster.disks[name].bodies.clear()
    elif may_lose and throw < 0.5:
        cluster.age_disk(name)
    await asyncio.sleep(cluster.random.choice((0.0, 0.5, 3.0, 8.0, 25.0)))
    if name not in cluster.lives:
        await cluster.start_node(name)


async def suspend(cluster: SimulatedCluster) -> None:
    """A node's processes stand still; after a while its server gives its connection up."""
    name = cluster.random.choice(sorted(cluster.clocks))
    life = cluster.lives.get(name)
    loop = cluster.loop
    assert loop is not None
    if life is None or loop.is_frozen(name):
        return
    loop.freeze(name)
    seconds = cluster.random.choice((0.5, 1.3, 2.5, 6.0, 15.0))
    if seconds > 1.2:
        cluster.note_pause(name)
    await asyncio.sleep(seconds)
    if cluster.lives.get(name) is not life:
        return  # it was killed meanwhile; one that was started since may be suspended by itself
    if seconds > BUS_GIVES_UP_S and life.bus.state == "connected":
        loop.thaw(name)
        cluster.hub.disconnect(life.bus)
    else:
        loop.thaw(name)
    if life.bus.state == "disconnected":
        cluster.hub.reconnect(life.bus)


async def outage(cluster: SimulatedCluster) -> None:
    """One of them, or all, lose their server."""
    buses = [*(life.bus for life in cluster.lives.values()), *(client.bus for client in cluster.clients)]
    if cluster.random.random() < 0.6:
        buses = [cluster.random.choice(buses)]
    lost = [bus for bus in buses if bus.state == "connected"]
    for bus in lost:
        cluster.note_pause(bus.name)
        cluster.hub.disconnect(bus)
    await asyncio.sleep(cluster.random.choice((0.05, 0.5, 2.0, 6.0)))
    for bus in lost:
        if bus.state == "disconnected":
            cluster.hub.reconnect(bus)


async def clocks(cluster: SimulatedCluster) -> None:
    """A wall clock jumps."""
    name = cluster.random.choice(sorted(cluster.clocks))
    cluster.clocks[name].wall_offset_s = cluster.random.uniform(-1e6, 1e6)
    await asyncio.sleep(0)


async def clone(cluster: SimulatedCluster) -> None:
    """A copied home runs beside its original, until one of the two has stopped."""
    name = cluster.random.choice(sorted(cluster.clocks))
    if not cluster.may_clone or cluster.clones or name not in cluster.lives or not cluster.disks[name].bodies:
        return
    await cluster.clone_node(name)


async def refuse(cluster: SimulatedCluster) -> None:
    """A node's downloads fail."""
    life = cluster.lives.get(cluster.random.choice(sorted(cluster.clocks)))
    if life is not None:
        life.machine.refuses = True
        await asyncio.sleep(cluster.random.uniform(1.0, 10.0))
        life.machine.refuses = False


Deed = Callable[[SimulatedCluster], Awaitable[None]]
COMMANDS: Final[dict[Deed, int]] = {place: 6, ensure: 2, delete: 3, drain: 1}
FAULTS: Final[dict[Deed, int]] = {
    rough_network: 2,
    slow_node: 1,
    partition: 3,
    cut: 2,
    crash: 4,
    suspend: 3,
    outage: 2,
    clocks: 1,
    refuse: 1,
    clone: 1,
}


async def rough_times(cluster: SimulatedCluster) -> None:
    """Commands and faults at random moments; returns when all of them are over."""
    dice = cluster.random
    chosen = {fault: weight for fault, weight in FAULTS.items() if dice.random() < 0.5} or FAULTS
    pause_s = dice.choice((0.5, 1.0, 2.5))
    running: list[asyncio.Task[None]] = []
    loop = asyncio.get_running_loop()
    end = loop.time() + ROUGH_S
    while loop.time() < end:
        await asyncio.sleep(dice.expovariate(1 / pause_s))
        cluster.check()
        deeds = COMMANDS if dice.random() < 0.6 else chosen
        deed = dice.choices(tuple(deeds), tuple(deeds.values()))[0]
        running.append(asyncio.create_task(_done(deed, cluster), name=deed.__name__))
    async with asyncio.timeout(COMMANDS_S):
        await asyncio.gather(*running)


async def _done(deed: Deed, cluster: SimulatedCluster) -> None:
    cluster.note(deed.__name__)
    await deed(cluster)
    cluster.note(f"{deed.__name__} is over")


async def mended(cluster: SimulatedCluster) -> None:
    """Everything is well again, and every node runs, but one perhaps whose loss takes no knowledge along."""
    cluster.is_rough = False
    cluster.slow.clear()
    cluster.cuts.clear()
    cluster.sides = {}
    for copy in tuple(cluster.clones):
        await asyncio.sleep(8.0)
        original = cluster.lives.get(copy.node_id)
        if original is not None:
            stopped = sum(1 for life in (original, copy) if life.refusal is not None)
            told = [life.refusal for life in (original, copy)]
            assert stopped == 1, f"{stopped} of two nodes with the id {copy.node_id} stopped: {told}"
        await copy.kill()
        cluster.clones.remove(copy)
    for name in cluster.clocks:
        life = cluster.lives.get(name)
        if life is not None and life.refusal is not None:
            await cluster.kill_node(name)
            life = None
        if life is None and cluster.may_return(name):
            await cluster.start_node(name)
    if len(cluster.lives) == len(cluster.clocks) > 1 and cluster.random.random() < 0.3:
        await asyncio.sleep(10.0)
        name = cluster.random.choice(sorted(cluster.clocks))
        if cluster.is_safe_to_lose(name):
            cluster.note(f"{name} stays away")
            await cluster.kill_node(name)


async def simulate(seed: int, nodes: int | None = None) -> None:
    """One story.

    Raises:
        AssertionError: what didn't hold.
    """
    kind = kind_of(seed)
    cluster = kind(seed, nodes or random.Random(~seed).choice((1, 2, 2, 3, 3, 3, 4, 5, 5, 7, 9)))
    await cluster.start()
    try:
        await asyncio.sleep(cluster.random.uniform(0.0, 4.0))
        side = asyncio.create_task(cluster.side_story(), name="side story")
        await rough_times(cluster)
        side.cancel()
        await asyncio.gather(side, return_exceptions=True)
        await mended(cluster)
        await together(cluster)
        cluster.check_kept()
        await cluster.last_story()
        cluster.check()
    finally:
        await cluster.stop()


def kind_of(seed: int) -> type[SimulatedCluster]:
    """What a seed's cluster has beside the faults that every one may have."""
    share = random.Random(seed ^ 0xC1A8E).random()
    return next(kind for limit, kind in KINDS if share < limit)


class Decoded:
    """Decodes each message once, however many receive it: records are frozen, so they can share one."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, bytes], object] = {}

    def __call__(self, body: bytes, kind: Any) -> Any:
        found = self._known.get((kind, body))
        if found is None:
            if len(self._known) >= KEPT_MESSAGES:
                self._known.clear()
            found = self._known[kind, body] = decode(body, kind)
        return found


def run(seed: int, nodes: int | None = None) -> None:
    """`simulate` on a clock of its own."""
    versions = newer_versions() if kind_of(seed) is MixedCluster else contextlib.nullcontext()
    with (
        mock.patch.object(core, "decode", Decoded()),
        versions,
        asyncio.Runner(loop_factory=VirtualLoop) as runner,
    ):
        runner.run(simulate(seed, nodes))
