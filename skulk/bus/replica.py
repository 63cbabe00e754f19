"""A follower's copy of cluster state and view, kept up over the bus. Gateways and nodes hold one each.

    event ──> follow_event ──┐            ┌──> on_change callbacks
    beat  ──> with_*_beat  ──┼──> view ───┤
    status ─> with_runner_ ──┘            └──> wait_for(position), wait_until(predicate)

Where the log has a gap, it asks the master for a snapshot; one question at a time, 0.25 s apart.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from skulk.bus.port import Bus, Received, Subscription
from skulk.bus.subjects import EVENT, MASTER_BEAT, NODE_BEAT, NODE_SNAPSHOT, RUNNER_STATUS
from skulk.clock import Clock
from skulk.cluster.fold import StateHash
from skulk.cluster.follow import Followed, follow_beat, follow_event, follow_snapshot
from skulk.cluster.liveness import MASTER_SILENT_S
from skulk.cluster.view import (
    ClusterView,
    with_master_beat,
    with_node_beat,
    with_runner_status,
    with_state,
    without_lost,
    without_master,
)
from skulk.errors import SkulkError
from skulk.wire.beats import MasterBeat, NodeBeat, RunnerStatus
from skulk.wire.commands import SnapshotRequest
from skulk.wire.events import Event, EventRecord, InstanceCreated, InstanceDeleted
from skulk.wire.state import ClusterState, Position

log = logging.getLogger("skulk.replica")

HISTORY_EVENTS: Final = 1_000
SWEEP_S: Final = 0.5
LATE_SWEEP_S: Final = 1.0
SNAPSHOT_PAUSE_S: Final = 0.25
SNAPSHOT_TIMEOUT_S: Final = 2.0
_COMMANDED: Final = (InstanceCreated, InstanceDeleted)


class Replica:
    """Follows the cluster. Call `start`, then keep `run` going; single event loop, no locks.

    Args:
        bus: where to listen.
        clock: for silence and ages.
        state: what was known before, from disk.
        keeps: a node's: what it knows and the master doesn't is kept until the master has taken it in. A gateway's
            knows nothing that no node knows, and takes what the master says.
        closed: since when the routes to a node are closed, by ``clock``; asked at each sweep.
    """

    def __init__(
        self,
        bus: Bus,
        clock: Clock,
        state: ClusterState | None = None,
        *,
        keeps: bool = False,
        closed: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self._closed = closed
        self._keeps = keeps
        self._bus = bus
        self._clock = clock
        self._view = ClusterView(state=state or ClusterState(cluster=bus.cluster))
        self._hashes = StateHash()
        self._hash = self._hashes.of(self._view.state)
        self._ring: deque[EventRecord] = deque(maxlen=HISTORY_EVENTS)
        self._callbacks: list[Callable[[ClusterView], None]] = []
        self._status_callbacks: list[Callable[[RunnerStatus], None]] = []
        self._node_callbacks: list[Callable[[NodeBeat], None]] = []
        self._master_callbacks: list[Callable[[MasterBeat], None]] = []
        self._changed = asyncio.Event()
        self._snapshot_wanted = asyncio.Event()
        self._subscriptions: list[Subscription] = []
        self._silence_from = clock.now()
        self._is_unmerged = False
        self._taken: ClusterState | None = None

    @property
    def is_unmerged(self) -> bool:
        """The state holds what the master's lacks; it stays until the master has taken it in."""
        return self._is_unmerged

    @property
    def view(self) -> ClusterView:
        """What is known now."""
        return self._view

    @property
    def closed(self) -> dict[str, float]:
        """Seconds since the routes to nodes closed, of those that are closed."""
        now = self._clock.now()
        return {name: round(now - at, 2) for name, at in self._closed().items()}

    @property
    def hash(self) -> str:
        """The digest of the state."""
        return self._hash

    def history(self, limit: int, since: int = 0) -> tuple[EventRecord, ...]:
        """The newest ``limit`` events with a ``seq`` above ``since``, oldest first."""
        found = [record for record in self._ring if record.position.seq > since]
        return tuple(found[-limit:]) if limit > 0 else ()

    def on_change(self, callback: Callable[[ClusterView], None]) -> Callable[[], None]:
        """Calls ``callback`` after each change of the view; it may only look and enqueue. Returns what ends that."""
        self._callbacks.append(callback)
        return lambda: self._callbacks.remove(callback)

    def on_runner_status(self, callback: Callable[[RunnerStatus], None]) -> Callable[[], None]:
        """Calls ``callback`` with each status message as it comes. Returns what ends that."""
        self._status_callbacks.append(callback)
        return lambda: self._status_callbacks.remove(callback)

    def on_node_beat(self, callback: Callable[[NodeBeat], None]) -> Callable[[], None]:
        """Calls ``callback`` with each beat of a node, after the view took it in. Returns what ends that."""
        self._node_callbacks.append(callback)
        return lambda: self._node_callbacks.remove(callback)

    def on_master_beat(self, callback: Callable[[MasterBeat], None]) -> Callable[[], None]:
        """Calls ``callback`` with each beat of any master, followed or not. Returns what ends that."""
        self._master_callbacks.append(callback)
        return lambda: self._master_callbacks.remove(callback)

    def write(self, record: EventRecord, before: ClusterState, after: ClusterState) -> None:
        """Takes in what the own master has just written; nothing is folded again while both hold the same state."""
        if self._view.state is not before:
            self.follow(record)
            return
        self._is_unmerged = False
        self._ring.append(record)
        self._set_state(after)

    def follow(self, record: EventRecord) -> None:
        """Takes in one event of the log."""
        followed = follow_event(self._view.state, record)
        if followed.wants_snapshot:
            self._snapshot_wanted.set()
        if followed.state is not self._view.state:
            self._is_unmerged = False
            self._ring.append(record)
            self._set_state(followed.state)

    def adopt(self, state: ClusterState) -> None:
        """Takes over the state that the own master starts from."""
        self._is_unmerged = False
        self._set_state(state)

    def hear_runners(self, statuses: tuple[RunnerStatus, ...]) -> None:
        """Takes in what a node has told of its runners outside of its beat."""
        view = self._view
        for status in statuses:
            view = with_runner_status(view, status)
        self._set(view)

    def event_of(self, command_id: str) -> Event | None:
        """The event that a client's command became, if it is among the last ones. Cost: O(`HISTORY_EVENTS`)."""
        named = (record.event for record in reversed(self._ring) if isinstance(record.event, _COMMANDED))
        return next((event for event in named if event.command_id == command_id), None)

    async def start(self) -> None:
        """Subscribes; from here on nothing is missed."""
        bus = self._bus
        self._subscriptions = [
            await bus.subscribe(EVENT, self._event_heard),
            await bus.subscribe(MASTER_BEAT, self._master_heard),
            await bus.subscribe(NODE_BEAT, self._node_heard),
            await bus.subscribe(RUNNER_STATUS, self._status_heard),
        ]

    async def close(self) -> None:
        """Ends the subscriptions."""
        for subscription in self._subscriptions:
            await subscription.close()
        self._subscriptions = []

    async def run(self) -> None:
        """Sweeps out what fell silent and fetches snapshots, until cancelled."""
        stop_listening = self._bus.on_state(lambda _state: self._restart_silence())
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._sweep(), name="replica-sweep")
                tasks.create_task(self._fetch_snapshots(), name="replica-snapshots")
        finally:
            stop_listening()

    async def wait_for(self, position: Position, timeout_s: float) -> bool:
        """Waits until the state has reached ``position``; False when the time is up first."""
        return await self.wait_until(lambda view: view.state.position >= position, timeout_s)

    async def wait_until(self, is_true: Callable[[ClusterView], bool], timeout_s: float) -> bool:
        """Waits until the view satisfies a predicate; False when the time is up first."""
        try:
            async with asyncio.timeout(timeout_s):
                while not is_true(self._view):
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _event_heard(self, received: Received[EventRecord]) -> None:
        self.follow(received.message)

    def _master_heard(self, received: Received[MasterBeat]) -> None:
        beat = received.message
        view = with_master_beat(self._view, beat, self._clock.now())
        if view is not self._view:
            self._set(view)
            if follow_beat(view.state, self._hash, beat) and not self._is_taken(beat):
                self._snapshot_wanted.set()
        for callback in tuple(self._master_callbacks):
            callback(beat)

    def _is_taken(self, beat: MasterBeat) -> bool:
        """Whether the state is what the master's snapshot of this position gave: no other would bring it nearer.

        Another version's digest of the same state never is the same.
        """
        return self._taken is self._view.state and beat.position == self._view.state.position

    def _node_heard(self, received: Received[NodeBeat]) -> None:
        self._set(with_node_beat(self._view, received.message, self._clock.now()))
        for callback in tuple(self._node_callbacks):
            callback(received.message)

    def _status_heard(self, received: Received[RunnerStatus]) -> None:
        for callback in tuple(self._status_callbacks):
            callback(received.message)
        self._set(with_runner_status(self._view, received.message))

    def _set_state(self, state: ClusterState) -> None:
        self._hash = self._hashes.of(state)
        self._set(with_state(self._view, state))

    def _set(self, view: ClusterView) -> None:
        self._view = view
        self._changed.set()
        self._changed = asyncio.Event()
        for callback in tuple(self._callbacks):
            callback(view)

    def _restart_silence(self) -> None:
        """Silence counts only while the own connection is up (DESIGN 3)."""
        self._silence_from = self._clock.now()

    async def _sweep(self) -> None:
        while True:
            swept_at = self._clock.now()
            await asyncio.sleep(SWEEP_S)
            if self._clock.now() - swept_at > SWEEP_S + LATE_SWEEP_S:
                # a suspended machine or a blocked loop: what was said meanwhile is still to be read
                self._restart_silence()
            if self._bus.state != "connected":
                continue
            # a server that has stopped answering makes everybody behind it seem silent
            now = self._bus.heard_at
            view = without_lost(self._view, now, self._silence_from, self._closed())
            heard_at = max(view.master_heard_at, self._silence_from)
            if view.master is not None and now - heard_at >= MASTER_SILENT_S:
                view = without_master(view)
            if view is not self._view:
                if lost := sorted(self._view.nodes.keys() - view.nodes.keys()):
                    log.warning("nodes that are lost, for they are silent: %s", ", ".join(lost))
                self._set(view)

    async def _fetch_snapshots(self) -> None:
        while True:
            await self._snapshot_wanted.wait()
            self._snapshot_wanted.clear()
            await self._fetch_snapshot()
            await asyncio.sleep(SNAPSHOT_PAUSE_S)

    async def _fetch_snapshot(self) -> None:
        master = self._view.master
        if master is None:
            return
        question: dict[str, Any] = {"timeout_s": SNAPSHOT_TIMEOUT_S, "node": master.node_id}
        try:
            answer = await self._bus.request(NODE_SNAPSHOT, SnapshotRequest(), **question)
        except SkulkError as error:
            # the master's next beat asks again
            log.info("no snapshot from the master %s: %s", master.node_id, error)
            return
        followed = self._view.master
        if followed is None or answer.state.position.term != followed.term:
            # it was the master no more, or another one is followed by now; whose next beat asks again
            return
        if self._keeps:
            taken = follow_snapshot(self._view.state, self._hash, answer.state, self._clock.wall())
        else:
            taken = Followed(state=answer.state)
        self._is_unmerged = taken.is_unmerged
        if taken.state is not self._view.state:
            self._set_state(taken.state)
        if taken.state.position == answer.state.position:
            self._taken = taken.state
