"""A follower's copy: whose silence counts, how gaps are healed, what it remembers of commands."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager

import msgspec
import pytest

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.port import Call
from skulk.bus.replica import Replica
from skulk.bus.subjects import EVENT, MASTER_BEAT, NODE_BEAT, NODE_SNAPSHOT
from skulk.cluster.fold import fold, state_hash
from skulk.errors import UnavailableError
from skulk.wire.beats import MasterBeat
from skulk.wire.commands import Snapshot, SnapshotRequest
from skulk.wire.events import InstanceCreated, InstanceDeleted
from skulk.wire.state import ClusterState
from tests.support.control_plane import FrozenBus
from tests.support.states import TERM, beat, instance, record, state_of

STATE = state_of(instance(), seq=7)


class SteppingClock:
    """A clock that jumps when a test says so, as a suspended machine's does."""

    def __init__(self) -> None:
        self.jumped_s = 0.0

    def now(self) -> float:
        return asyncio.get_running_loop().time() + self.jumped_s

    def wall(self) -> float:
        return 1_000.0


def master_beat(state: ClusterState) -> MasterBeat:
    return MasterBeat(node_id="aaaa", term=TERM, position=state.position, state_hash=state_hash(state), at=0.0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A liveness table of hundredths of seconds."""
    monkeypatch.setattr("skulk.bus.replica.SWEEP_S", 0.01)
    monkeypatch.setattr("skulk.bus.replica.SNAPSHOT_PAUSE_S", 0.01)
    monkeypatch.setattr("skulk.bus.replica.MASTER_SILENT_S", 0.1)
    monkeypatch.setattr("skulk.cluster.view.NODE_LOST_S", 0.1)


@asynccontextmanager
async def following(
    hub: MemoryHub, clock: SteppingClock | None = None, closed: Callable[[], Mapping[str, float]] = dict
) -> AsyncGenerator[tuple[Replica, FrozenBus, MemoryBus]]:
    """A replica, its bus, and the bus of whoever speaks to it."""
    own = FrozenBus(hub, cluster="test", name="own", clock=clock or SteppingClock())
    speaker = MemoryBus(hub, cluster="test", name="speaker")
    replica = Replica(own, own.clock, closed=closed)
    await replica.start()
    task = asyncio.create_task(replica.run(), name="replica")
    try:
        yield replica, own, speaker
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait({task})
        await replica.close()
        await own.close()
        await speaker.close()


async def hear(replica: Replica, speaker: MemoryBus) -> None:
    """A beat of a master and of its node, heard."""
    await speaker.publish(MASTER_BEAT, master_beat(replica.view.state), node="aaaa")
    await speaker.publish(NODE_BEAT, beat(), node="aaaa")
    assert await replica.wait_until(lambda view: view.master is not None and "aaaa" in view.nodes, 2.0)


async def test_silence_loses_the_master_and_the_nodes() -> None:
    async with following(MemoryHub()) as (replica, _, speaker):
        await hear(replica, speaker)
        assert await replica.wait_until(lambda view: view.master is None and not view.nodes, 2.0)


async def test_closed_routes_lose_a_node_before_its_silence_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skulk.cluster.view.NODE_LOST_S", 3600.0)
    monkeypatch.setattr("skulk.cluster.view.NODE_CLOSED_S", 0.1)
    closed: dict[str, float] = {}
    async with following(MemoryHub(), closed=lambda: closed) as (replica, own, speaker):
        await hear(replica, speaker)
        assert replica.closed == {}
        closed["aaaa"] = own.clock.now() - 0.01
        assert 0.0 < replica.closed["aaaa"] < 2.0
        assert await replica.wait_until(lambda view: not view.nodes, 2.0)


async def test_a_server_that_froze_makes_nobody_silent() -> None:
    async with following(MemoryHub()) as (replica, own, speaker):
        await hear(replica, speaker)
        own.frozen_at = own.heard_at
        assert not await replica.wait_until(lambda view: view.master is None or not view.nodes, 0.3)
        own.frozen_at = None
        assert await replica.wait_until(lambda view: view.master is None and not view.nodes, 2.0)


async def test_a_lost_connection_makes_nobody_silent_and_the_next_begins_anew() -> None:
    hub = MemoryHub()
    async with following(hub) as (replica, own, speaker):
        await hear(replica, speaker)
        hub.disconnect(own)
        assert not await replica.wait_until(lambda view: view.master is None or not view.nodes, 0.3)
        hub.reconnect(own)
        assert await replica.wait_until(lambda view: view.master is None and not view.nodes, 2.0)


async def test_a_suspended_machine_takes_nobody_for_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """After it, the first sweep must not speak before what lay unread."""
    monkeypatch.setattr("skulk.bus.replica.MASTER_SILENT_S", 30.0)
    monkeypatch.setattr("skulk.cluster.view.NODE_LOST_S", 30.0)
    clock = SteppingClock()
    async with following(MemoryHub(), clock) as (replica, _, speaker):
        await hear(replica, speaker)
        clock.jumped_s = 3600.0
        assert not await replica.wait_until(lambda view: view.master is None or not view.nodes, 0.1)


async def test_a_snapshot_that_failed_is_asked_for_again() -> None:
    asked: list[str] = []

    async def answer(call: Call[SnapshotRequest]) -> Snapshot:
        asked.append(call.ids["node"])
        if len(asked) == 1:
            raise UnavailableError("overloaded", "not now")
        return Snapshot(node_id="aaaa", state=STATE)

    async with following(MemoryHub()) as (replica, _, speaker):
        await speaker.serve("node", {NODE_SNAPSHOT: answer}, node="aaaa")
        async with asyncio.timeout(5.0):
            while not await replica.wait_for(STATE.position, 0.05):
                await speaker.publish(MASTER_BEAT, master_beat(STATE), node="aaaa")
        assert len(asked) >= 2
        assert replica.view.state == STATE
        assert replica.hash == state_hash(STATE)


async def test_a_master_that_digests_the_same_state_otherwise_is_asked_once() -> None:
    """A newer version has one more field in its records: no snapshot of it ever has the digest that its beats tell."""
    asked: list[str] = []

    async def answer(call: Call[SnapshotRequest]) -> Snapshot:
        asked.append(call.ids["node"])
        return Snapshot(node_id="aaaa", state=STATE)

    async with following(MemoryHub()) as (replica, _, speaker):
        await speaker.serve("node", {NODE_SNAPSHOT: answer}, node="aaaa")
        other = msgspec.structs.replace(master_beat(STATE), state_hash="f" * 16)
        heard: list[MasterBeat] = []
        replica.on_master_beat(heard.append)
        await speaker.publish(MASTER_BEAT, other, node="aaaa")
        assert await replica.wait_for(STATE.position, 2.0)
        async with asyncio.timeout(5.0):
            while len(heard) < 10:
                await speaker.publish(MASTER_BEAT, other, node="aaaa")
                await replica.wait_until(lambda _view: False, 0.02)
        assert asked == ["aaaa"]


async def test_a_gap_in_the_log_is_healed_from_the_master() -> None:
    async def answer(call: Call[SnapshotRequest]) -> Snapshot:
        del call
        return Snapshot(node_id="aaaa", state=STATE)

    async with following(MemoryHub()) as (replica, _, speaker):
        await speaker.serve("node", {NODE_SNAPSHOT: answer}, node="aaaa")
        await hear(replica, speaker)
        event = InstanceCreated(instance=instance("i9"))
        await speaker.publish(EVENT, record(event, 7), kind="instance_created", subject="i9")
        assert await replica.wait_for(STATE.position, 2.0)
        assert replica.view.state == STATE


async def test_what_the_own_master_writes_is_folded_once_while_both_hold_the_same_state() -> None:
    bus = MemoryBus(MemoryHub(), cluster="test")
    replica = Replica(bus, bus.clock, state_of())
    before = replica.view.state
    created = record(InstanceCreated(instance=instance()), 1)
    after = fold(before, created)
    replica.write(created, before, after)
    assert replica.view.state is after
    assert replica.hash == state_hash(after)
    assert replica.history(10) == (created,)
    deleted = record(InstanceDeleted(instance_id="i1", deleted_at=1.0), 2)
    replica.write(deleted, before, state_of())
    assert replica.view.state == fold(after, deleted), "it stood elsewhere, and follows as any other node"
    await bus.close()


async def test_the_last_events_tell_what_a_command_became() -> None:
    bus = MemoryBus(MemoryHub(), cluster="test")
    replica = Replica(bus, bus.clock, state_of())
    created = InstanceCreated(instance=instance(), command_id="c1")
    deleted = InstanceDeleted(instance_id="i1", deleted_at=1.0, command_id="c2")
    for seq, event in enumerate((created, deleted), start=1):
        replica.follow(record(event, seq))
        replica.follow(record(event, seq))
    assert replica.event_of("c1") == created
    assert replica.event_of("c2") == deleted
    assert replica.event_of("c3") is None
    assert len(replica.history(10)) == 2
    await bus.close()
