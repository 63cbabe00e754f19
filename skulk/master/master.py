"""The master: campaigns, and while it leads, answers commands and keeps placements up.

ticks, beats, bus ──> election.step ──> AskOthers, Gather ──> rounds ──> election.step
                                    ├─> BeganTerm   ──> lead: ledger, commands, upkeep
                                    └─> SteppedDown ──> all of that ends

Everything that the election decides is done at once, in the call that brought the news: a master that is deposed has
stopped writing before it answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine
from typing import Any, Final

from skulk.bus.port import Bus, BusState, Call
from skulk.bus.replica import Replica
from skulk.bus.subjects import (
    ELECTION_GATHER,
    ELECTION_PREVOTE,
    GATEWAY_BEAT,
    MASTER_DELETE,
    MASTER_DRAIN,
    MASTER_PLACE,
    MASTER_PREVIEW,
)
from skulk.clock import Clock
from skulk.cluster.election import (
    LATE_TICK_S,
    AskOthers,
    BeatHeard,
    BeganTerm,
    BusChanged,
    Election,
    ElectionEffect,
    ElectionInput,
    Gather,
    GatherHeard,
    MasterLeft,
    PreVoteEnded,
    Retired,
    RoundEnded,
    SteppedDown,
    TermSeen,
    Tick,
    answer,
    step,
)
from skulk.cluster.fold import state_hash
from skulk.cluster.merge import merge
from skulk.cluster.view import followers_of, peers_of
from skulk.errors import UnavailableError
from skulk.master.commands import Commands
from skulk.master.leader import Leader, Persist
from skulk.master.rounds import gather, pre_vote
from skulk.master.upkeep import Rules
from skulk.master.waiting import Waiting
from skulk.wire.base import PROTOCOL
from skulk.wire.beats import MasterBeat, NodeBeat
from skulk.wire.commands import (
    DeleteInstance,
    DeleteReply,
    DrainNode,
    DrainReply,
    Gathered,
    PlacementReply,
    PlaceModel,
    PreviewPlacement,
    PreVote,
    PreVoted,
)
from skulk.wire.commands import Gather as GatherCall
from skulk.wire.placement import PlacementDecision
from skulk.wire.state import ClusterState, Term

log = logging.getLogger("skulk.master")

TICK_S: Final = 0.1
ANSWER_S: Final = 0.5
DEFAULT_RULES: Final = Rules()


async def _no_disk() -> bool:
    return True


class Master:
    """The master role of one node. Keep `run` going.

    Args:
        replica: the node's copy of the state.
        patience_s: silence of a master after which this node asks for its place; 0 where it is alone by design.
        can_lead: False: this node only follows.
        rules: what it was told about placements.
        persist: puts what is known on the own disk; False: it could not.
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
        persist: Persist = _no_disk,
    ) -> None:
        self._persist = persist
        self._bus = bus
        self._replica = replica
        self._clock = clock
        self._node_id = node_id
        self._rules = rules
        self._commands = Commands(clock)
        self._waiting = Waiting(clock)
        self._leader: Leader | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._leading: asyncio.Task[None] | None = None
        self._news: deque[tuple[ElectionInput, float]] = deque()
        self._is_stepping = False
        self._merged: ClusterState | None = None
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

    @property
    def unreachable(self) -> str:
        """The master that others hear and this node doesn't; empty where there is none."""
        return self._election.unreachable

    def retire(self) -> None:
        """Leads no more and never again: the node is being stopped."""
        self._step(Retired())

    async def run(self) -> None:
        """Campaigns and leads until cancelled."""
        service = await self._bus.serve(
            "election", {ELECTION_PREVOTE: self._pre_voted, ELECTION_GATHER: self._gathered}, node=self._node_id
        )
        gateways = await self._bus.subscribe(GATEWAY_BEAT, lambda beat: self._waiting.heard(beat.message))
        try:
            async with asyncio.TaskGroup() as self._tasks:
                stop_watching = self._bus.on_state(self._bus_changed)
                stop_nodes = self._replica.on_node_beat(self._node_heard)
                stop_masters = self._replica.on_master_beat(self._master_heard)
                try:
                    if (self._bus.state == "connected") != self._election.is_connected:
                        self._bus_changed(self._bus.state)
                    await self._tick()
                finally:
                    stop_masters()
                    stop_nodes()
                    stop_watching()
                    self._end_lead()
        finally:
            self._tasks = None
            await gateways.close()
            await service.close(drain_s=0.0)

    # What the election hears

    def _bus_changed(self, state: BusState) -> None:
        self._step(BusChanged(state == "connected"))

    def _node_heard(self, beat: NodeBeat) -> None:
        if beat.protocol != PROTOCOL:
            return
        if beat.leaving:
            self._step(MasterLeft(beat.node_id))
        else:
            # the own one too: a copy of this home may have led meanwhile, and its log be here;
            # one that follows another master brings what it knows when that one and this one meet
            self._step(TermSeen(beat.position.term, beat.unmerged and beat.master == self._node_id))

    def _master_heard(self, beat: MasterBeat) -> None:
        own_followers = followers_of(self._replica.view, self._node_id)
        self._step(BeatHeard(beat.term, beat.followers, own_followers))

    async def _tick(self) -> None:
        while True:
            self._step(Tick(self._replica.view.state.partial), self._bus.heard_at)
            await asyncio.sleep(TICK_S)

    def _step(self, heard: ElectionInput, now: float | None = None) -> None:
        """Steps the election and does what follows; news that come out of that wait for their turn."""
        self._news.append((heard, self._clock.now() if now is None else now))
        if self._is_stepping:
            return
        self._is_stepping = True
        try:
            while self._news:
                self._election, effects = step(self._election, *self._news.popleft())
                for effect in effects:
                    self._do(effect)
        finally:
            self._is_stepping = False

    # What the election wants

    def _do(self, effect: ElectionEffect) -> None:
        match effect:
            case AskOthers():
                self._start(self._ask_others(effect), f"pre-vote-{effect.number}")
            case Gather():
                self._start(self._gather(effect), f"round-{effect.number}")
            case BeganTerm():
                self._begin_lead(effect.term)
            case SteppedDown():
                log.warning("master of term %d no more", effect.term.number)
                self._end_lead()

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None] | None:
        try:
            if self._tasks is not None:
                return self._tasks.create_task(work, name=name)
        except RuntimeError:
            log.debug("%s is not begun: this role is ending", name)
        work.close()
        return None

    def _others(self) -> set[str]:
        """Everybody who was heard within the last seconds."""
        view = self._replica.view
        masters = () if view.master is None else (view.master.node_id,)
        return {*peers_of(view), *masters} - {self._node_id}

    async def _ask_others(self, asked: AskOthers) -> None:
        answers = await pre_vote(self._bus, self._node_id, self._others())
        if self._is_awake():
            self._step(PreVoteEnded(asked.number, answers))

    async def _gather(self, asked: Gather) -> None:
        known = self.state or self._replica.view.state
        told = await gather(self._bus, asked.term, state_hash(known), self._others())
        if not self._is_awake():
            return
        for found in told.answers:
            self._replica.hear_runners(found.runners)
        here = self._replica.view.state
        self._merged = told.merged_with(here if self.state is None else merge(self.state, here))
        self._step(RoundEnded(asked.number, told.highest))

    def _begin_lead(self, term: Term) -> None:
        assert self._merged is not None, "a term begins after a round"
        merged, self._merged = self._merged, None
        log.info("master of term %d, %d instances", term.number, len(merged.instances))
        self._replica.adopt(merged)
        self._leader = leader = Leader(
            self._bus,
            self._replica,
            self._clock,
            term,
            self._rules,
            self._waiting,
            may_write=self._is_awake,
            persist=self._persist,
        )
        self._leading = self._start(self._lead(leader, term), f"lead-{term.number}")

    def _is_awake(self) -> bool:
        """False after a pause whose late tick hasn't come yet; it comes now."""
        now = self._bus.heard_at
        if now - self._election.ticked_at <= LATE_TICK_S:
            return True
        self._step(Tick(self._replica.view.state.partial), now)
        return False

    def _end_lead(self) -> None:
        if self._leader is not None:
            self._leader.close()
            self._leader = None
        if self._leading is not None:
            self._leading.cancel()
            self._leading = None
        self._commands.drop_running()

    async def _lead(self, leader: Leader, term: Term) -> None:
        service = await self._bus.serve(
            "master",
            {
                MASTER_PLACE: self._place,
                MASTER_PREVIEW: self._preview,
                MASTER_DELETE: self._delete,
                MASTER_DRAIN: self._drain,
            },
            metadata={"node": term.node_id, "term": str(term.number)},
            node=term.node_id,
        )
        try:
            await leader.run()
        finally:
            # so that callers hear at once that they must ask somebody else
            await service.close(drain_s=ANSWER_S)

    # What others ask

    async def _pre_voted(self, call: Call[PreVote]) -> PreVoted:
        del call
        return answer(self._election, self._clock.now())

    async def _gathered(self, call: Call[GatherCall]) -> Gathered:
        self._step(GatherHeard(call.message.term))
        state = self.state or self._replica.view.state
        is_same = state_hash(state) == call.message.state_hash
        beat = self._replica.view.nodes.get(self._node_id)
        return Gathered(
            node_id=self._node_id,
            highest=max(self._election.highest, state.position.term),
            state=None if is_same else state,
            runners=() if beat is None else beat.beat.runners,
        )

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

    async def _drain(self, call: Call[DrainNode]) -> DrainReply:
        leader = self._leader_now()
        return await self._commands.once(call.message.command_id, lambda: leader.drain(call.message))
