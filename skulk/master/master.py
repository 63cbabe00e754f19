"""The master: campaigns, and while it leads, answers commands and keeps placements up.

ticks, beats, bus ──> election.step ──> BeganTerm   ──> lead: ledger, commands, upkeep
                                    └─> SteppedDown ──> all of that ends
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from skulk.bus.port import Bus, BusState, Call, Service
from skulk.bus.replica import Replica
from skulk.bus.subjects import MASTER_DELETE, MASTER_PLACE, MASTER_PREVIEW
from skulk.clock import Clock
from skulk.cluster.election import BeatHeard, BeganTerm, BusChanged, Election, ElectionInput, Tick, step
from skulk.cluster.view import ClusterView
from skulk.errors import UnavailableError
from skulk.master.commands import Commands
from skulk.master.leader import Leader
from skulk.master.upkeep import Rules
from skulk.wire.beats import MasterBeat
from skulk.wire.commands import DeleteInstance, DeleteReply, PlacementReply, PlaceModel, PreviewPlacement
from skulk.wire.placement import PlacementDecision
from skulk.wire.state import ClusterState, Term

log = logging.getLogger("skulk.master")

TICK_S: Final = 0.25
ANSWER_S: Final = 0.5
DEFAULT_RULES: Final = Rules()


class Master:
    """The master role of one node. Keep `run` going.

    Args:
        replica: the node's copy of the state.
        patience_s: silence of a master after which this node leads; 0 where it is alone by design.
        can_lead: False: this node only follows.
        rules: what it was told about placements.
    """

    def __init__(
        self,
        bus: Bus,
        replica: Replica,
        clock: Clock,
        *,
        node_id: str,
        incarnation: str,
        patience_s: float,
        can_lead: bool = True,
        rules: Rules = DEFAULT_RULES,
    ) -> None:
        self._bus = bus
        self._replica = replica
        self._clock = clock
        self._rules = rules
        self._commands = Commands(clock)
        self._leader: Leader | None = None
        self._leading: asyncio.Task[None] | None = None
        self._heard: MasterBeat | None = None
        self._inputs: asyncio.Queue[ElectionInput] = asyncio.Queue(1_000)
        self._election = Election(
            node_id=node_id,
            incarnation=incarnation,
            patience_s=patience_s,
            can_lead=can_lead,
            is_connected=bus.state == "connected",
            silent_since=clock.now(),
            highest=replica.view.state.position.term,
        )

    @property
    def state(self) -> ClusterState | None:
        """The authoritative state while this node leads, else None."""
        return None if self._leader is None else self._leader.state

    async def run(self) -> None:
        """Campaigns and leads until cancelled."""
        stop_watching = self._bus.on_state(self._bus_changed)
        stop_listening = self._replica.on_change(self._view_changed)
        if (self._bus.state == "connected") != self._election.is_connected:
            self._bus_changed(self._bus.state)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._tick(), name="election-tick")
                tasks.create_task(self._elect(tasks), name="election")
        finally:
            stop_listening()
            stop_watching()
            await self._commands.drop_running()

    def _bus_changed(self, state: BusState) -> None:
        self._enqueue(BusChanged(state == "connected"))

    def _view_changed(self, view: ClusterView) -> None:
        # a change of anything else in the view is no sign of life of the master
        if view.master is not None and view.master is not self._heard:
            self._heard = view.master
            self._enqueue(BeatHeard(view.master.term))

    def _enqueue(self, heard: ElectionInput) -> None:
        if not self._inputs.full():
            self._inputs.put_nowait(heard)

    async def _tick(self) -> None:
        while True:
            self._enqueue(Tick())
            await asyncio.sleep(TICK_S)

    async def _elect(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            heard = await self._inputs.get()
            now = self._bus.heard_at if isinstance(heard, Tick) else self._clock.now()
            self._election, effects = step(self._election, heard, now)
            for effect in effects:
                if isinstance(effect, BeganTerm):
                    self._leading = tasks.create_task(self._lead(effect.term), name=f"lead-{effect.term.number}")
                elif self._leading is not None:
                    log.warning("master of term %d no more", effect.term.number)
                    await self._end_lead(self._leading)
                    self._leading = None

    async def _end_lead(self, leading: asyncio.Task[None]) -> None:
        if self._leader is not None:
            self._leader.close()
        leading.cancel()
        await asyncio.wait({leading})

    async def _lead(self, term: Term) -> None:
        log.info("master of term %d, %d instances", term.number, len(self._replica.view.state.instances))
        self._leader = leader = Leader(self._bus, self._replica, self._clock, term, self._rules)
        service: Service | None = None
        try:
            service = await self._bus.serve(
                "master",
                {MASTER_PLACE: self._place, MASTER_PREVIEW: self._preview, MASTER_DELETE: self._delete},
                metadata={"node": term.node_id, "term": str(term.number)},
                node=term.node_id,
            )
            await leader.run()
        finally:
            leader.close()
            self._leader = None
            await self._commands.drop_running()
            if service is not None:
                # so that callers hear at once that they must ask somebody else
                await service.close(drain_s=ANSWER_S)

    def _leader_now(self) -> Leader:
        if self._leader is None:
            raise UnavailableError("not_master", "this node is not the master any more; ask again", retry_after_s=1)
        return self._leader

    async def _place(self, call: Call[PlaceModel]) -> PlacementReply:
        leader = self._leader_now()
        return await self._commands.once(call.message.command_id, lambda: leader.place(call.message))

    async def _preview(self, call: Call[PreviewPlacement]) -> PlacementDecision:
        return self._leader_now().preview(call.message.request)

    async def _delete(self, call: Call[DeleteInstance]) -> DeleteReply:
        leader = self._leader_now()
        return await self._commands.once(call.message.command_id, lambda: leader.delete(call.message))
