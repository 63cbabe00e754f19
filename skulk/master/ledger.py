"""The log as its one writer holds it: append folds at once, publishing follows in order."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

import msgspec

from skulk.bus.port import Bus
from skulk.bus.subjects import EVENT, MASTER_BEAT
from skulk.clock import Clock
from skulk.cluster.fold import StateHash, fold
from skulk.cluster.liveness import MASTER_BEAT_S
from skulk.errors import SkulkError, UnavailableError
from skulk.wire.beats import MasterBeat
from skulk.wire.events import (
    Event,
    EventRecord,
    InstanceAssigned,
    InstanceCreated,
    InstanceDeleted,
    InstanceKept,
    InstanceUnassigned,
    NodeDrainEnded,
    NodeDrainStarted,
    TermBegan,
    TombstonesExpired,
)
from skulk.wire.state import ClusterState, Position, Term

log = logging.getLogger("skulk.master")

UNSENT_EVENTS: Final = 10_000


class Ledger:
    """The authoritative state of one term. Single event loop: `append` is synchronous, so nothing comes between.

    Args:
        state: what the term starts from.
        term: this mastership.
        on_append: told of each event at once, with the state before it and after it: what the master has written, its
            own node must never lack.
        followers: how many live nodes follow, for the beat.
        may_write: asked before each event: a master that has slept finds out here at the latest.
    """

    def __init__(
        self,
        bus: Bus,
        clock: Clock,
        state: ClusterState,
        term: Term,
        on_append: Callable[[EventRecord, ClusterState, ClusterState], None],
        followers: Callable[[], int],
        may_write: Callable[[], bool] = lambda: True,
    ) -> None:
        self._bus = bus
        self._clock = clock
        self._term = term
        self._state = state
        self._on_append = on_append
        self._followers = followers
        self._may_write = may_write
        self._is_closed = False
        self._unsent: asyncio.Queue[EventRecord | MasterBeat] = asyncio.Queue(UNSENT_EVENTS)
        self._hashes = StateHash()
        self.append(TermBegan(state_hash=self._hashes.of(state)))

    @property
    def state(self) -> ClusterState:
        """The state after everything appended so far."""
        return self._state

    @property
    def term(self) -> Term:
        """This mastership."""
        return self._term

    def append(self, event: Event) -> Position:
        """Writes one event; returns its position. Followers that miss it are healed by hash and snapshot.

        Raises:
            UnavailableError: ``not_master``: the term has ended.
        """
        if self._is_closed or not self._may_write():
            raise UnavailableError("not_master", "this node is not the master any more; ask again", retry_after_s=1)
        position = Position(term=self._term, seq=self._state.position.seq + 1)
        record = EventRecord(position=position, at=self._clock.wall(), event=event)
        before, self._state = self._state, fold(self._state, record)
        self._enqueue(record)
        self._on_append(record, before, self._state)
        return position

    def close(self) -> None:
        """Ends the term: nothing is written any more."""
        self._is_closed = True

    async def run(self) -> None:
        """Publishes events in order, and the beat every half second, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._publish(), name="ledger-publish")
            tasks.create_task(self._beat(), name="ledger-beat")

    async def _beat(self) -> None:
        while True:
            self._enqueue(
                MasterBeat(
                    node_id=self._term.node_id,
                    term=self._term,
                    position=self._state.position,
                    state_hash=self._hashes.of(self._state),
                    at=self._clock.wall(),
                    followers=self._followers(),
                )
            )
            await asyncio.sleep(MASTER_BEAT_S)

    def _enqueue(self, message: EventRecord | MasterBeat) -> None:
        try:
            self._unsent.put_nowait(message)
        except asyncio.QueueFull:
            log.warning(
                "%d messages wait for the bus: one is dropped; followers will ask for a snapshot", UNSENT_EVENTS
            )

    async def _publish(self) -> None:
        while True:
            message = await self._unsent.get()
            try:
                if isinstance(message, MasterBeat):
                    await self._bus.publish(MASTER_BEAT, message, node=self._term.node_id)
                else:
                    await self._bus.publish(EVENT, message, **_event_ids(message.event))
            except SkulkError as error:
                log.info("not published: %s", error)


def _event_ids(event: Event) -> dict[str, str]:
    """The ids in an event's subject: its kind and whom it is about."""
    match event:
        case TermBegan() | TombstonesExpired():
            subject = "cluster"
        case InstanceCreated():
            subject = event.instance.instance_id
        case InstanceAssigned() | InstanceUnassigned() | InstanceKept() | InstanceDeleted():
            subject = event.instance_id
        case NodeDrainStarted():
            subject = event.drain.node_id
        case NodeDrainEnded():
            subject = event.node_id
    kind = msgspec.inspect.type_info(type(event))
    assert isinstance(kind, msgspec.inspect.StructType)
    return {"kind": str(kind.tag), "subject": subject}
