"""What must hold at every moment of a simulated cluster, whatever is done to it."""

from __future__ import annotations

from typing import Protocol

from skulk.bus.subjects import EVENT, MASTER_BEAT, NODE_BEAT, RUNNER_STATUS
from skulk.bus.transport import Raw
from skulk.master.upkeep import MINORITY_WAIT_S
from skulk.wire.beats import RunnerStatus
from skulk.wire.events import EventRecord, InstanceAssigned, InstanceCreated, TermBegan
from skulk.wire.state import NO_TERM, Position, Term
from tests.support.simulated_versions import read

GRACE_S = 5.0
ROUNDING_S = 1e-6


class Scene(Protocol):
    """What the witness may ask about the cluster."""

    def now(self) -> float: ...

    def others_hear(self, candidate: str) -> str:
        """A living master that somebody hears whom this node hears, all of it for 3 s; empty where there is none."""
        ...

    def better_than(self, candidate: str) -> str:
        """A node that comes before one that has just campaigned, and that all of it could be heard by for 3 s."""
        ...

    def have_heard(self, one: str, other: str) -> bool:
        """Whether two nodes have heard each other without a break for 3 s."""
        ...

    def is_stale(self, record: EventRecord, writer: str) -> bool:
        """Whether an event was written after its writer had been suspended, or without a bus, during the term."""
        ...

    def is_minority(self, name: str) -> bool:
        """Whether a node has been on a side with fewer than half of all nodes for 6 s."""
        ...

    def digest_of(self, sender: str, position: Position, told: str) -> str:
        """The digest of what every version must know at a position that a node tells; empty where it can't be told."""
        ...

    def knows_foreign(self, sender: str, node_id: str) -> bool:
        """Whether a node that places hears that another one is of an incompatible version."""
        ...


class Witness:
    """Hears everything as it is sent, and checks what must hold of it.

    One writer a term, one state a position, one instance a command. Two nodes that hear each other don't begin two
    terms of one number; the first in order begins it; nobody begins one against a master that others hear. A master
    that slept doesn't go on with its term. Nothing of a lost node is placed again within 5 s of an election, nor by a
    minority within two minutes. Nothing is placed on a node of an incompatible version. A node tells of no runners but
    its own.
    """

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._began: dict[Term, float] = {}
        self._seqs: dict[tuple[str, Term], int] = {}
        self.writers: dict[Term, str] = {}
        self.hashes: dict[Position, str] = {}
        self.created: dict[str, set[str]] = {}
        self.refused: set[tuple[str, str]] = set()
        self.failure: AssertionError | None = None
        self._last: Raw | None = None

    def hear(self, sender: str, message: Raw) -> None:
        """Takes in a message of the control plane once, however many listen."""
        if message is self._last:
            return
        self._last = message
        try:
            self._check(sender, message)
        except AssertionError as error:
            self.failure = self.failure or error

    def _check(self, sender: str, message: Raw) -> None:
        plane, noun = message.subject.split(".")[3:5]
        if plane == "event" and not message.reply:
            record = read(message.body, EVENT.payload)
            self._writes(record.position.term, sender)
            self._event(sender, record)
            if isinstance(record.event, InstanceCreated):
                made = self.created.setdefault(record.event.command_id, set())
                made.add(record.event.instance.instance_id)
                assert len(made) == 1, f"the command {record.event.command_id} was carried out twice: {made}"
        elif (plane, noun) == ("beat", "master"):
            beat = read(message.body, MASTER_BEAT.payload)
            self._writes(beat.term, sender)
            self._stands(beat.position, self._scene.digest_of(sender, beat.position, beat.state_hash))
        elif (plane, noun) == ("status", "runner"):
            self._note_refusals((read(message.body, RUNNER_STATUS.payload),))
        elif (plane, noun) == ("beat", "node"):
            told = read(message.body, NODE_BEAT.payload)
            self._note_refusals(told.runners)
            others = {status.node_id for status in told.runners} - {told.node_id}
            assert not others, f"{sender} tells of runners of {others} as its own"
            is_ahead = told.position.term.incarnation == told.incarnation and told.position.term not in self._began
            # its own beat may overtake the first word of its own term: it counts for the terms after that one
            key = (told.incarnation, told.position.term if is_ahead else NO_TERM)
            self._seqs[key] = max(self._seqs.get(key, 0), told.position.seq)
            self._stands(told.position, self._scene.digest_of(sender, told.position, told.state_hash))

    def _event(self, sender: str, record: EventRecord) -> None:
        term, event, now = record.position.term, record.event, self._scene.now()
        if isinstance(event, TermBegan):
            self._began[term] = now
            own = (seq for (one, other), seq in self._seqs.items() if one == term.incarnation and other != term)
            before = max(own, default=0)
            assert record.position.seq > before, f"{term} begins at {record.position.seq}, its node stood at {before}"
            others = (known for known in self._began if known.number == term.number and known.node_id != term.node_id)
            for other in others:
                both = now - self._began[other] < 3.0 and self._scene.have_heard(other.node_id, term.node_id)
                assert not both, f"{other} and {term} began side by side"
            better = self._scene.better_than(sender)
            assert not better, f"{sender} began {term} though {better} comes before it"
            heard = self._scene.others_hear(sender)
            assert not heard, f"{sender} began {term} though others hear the master {heard}"
        elif isinstance(event, InstanceAssigned):
            self._assigns(sender, term, event, now)
        assert not self._scene.is_stale(record, sender), f"{sender} goes on with {term} after a pause"

    def _assigns(self, sender: str, term: Term, event: InstanceAssigned, now: float) -> None:
        node = event.assignment.node_id
        assert not self._scene.knows_foreign(sender, node), f"{sender} places on {node}, an incompatible version"
        if "silent" in event.reason:
            age_s = now - self._began.get(term, -1e9)
            assert age_s >= GRACE_S - ROUNDING_S, (
                f"{term} places {event.instance_id} again {age_s:.1f} s after its election"
            )
            silent_s = float(event.reason.split()[-2])
            is_hasty = silent_s < MINORITY_WAIT_S and self._scene.is_minority(sender)
            assert not is_hasty, f"{sender} places {event.instance_id} again, with a minority"

    def _note_refusals(self, statuses: tuple[RunnerStatus, ...]) -> None:
        self.refused.update((one.instance_id, one.node_id) for one in statuses if one.phase == "refused")

    def _writes(self, term: Term, sender: str) -> None:
        assert self.writers.setdefault(term, sender) == sender, f"two writers of {term}: {self.writers[term]}, {sender}"

    def _stands(self, position: Position, digest: str) -> None:
        if position.seq and digest:
            assert self.hashes.setdefault(position, digest) == digest, f"two states at {position}"


class Meetings:
    """How long two masters may go on once they hear each other: 2.5 s from the first beat that crosses."""

    def __init__(self, bound_s: float) -> None:
        self._bound_s = bound_s
        self._since: dict[frozenset[str], float] = {}

    def look(self, leading: set[str], apart: set[frozenset[str]], now: float) -> None:
        """``leading``: who leads now; ``apart``: pairs that couldn't hear each other at some time of late."""
        pairs = {frozenset((one, other)) for one in leading for other in leading if one < other} - apart
        self._since = {pair: self._since.get(pair, now) for pair in pairs}
        for pair, since in self._since.items():
            assert now - since <= self._bound_s, f"{sorted(pair)} both lead for {now - since:.2f} s and hear each other"
