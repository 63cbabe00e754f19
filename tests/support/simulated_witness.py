"""What must hold at every moment of a simulated cluster, whatever is done to it."""

from __future__ import annotations

from skulk.bus.subjects import EVENT, MASTER_BEAT, NODE_BEAT
from skulk.bus.transport import Raw
from skulk.wire.base import decode
from skulk.wire.events import InstanceCreated
from skulk.wire.state import Position, Term


class Witness:
    """Hears everything as it is sent: one writer a term, one state a position, one instance a command."""

    def __init__(self) -> None:
        self.writers: dict[Term, str] = {}
        self.hashes: dict[Position, str] = {}
        self.created: dict[str, set[str]] = {}
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
            record = decode(message.body, EVENT.payload)
            self._writes(record.position.term, sender)
            if isinstance(record.event, InstanceCreated):
                made = self.created.setdefault(record.event.command_id, set())
                made.add(record.event.instance.instance_id)
                assert len(made) == 1, f"the command {record.event.command_id} was carried out twice: {made}"
        elif (plane, noun) == ("beat", "master"):
            beat = decode(message.body, MASTER_BEAT.payload)
            self._writes(beat.term, sender)
            self._stands(beat.position, beat.state_hash)
        elif (plane, noun) == ("beat", "node"):
            told = decode(message.body, NODE_BEAT.payload)
            self._stands(told.position, told.state_hash)

    def _writes(self, term: Term, sender: str) -> None:
        assert self.writers.setdefault(term, sender) == sender, f"two writers of {term}: {self.writers[term]}, {sender}"

    def _stands(self, position: Position, digest: str) -> None:
        if position.seq:
            assert self.hashes.setdefault(position, digest) == digest, f"two states at {position}"


class Meetings:
    """How long two masters may go on once they hear each other: 2.5 s from the first beat that crosses."""

    def __init__(self, bound_s: float) -> None:
        self._bound_s = bound_s
        self._since: dict[frozenset[str], float] = {}

    def look(self, leading: set[str], apart: set[frozenset[str]], now: float) -> None:
        """``leading``: who leads now; ``apart``: pairs that couldn't hear each other at some time since the last look."""
        pairs = {frozenset((one, other)) for one in leading for other in leading if one < other} - apart
        self._since = {pair: self._since.get(pair, now) for pair in pairs}
        for pair, since in self._since.items():
            assert now - since <= self._bound_s, f"{sorted(pair)} both lead for {now - since:.2f} s and hear each other"
