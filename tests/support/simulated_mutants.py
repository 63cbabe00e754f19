"""Each rule of the control plane switched off, one at a time: a simulation that doesn't notice proves nothing.

A mutant replaces functions of the real modules while it runs; nothing in the product knows of it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Generator
from typing import Any

import msgspec

from skulk.bus import inbox, outbox
from skulk.cluster import election, fold, follow, merge, reconcile, view
from skulk.cluster.election import Election
from skulk.cluster.follow import Followed
from skulk.cluster.reconcile import Difference
from skulk.gateway import asking, dispatch, progress
from skulk.master import commands, leader, rounds, upkeep
from skulk.master.rounds import Told
from skulk.node import hosting, twins
from skulk.wire.events import Event, InstanceAssigned
from skulk.wire.state import ClusterState, Instance, Position, Tombstone
from tests.support.simulated_kind_mutants import KIND_MUTANTS
from tests.support.simulated_mutant import Mutant, Patches, module
from tests.support.simulated_streams import run_streams

replace = msgspec.structs.replace


def _no_pre_vote() -> Patches:
    async def nobody(*_: object) -> tuple[()]:
        return ()

    return ((module("skulk.master.master"), "pre_vote", nobody),)


def _no_order() -> Patches:
    real = election.answer

    def answer(state: Election, now: float) -> Any:
        return replace(real(state, now), is_ready=False)

    return ((module("skulk.master.master"), "answer", answer),)


def _no_round() -> Patches:
    async def nothing(*_: object) -> Told:
        return Told(answers=())

    return ((module("skulk.master.master"), "gather", nothing),)


def _no_promise() -> Patches:
    return ((election, "_gather_heard", lambda state, term, now: (state, ())),)


def _no_meeting() -> Patches:
    return ((election, "_met", lambda state, beat, now: (state, ())),)


def _no_late_tick() -> Patches:
    return ((election, "LATE_TICK_S", 1e9),)


def _leads_without_bus() -> Patches:
    real = election._bus_changed

    def changed(state: Election, heard: election.BusChanged, now: float) -> Any:
        return real(state, heard, now) if heard.is_connected else (state, ())

    return ((election, "_bus_changed", changed),)


def _no_unmerged() -> Patches:
    def follow_snapshot(state: ClusterState, own_hash: str, snapshot: ClusterState, wall: float) -> Followed:
        del own_hash, wall
        return Followed(state=snapshot if snapshot.cluster == state.cluster else state)

    return ((module("skulk.bus.replica"), "follow_snapshot", follow_snapshot),)


def _one_lineage() -> Patches:
    def newer(a: ClusterState, b: ClusterState) -> ClusterState:
        return max(a, b, key=lambda state: state.position)

    return ((rounds, "merge", newer),)


def _no_tombstones() -> Patches:
    return ((merge, "_is_covered", lambda instance, tombstones: False),)


def _no_hash() -> Patches:
    return ((follow, "state_hash", lambda state: ""), (fold.StateHash, "of", lambda self, state: ""))


def _any_term() -> Patches:
    def follow_event(state: ClusterState, record: Any) -> Followed:
        if record.position.seq != state.position.seq + 1:
            return Followed(state=state, wants_snapshot=record.position > state.position)
        return Followed(state=fold.fold(state, record))

    return ((module("skulk.bus.replica"), "follow_event", follow_event),)


def _no_snapshots() -> Patches:
    async def nothing(_: object) -> None:
        return None

    return ((module("skulk.bus.replica").Replica, "_fetch_snapshot", nothing),)


def _seq_restarts() -> Patches:
    def merged(real: Any) -> Any:
        def merge_states(a: ClusterState, b: ClusterState) -> ClusterState:
            found = real(a, b)
            return replace(found, position=Position(term=found.position.term, seq=min(a.position.seq, b.position.seq)))

        return merge_states

    return ((rounds, "merge", merged(merge.merge)),)


def _no_grace() -> Patches:
    return ((leader, "SETTLE_S", 0.0),)


def _closed_is_silent() -> Patches:
    return ((view, "NODE_CLOSED_S", 1e9),)


def _hasty_minority() -> Patches:
    return ((upkeep, "is_minority", lambda view: False),)


def _no_replacement() -> Patches:
    return ((upkeep, "_moved", lambda *_: iter(())),)


def _no_pending() -> Patches:
    return ((upkeep, "_placed", lambda *_: iter(())),)


def _no_drain() -> Patches:
    return ((upkeep, "_drained", lambda *_: iter(())),)


def _no_refusal() -> Patches:
    return ((upkeep, "_refused", lambda *_: iter(())), (leader, "refused_by", lambda view: ()))


def _no_reservation() -> Patches:
    admission = module("skulk.node.hosting")
    rooms = module("skulk.placement.rooms")
    return ((admission, "reserved_bytes", lambda *_: 0), (rooms, "reserved_bytes", lambda *_: 0))


def _no_admission() -> Patches:
    return ((hosting, "admit", lambda *_: None),)


def _no_stop() -> Patches:
    def difference(wanted: Any, running: Any) -> Difference:
        return replace(reconcile.difference(wanted, running), stop=())

    return ((hosting, "difference", difference),)


def _commands_again() -> Patches:
    numbers = itertools.count()
    return (
        (leader, "commanded_instance_id", lambda command_id: f"i{next(numbers)}"),
        (leader.Leader, "_begun", lambda self, command: None),
        (commands, "KEPT_S", -1.0),
    )


def _forgets_disk() -> Patches:
    return ((module("tests.support.simulated_node").Disk, "load", lambda self: None),)


def _clones_live() -> Patches:
    return ((twins, "BEATS", 1_000_000),)


def _no_candidate() -> Patches:
    real = election._gather_heard

    def gather_heard(state: Election, term: Any, now: float) -> Any:
        after, effects = real(state, term, now)
        return replace(after, heard=state.heard, heard_at=state.heard_at), effects

    return ((election, "_gather_heard", gather_heard),)


def _unready() -> Patches:
    def yielding(state: Election, until: float) -> Election:
        return election._following(state, until - state.patience_s)

    return ((election, "_yielding", yielding),)


def _word_stands() -> Patches:
    real = view.with_node_beat

    def with_node_beat(known: view.ClusterView, beat: Any, now: float) -> view.ClusterView:
        node = known.nodes.get(beat.node_id)
        if node is not None:
            known = replace(known, nodes={**known.nodes, beat.node_id: replace(node, doubted=frozenset())})
        return real(known, beat, now)

    return ((module("skulk.bus.replica"), "with_node_beat", with_node_beat),)


def _no_reason() -> Patches:
    def placed(*known: Any) -> Generator[Event]:
        return (event for event in real(*known) if isinstance(event, InstanceAssigned))

    real = upkeep._placed
    return ((upkeep, "_placed", placed),)


def _all_asked() -> Patches:
    def covered(instance: Instance, tombstones: dict[str, Tombstone]) -> bool:
        tombstone = tombstones.get(instance.instance_id)
        asked = None if tombstone is None else msgspec.structs.replace(tombstone, unasked=False)
        return asked is not None and known(instance, {instance.instance_id: asked})

    known = merge._is_covered
    return ((merge, "_is_covered", covered),)


def _births_count() -> Patches:
    return ((merge, "is_commanded", lambda instance_id, command_id: False),)


def _no_promise_kept() -> Patches:
    return ((fold, "_kept", lambda state, event, position: state),)


def _seq_follows() -> Patches:
    real = follow.follow_snapshot

    def follow_snapshot(state: ClusterState, own_hash: str, snapshot: ClusterState, wall: float) -> Followed:
        seq = min(state.position.seq, snapshot.position.seq)
        level = replace(state, position=replace(state.position, seq=seq))
        found = real(level, own_hash, snapshot, wall)
        return replace(found, state=state) if found.state is level else found

    return ((module("skulk.bus.replica"), "follow_snapshot", follow_snapshot),)


def _no_resend() -> Patches:
    return ((inbox.Inbox, "_heal", lambda self, reader: None),)


def _no_alive() -> Patches:
    async def nothing(_: object) -> None:
        await asyncio.Event().wait()

    return ((outbox.Outbox, "_beat", nothing),)


def _no_silence() -> Patches:
    return ((inbox, "STREAM_DEAD_S", 1e9),)


def _no_chunks_kept() -> Patches:
    return ((outbox, "CHUNKS_KEPT_S", 0.0),)


def _any_attempt() -> Patches:
    real = inbox.Inbox._on_chunk

    def on_chunk(self: Any, received: Any) -> None:
        reader = self._readers.get(received.message.request_id)
        if reader is not None:
            chunk = replace(received.message, attempt=reader.attempt, runner_id=reader.runner_id)
            received = replace(received, message=chunk)
        real(self, received)

    return ((inbox.Inbox, "_on_chunk", on_chunk),)


def _no_failover() -> Patches:
    return ((dispatch, "MAX_RESUMPTIONS", 0),)


def _from_the_start() -> Patches:
    return ((progress.Progress, "note", lambda self, chunks: None),)


def _no_orphans() -> Patches:
    return ((outbox.Outbox, "orphans", lambda self, now: []),)


def _one_life() -> Patches:
    real = outbox.Outbox.gateway_heard

    def gateway_heard(self: Any, beat: Any) -> None:
        known = self._gateways.get(beat.gateway_id)
        real(self, beat if known is None else replace(beat, incarnation=known[0]))

    return ((outbox.Outbox, "gateway_heard", gateway_heard),)


def _no_cancel() -> Patches:
    return ((asking.Asking, "cancel_soon", lambda self, runner_id, request_id: None),)


MUTANTS: tuple[Mutant, ...] = (
    tuple(
        Mutant(name=name, rule=rule, patches=patches)
        for name, rule, patches in (
            ("no-pre-vote", "a node asks whether the master lives before it campaigns", _no_pre_vote),
            ("no-order", "of several candidates the first in order campaigns", _no_order),
            ("no-round", "a new master asks all reachable nodes before it writes", _no_round),
            ("no-promise", "a master of a lower term stops before it answers a round", _no_promise),
            ("no-meeting", "of two masters that meet one leads", _no_meeting),
            (
                "no-late-tick",
                "a tick more than 1 s late makes a master repeat the round before it writes",
                _no_late_tick,
            ),
            ("leads-without-bus", "without a bus connection a node neither campaigns nor places", _leads_without_bus),
            ("no-unmerged", "what the master lacks is merged, not overwritten by its snapshot", _no_unmerged),
            ("one-lineage", "lineages are merged, not chosen", _one_lineage),
            ("no-tombstones", "a tombstone beats every version it covers", _no_tombstones),
            ("no-hash", "every beat carries a hash of the state", _no_hash),
            ("any-term", "a follower folds only events of the term that it follows", _any_term),
            ("no-snapshots", "a follower that sees a gap asks for a snapshot", _no_snapshots),
            ("seq-falls", "seq goes on across terms", _seq_restarts),
            ("no-grace", "for 5 s after its election a master doesn't place anything of lost nodes again", _no_grace),
            ("closed-is-silent", "a node whose routes closed is lost after 2 s", _closed_is_silent),
            ("hasty-minority", "a side with fewer than half of the nodes waits 120 s", _hasty_minority),
            ("no-replacement", "the instances of a lost node are placed again", _no_replacement),
            ("no-pending", "a pending instance is placed when a node fits", _no_pending),
            ("no-drain", "the instances of a drained node move", _no_drain),
            ("no-refusal", "a refused instance goes elsewhere", _no_refusal),
            ("no-reservation", "two placements are never admitted on the same memory", _no_reservation),
            ("no-admission", "a node admits each assignment against its own memory once more", _no_admission),
            ("no-stop", "a node stops a runner when it learns a higher epoch or a tombstone", _no_stop),
            ("commands-again", "a command is carried out once, whoever is the master", _commands_again),
            ("forgets-disk", "each node keeps the last state on disk", _forgets_disk),
            ("clones-live", "a node that hears its own id from another live incarnation stops", _clones_live),
        )
    )
    + tuple(
        Mutant(name=name, rule=rule, patches=patches, first=first)
        for name, rule, patches, first in (
            ("no-candidate", "who asks in a round counts as a master for 1 s", _no_candidate, 5100),
            ("unready", "who yields to a better candidate still counts as ready", _unready, 6300),
            ("word-stands", "what a node's beat says twice is so", _word_stands, 700),
            ("births-count", "a deletion covers all that one command made", _births_count, 2200),
            ("no-promise-kept", "an instance that was promised stays, whoever leads", _no_promise_kept, 3400),
            ("no-reason", "an instance that stays pending has a visible reason", _no_reason, 2250),
            ("all-asked", "a promise outlives what a master took back by itself", _all_asked, 10730),
            ("seq-follows", "a snapshot of a lower seq is merged, not taken", _seq_follows, 6390),
        )
    )
    + tuple(
        Mutant(name=name, rule=rule, patches=patches, run=run_streams)
        for name, rule, patches in (
            ("no-resend", "a gateway that misses a number asks for it", _no_resend),
            ("no-alive", "a runner says every 0.5 s which streams live and how far they are", _no_alive),
            ("no-silence", "a runner that is silent for 2.5 s is dead", _no_silence),
            ("no-chunks-kept", "a runner keeps a request's chunks until 30 s after its end", _no_chunks_kept),
            ("any-attempt", "a chunk of an old attempt is ignored", _any_attempt),
            ("no-failover", "a stream whose runner is lost goes on at another replica", _no_failover),
            ("from-the-start", "it goes on behind what was sent", _from_the_start),
            ("no-orphans", "a runner cancels the requests of a gateway that is silent for 5 s", _no_orphans),
            ("one-life", "or that names a new incarnation", _one_life),
            ("no-cancel", "a client that goes away cancels its generation", _no_cancel),
        )
    )
    + KIND_MUTANTS
)
