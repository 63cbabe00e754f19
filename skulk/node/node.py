"""The node: speaks every second, runs what the state gives it, answers for its state and its events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from skulk.bus.port import Bus, Call
from skulk.bus.replica import HISTORY_EVENTS, Replica
from skulk.bus.subjects import EVENTS_HISTORY, NODE_BEAT, NODE_RESTART, NODE_SNAPSHOT
from skulk.clock import Clock
from skulk.cluster.liveness import NODE_BEAT_S
from skulk.cluster.reconcile import wanted_of
from skulk.cluster.view import ClusterView
from skulk.errors import RequestError, SkulkError
from skulk.node.hosting import Hosting
from skulk.node.identity import NodeIdentity
from skulk.node.speeds import SpeedBook
from skulk.node.storage import TOUCH_S, StateFile
from skulk.node.twins import Twins
from skulk.wire.base import PROTOCOL
from skulk.wire.beats import (
    DiskFacts,
    EngineFacts,
    HealthReason,
    MeasuredSpeed,
    MemoryFacts,
    NodeBeat,
    Role,
    SystemFacts,
)
from skulk.wire.commands import History, HistoryRequest, RestartNode, RestartReply, Snapshot, SnapshotRequest
from skulk.wire.model import HeldModel
from skulk.wire.state import ClusterState
from skulk.wire.store import DownloadStatus

log = logging.getLogger("skulk.node")

MEASURE_S: Final = 0.5


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """What a node measures of itself for one beat.

    Attributes:
        runner_bytes: memory of each runner's process, by runner id, measured together with ``memory``.
    """

    tags: tuple[str, ...]
    system: SystemFacts
    memory: MemoryFacts
    disk: DiskFacts
    load: float
    models: tuple[HeldModel, ...]
    warnings: tuple[HealthReason, ...]
    runner_bytes: dict[str, int]
    engine: EngineFacts = EngineFacts()


class Meter(Protocol):
    """Measures this machine."""

    async def measure(self, pids: dict[str, int]) -> Measured:
        """Facts as they are now; ``pids``: the runners' processes by runner id. What can't be read is an `OSError`."""
        ...


class NodeRoles(msgspec.Struct, frozen=True, kw_only=True):
    """What a node is told about its place in the cluster.

    Attributes:
        version: of Skulk.
        commit: of the checkout it runs from; empty where it is none.
        routes, api, files: its addresses, ``host:port``; none where it has none.
        hub: it may fetch weights from the hub.
        downloads: weights on their way to its disk.
    """

    version: str
    role: Role
    commit: str = ""
    routes: tuple[str, ...] = ()
    api: str | None = None
    files: str | None = None
    hub: bool = False
    downloads: tuple[DownloadStatus, ...] = ()


class Node:
    """The node role. Keep `run` going.

    Args:
        meter: measures the machine.
        hosting: its runners.
        authority: the master's own state while this node leads, else None.
        roles: asked at each beat, for addresses are known only after the start.
        restart: has the whole node stop in order and start again.
        unreachable: the master that others hear and this node doesn't; empty where there is none.
        speeds: how fast its runners were, over restarts.
        master_heard_at: when a master was last heard before this start, seconds since the epoch; None: never.
    """

    def __init__(
        self,
        bus: Bus,
        replica: Replica,
        clock: Clock,
        identity: NodeIdentity,
        *,
        meter: Meter,
        hosting: Hosting,
        state_file: StateFile,
        authority: Callable[[], ClusterState | None],
        roles: Callable[[], NodeRoles],
        unreachable: Callable[[], str] = lambda: "",
        restart: Callable[[], None] = lambda: None,
        master_heard_at: float | None = None,
        speeds: SpeedBook | None = None,
    ) -> None:
        self._speeds = speeds
        self._unreachable = unreachable
        self._restart = restart
        self._master_heard_at = clock.wall() if master_heard_at is None else master_heard_at
        self._touched_at = clock.now()
        self._bus = bus
        self._replica = replica
        self._clock = clock
        self._identity = identity
        self._meter = meter
        self._hosting = hosting
        self._state_file = state_file
        self._authority = authority
        self._roles = roles
        self._started_at = clock.wall()
        self._measured: Measured | None = None
        self._twins = Twins(identity.node_id, identity.incarnation, self._started_at)

    async def run(self) -> None:
        """Plays the role until cancelled; then its runners are stopped and the state is on disk.

        Raises:
            StartError: ``node_id_in_use``: another process, started before this one, has the same identity.
        """
        replica = self._replica
        stop_nodes = replica.on_node_beat(lambda beat: self._twins.heard(beat, self._clock.now()))
        stop_listening = replica.on_change(self._view_changed)
        stop_statuses = replica.on_runner_status(self._hosting.heard)
        node_id = self._identity.node_id
        node_service = await self._bus.serve(
            "node", {NODE_SNAPSHOT: self._snapshot, NODE_RESTART: self._restarted}, node=node_id
        )
        events_service = await self._bus.serve("events", {EVENTS_HISTORY: self._history}, metadata={"node": node_id})
        self._view_changed(replica.view)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._beat(tasks), name="node-beat")
                tasks.create_task(self._hosting.run(), name="hosting")
                tasks.create_task(self._state_file.run(), name="state-file")
                tasks.create_task(self._twins.stop_for_one(), name="twins")
        finally:
            stop_nodes()
            stop_listening()
            stop_statuses()
            await self._state_file.flush()
            await self._say_goodbye()
            await events_service.close(drain_s=0.0)
            await node_service.close(drain_s=0.0)

    def _view_changed(self, view: ClusterView) -> None:
        if view.master is not None:
            self._master_heard_at = self._clock.wall()
        silent_s = self._clock.wall() - self._master_heard_at
        self._hosting.want(wanted_of(view.state, self._identity.node_id, silent_s))
        self._state_file.offer(view.state)
        if view.master is not None and self._clock.now() - self._touched_at >= TOUCH_S:
            self._touched_at = self._clock.now()
            self._state_file.touch()

    async def _beat(self, tasks: asyncio.TaskGroup) -> None:
        """Speaks every second, with the last facts where measuring takes long or fails: a slow disk is no lost node."""
        measuring: asyncio.Task[None] | None = None
        while True:
            due = self._clock.now() + NODE_BEAT_S
            if measuring is None or measuring.done():
                measuring = tasks.create_task(self._measure(), name="measure")
            await asyncio.wait({measuring}, timeout=MEASURE_S)
            if self._measured is not None:
                await self._speak(self._measured)
            await asyncio.sleep(max(0.0, due - self._clock.now()))

    async def _measure(self) -> None:
        try:
            self._measured = await self._meter.measure(self._hosting.pids())
        except OSError as error:
            log.warning("this machine can't be measured now: %s", error)

    async def _speak(self, measured: Measured) -> None:
        try:
            await self._bus.publish(NODE_BEAT, self._compose(measured), node=self._identity.node_id)
        except SkulkError as error:
            log.info("no beat: %s", error)

    def _compose(self, measured: Measured) -> NodeBeat:
        # not what the runners say of themselves by now: it must go with the memory that was measured
        self._hosting.measured(measured.runner_bytes)
        roles = self._roles()
        view = self._replica.view
        return NodeBeat(
            node_id=self._identity.node_id,
            incarnation=self._identity.incarnation,
            name=self._identity.name,
            version=roles.version,
            commit=roles.commit,
            protocol=PROTOCOL,
            role=roles.role,
            at=self._clock.wall(),
            started_at=self._started_at,
            tags=measured.tags,
            system=measured.system,
            memory=measured.memory,
            disk=measured.disk,
            load=measured.load,
            models=measured.models,
            runners=self._hosting.statuses(),
            warnings=(*measured.warnings, *self._cut_off()),
            position=view.state.position,
            state_hash=self._replica.hash,
            master=None if view.master is None else view.master.node_id,
            route=next(iter(roles.routes), None),
            routes=roles.routes,
            api=roles.api,
            hears=tuple(sorted(view.nodes)),
            files=roles.files,
            hub=roles.hub,
            downloads=roles.downloads,
            unmerged=self._replica.is_unmerged,
            engine=measured.engine,
            speeds=self._speeds_told(),
            closed=self._replica.closed,
        )

    def _speeds_told(self) -> tuple[MeasuredSpeed, ...]:
        if self._speeds is None:
            return ()
        for speed in self._hosting.speeds():
            self._speeds.note(speed)
        self._speeds.save(self._clock.now())
        return self._speeds.told

    def _cut_off(self) -> tuple[HealthReason, ...]:
        master = self._unreachable()
        if not master:
            return ()
        reason = HealthReason(
            level="error",
            code="master_unreachable",
            message=f"this node doesn't hear the master {master}, which other nodes do; it can't place or delete now",
            remediation="Check the network between the two: each must reach the other's route port",
        )
        return (reason,)

    async def _say_goodbye(self) -> None:
        """The last beat: nobody has to wait for this node's silence."""
        if self._measured is None or self._bus.state != "connected":
            return
        beat = msgspec.structs.replace(self._compose(self._measured), leaving=True)
        try:
            await self._bus.publish(NODE_BEAT, beat, node=self._identity.node_id)
        except SkulkError as error:
            log.info("no goodbye: %s", error)

    async def _snapshot(self, call: Call[SnapshotRequest]) -> Snapshot:
        del call
        state = self._authority() or self._replica.view.state
        return Snapshot(node_id=self._identity.node_id, state=state)

    async def _restarted(self, call: Call[RestartNode]) -> RestartReply:
        log.warning("this node is asked to start again")
        self._restart()
        return RestartReply(command_id=call.message.command_id, node_id=self._identity.node_id)

    async def _history(self, call: Call[HistoryRequest]) -> History:
        asked = call.message
        if not 1 <= asked.limit <= HISTORY_EVENTS:
            raise RequestError(
                "invalid_request", f"limit {asked.limit} is not from 1 to {HISTORY_EVENTS}", param="limit"
            )
        return History(node_id=self._identity.node_id, events=self._replica.history(asked.limit, asked.since))
