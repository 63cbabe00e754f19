"""Who writes: a pure state machine, `step(state, input, now) -> (state, effects)`; time is an argument.

    role       input                                        becomes    effect
    follower   a master's beat                              follower   silence restarts
    follower   silence for `patience_s`                     candidate  AskOthers: the pre-vote
    candidate  an answer: a master lives (fresh)            follower   `unreachable` names it; asks again in 0.5 s
    candidate  an answer: a better candidate is ready too   follower   it is given 1 s
    candidate  none of these                                gathering  Gather: everybody's state, at most 1 s
    gathering  the round has ended                          master     BeganTerm(highest number + 1)
    master     another master's second beat, it wins        follower   SteppedDown, if its term is higher; else it waits
    master     the same, this one wins                      master     Gather; then SteppedDown, BeganTerm
    master     what a follower holds is not in its log      master     Gather; then SteppedDown, BeganTerm
    master     a round of a higher term                     follower   SteppedDown
    any        a round of a higher term                     follower   its candidate counts as a master for 1 s
    master     bus lost, or a tick more than 1 s late       candidate  SteppedDown; the pre-vote once the bus is there
    any        it is being stopped                          follower   SteppedDown, if it is the master
    any        bus back, or a tick more than 1 s late       same       silence restarts

No votes are counted: without a quorum there is nothing to count (DESIGN 2). The pre-vote keeps a node that alone
can't hear the master from deposing it. Of several that are ready the first in order leads: those whose state is whole
before those whose is partial, then by node id. At a meeting the one more live nodes follow leads, then the lower id.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, assert_never

import msgspec

from skulk.wire.commands import PreVoted
from skulk.wire.state import NO_TERM, Term

LATE_TICK_S: Final = 1.0
FRESH_S: Final = 1.0
"""A beat this young proves that a master lives: two of its beats would be missing by then."""
READY_S: Final = 0.5
"""Who will be out of patience this soon counts as ready: it is asked a moment before its own tick."""
RETRY_S: Final = 0.5
DEFER_S: Final = 1.0
ROUND_PAUSE_S: Final = 1.0
RIVAL_S: Final = 1.5
"""For so long the first of several other masters is looked at before the next one's turn comes."""
REPEATED_S: Final = 0.25
"""A second beat of another master comes later than this after the first; a repetition of the first comes sooner."""


class BeatHeard(msgspec.Struct, frozen=True):
    """A master's beat: its term, how many live nodes follow it, and how many follow this node."""

    term: Term
    followers: int = 0
    own_followers: int = 0


class BusChanged(msgspec.Struct, frozen=True):
    """The own bus connection came or went."""

    is_connected: bool


class Tick(msgspec.Struct, frozen=True):
    """Time went on; due every tenth of a second. ``is_partial``: of the own state.

    Its ``now`` is when the bus last showed a sign of life: nobody can have been heard after that.
    """

    is_partial: bool = False


class PreVoteEnded(msgspec.Struct, frozen=True):
    """Everybody who was asked has answered, or the time was up."""

    number: int
    answers: tuple[PreVoted, ...] = ()


class RoundEnded(msgspec.Struct, frozen=True):
    """What the others know is merged. ``highest``: of the terms they have seen."""

    number: int
    highest: Term = NO_TERM


class GatherHeard(msgspec.Struct, frozen=True):
    """Another node is about to write in this term: it asked for the own state."""

    term: Term


class TermSeen(msgspec.Struct, frozen=True):
    """A node's state is of this term; ``is_unmerged``: it follows this master, which by its word lacks some of it."""

    term: Term
    is_unmerged: bool = False


class MasterLeft(msgspec.Struct, frozen=True):
    """The master said goodbye."""

    node_id: str


class Retired(msgspec.Struct, frozen=True):
    """This node is being stopped: it leads no more and never again."""


class AskOthers(msgspec.Struct, frozen=True):
    """Ask everybody whether a master lives; then `PreVoteEnded` with this number."""

    number: int


class Gather(msgspec.Struct, frozen=True):
    """Collect what everybody knows, in the name of this term, and merge it; then `RoundEnded` with this number."""

    number: int
    term: Term


class BeganTerm(msgspec.Struct, frozen=True):
    """This node is the master of a new term from now on, and starts from what the last round merged."""

    term: Term


class SteppedDown(msgspec.Struct, frozen=True):
    """This node must not write in this term any more."""

    term: Term


ElectionInput: TypeAlias = (
    BeatHeard | BusChanged | Tick | PreVoteEnded | RoundEnded | GatherHeard | TermSeen | MasterLeft | Retired
)
ElectionEffect: TypeAlias = AskOthers | Gather | BeganTerm | SteppedDown
Role: TypeAlias = Literal["follower", "candidate", "gathering", "master"]


class Election(msgspec.Struct, frozen=True, kw_only=True):
    """What one node knows of the mastership.

    Attributes:
        patience_s: silence of a master after which this node asks for it.
        can_lead: False: a node that only follows.
        term: of this node while it is the master.
        highest: the highest term seen anywhere; the next one is above it.
        proposed: in whose name the round under way asks.
        number: of the last pre-vote or round; answers to an earlier one are late.
        is_asking: a master's round is under way.
        insists: a former master, whose pre-vote yields to nobody but another master.
        silent_since: when a beat was last heard, or the silence clock restarted.
        waits_until: a candidate that has yielded asks again then. Its silence counts on: who asks it meanwhile, and
            can't hear whom it yields to, must yield to it.
        heard: the term of the master that was last heard, at ``heard_at``.
        rival: another master's term, first heard at ``rival_at``.
        unreachable: the master that others hear and this node doesn't; empty where there is none.
        ticked_at: when `Tick` last came.
        asked_at: when the last round began.
    """

    node_id: str
    incarnation: str
    patience_s: float
    can_lead: bool = True
    is_partial: bool = False
    role: Role = "follower"
    term: Term = NO_TERM
    highest: Term = NO_TERM
    proposed: Term = NO_TERM
    number: int = 0
    is_asking: bool = False
    insists: bool = False
    is_connected: bool = False
    silent_since: float = 0.0
    waits_until: float = 0.0
    heard: Term = NO_TERM
    heard_at: float = float("-inf")
    rival: Term = NO_TERM
    rival_at: float = 0.0
    unreachable: str = ""
    ticked_at: float = 0.0
    asked_at: float = float("-inf")


Stepped: TypeAlias = tuple[Election, tuple[ElectionEffect, ...]]


def step(state: Election, heard: ElectionInput, now: float) -> Stepped:
    """The next state and what is to be done."""
    match heard:
        case BeatHeard():
            return _beat_heard(state, heard, now)
        case BusChanged():
            return _bus_changed(state, heard, now)
        case Tick():
            return _ticked(state, heard, now)
        case PreVoteEnded():
            return _pre_vote_ended(state, heard, now)
        case RoundEnded():
            return _round_ended(state, heard, now)
        case GatherHeard():
            return _gather_heard(state, heard.term, now)
        case TermSeen():
            return _term_seen(state, heard, now)
        case MasterLeft():
            return _master_left(state, heard.node_id, now)
        case Retired():
            retired = msgspec.structs.replace(_following(state, now), can_lead=False)
            return retired, ((SteppedDown(state.term),) if state.role == "master" else ())
        case _:
            assert_never(heard)


def answer(state: Election, now: float) -> PreVoted:
    """What this node says to another one's pre-vote."""
    is_master = state.role == "master" and state.is_connected and now - state.ticked_at <= LATE_TICK_S
    is_heard = state.heard != NO_TERM and now - state.heard_at < FRESH_S
    silent_s = now - state.silent_since
    return PreVoted(
        node_id=state.node_id,
        master=state.term if is_master else state.heard if is_heard else None,
        is_ready=state.can_lead and state.is_connected and silent_s >= state.patience_s - READY_S,
        is_partial=state.is_partial,
        highest=max(state.highest, state.term),
    )


def _beat_heard(state: Election, beat: BeatHeard, now: float) -> Stepped:
    term = beat.term
    if term.node_id == state.node_id:
        # the own beat, or one of an earlier life of this node
        return msgspec.structs.replace(state, highest=max(state.highest, term)), ()
    seen = msgspec.structs.replace(state, highest=max(state.highest, term), heard=term, heard_at=now)
    if state.role == "master":
        return _met(seen, beat, now)
    if state.role == "gathering" and term < state.proposed:
        return seen, ()
    return _following(seen, now), ()


def _met(state: Election, beat: BeatHeard, now: float) -> Stepped:
    """Another master speaks. One beat may be the last word of a deposed one; a second one is a meeting."""
    if beat.term != state.rival:
        is_known = state.rival != NO_TERM and now - state.rival_at < RIVAL_S
        return (state if is_known else msgspec.structs.replace(state, rival=beat.term, rival_at=now)), ()
    if now - state.rival_at < REPEATED_S:
        return state, ()
    wins = (-beat.own_followers, state.node_id) < (-beat.followers, beat.term.node_id)
    if wins:
        return _gathering_again(state, now)
    if beat.term < state.term:
        # it will begin a higher one
        return state, ()
    return _stepped_down(_following(state, now), state.term)


def _bus_changed(state: Election, changed_to: BusChanged, now: float) -> Stepped:
    is_connected = changed_to.is_connected
    changed = msgspec.structs.replace(state, is_connected=is_connected, silent_since=now)
    if is_connected:
        return _asking(changed, now) if state.insists and state.can_lead else (changed, ())
    if state.role == "master":
        left = msgspec.structs.replace(_following(changed, now), insists=True)
        return _stepped_down(left, state.term)
    return msgspec.structs.replace(_following(changed, now), insists=state.insists), ()


def _ticked(state: Election, tick: Tick, now: float) -> Stepped:
    is_late = state.ticked_at > 0 and now - state.ticked_at > LATE_TICK_S
    ticked = msgspec.structs.replace(state, ticked_at=max(now, state.ticked_at), is_partial=tick.is_partial)
    if is_late:
        restarted = msgspec.structs.replace(_following(ticked, now), unreachable=state.unreachable)
        if state.role != "master":
            return restarted, ()
        asking, effects = _asking(msgspec.structs.replace(restarted, insists=True), now)
        return asking, (SteppedDown(state.term), *effects)
    is_due = max(0.0, now - ticked.silent_since) >= state.patience_s and now >= state.waits_until
    if state.role != "follower" or not (is_due and state.can_lead and state.is_connected):
        return ticked, ()
    return _asking(ticked, now)


def _asking(state: Election, now: float) -> Stepped:
    del now
    if not state.is_connected:
        return state, ()
    number = state.number + 1
    return msgspec.structs.replace(state, role="candidate", number=number), (AskOthers(number),)


def _pre_vote_ended(state: Election, ended: PreVoteEnded, now: float) -> Stepped:
    if state.role != "candidate" or ended.number != state.number:
        return state, ()
    highest = max((state.highest, *(told.highest for told in ended.answers)))
    asked = msgspec.structs.replace(state, highest=highest)
    alive = [told.master for told in ended.answers if told.master is not None and told.master.node_id != state.node_id]
    if alive:
        unreachable = max(alive).node_id
        return msgspec.structs.replace(_yielding(asked, now + RETRY_S), unreachable=unreachable), ()
    own_order = (state.is_partial, state.node_id)
    better = any(told.is_ready and (told.is_partial, told.node_id) < own_order for told in ended.answers)
    if better and not state.insists:
        return _yielding(asked, now + DEFER_S), ()
    number = state.number + 1
    proposed = _next_term(asked)
    gathering = msgspec.structs.replace(
        asked, role="gathering", number=number, proposed=proposed, asked_at=now, unreachable=""
    )
    return gathering, (Gather(number, proposed),)


def _gathering_again(state: Election, now: float) -> Stepped:
    """A master's round: it leads on until the round has ended."""
    if state.is_asking or now - state.asked_at < ROUND_PAUSE_S:
        return state, ()
    number = state.number + 1
    proposed = _next_term(state)
    asking = msgspec.structs.replace(state, is_asking=True, number=number, proposed=proposed, asked_at=now)
    return asking, (Gather(number, proposed),)


def _round_ended(state: Election, ended: RoundEnded, now: float) -> Stepped:
    is_awaited = state.role == "gathering" or (state.role == "master" and state.is_asking)
    if not is_awaited or ended.number != state.number:
        return state, ()
    before = (SteppedDown(state.term),) if state.role == "master" else ()
    seen = msgspec.structs.replace(state, highest=max(state.highest, ended.highest))
    term = _next_term(seen)
    master = msgspec.structs.replace(
        seen,
        role="master",
        term=term,
        highest=term,
        is_asking=False,
        insists=False,
        rival=NO_TERM,
        asked_at=now,
    )
    return master, (*before, BeganTerm(term))


def _gather_heard(state: Election, term: Term, now: float) -> Stepped:
    if term.node_id == state.node_id or term <= state.highest:
        return state, ()
    seen = msgspec.structs.replace(state, highest=term)
    if state.role == "gathering" and term < state.proposed:
        return seen, ()
    # who asks in a round is about to lead: those that can't hear it are told so, as of a master
    promised = _following(msgspec.structs.replace(seen, heard=term, heard_at=now), now)
    return _stepped_down(promised, state.term) if state.role == "master" else (promised, ())


def _term_seen(state: Election, seen: TermSeen, now: float) -> Stepped:
    noted = msgspec.structs.replace(state, highest=max(state.highest, seen.term))
    if state.role == "master" and seen.is_unmerged:
        return _gathering_again(noted, now)
    return noted, ()


def _master_left(state: Election, node_id: str, now: float) -> Stepped:
    if state.role != "follower" or state.heard.node_id != node_id:
        return state, ()
    return msgspec.structs.replace(
        state, heard=NO_TERM, heard_at=float("-inf"), silent_since=now - state.patience_s
    ), ()


def _next_term(state: Election) -> Term:
    return Term(number=state.highest.number + 1, node_id=state.node_id, incarnation=state.incarnation)


def _following(state: Election, silent_since: float) -> Election:
    """A follower whose silence clock stands at this time."""
    return msgspec.structs.replace(
        state,
        role="follower",
        term=NO_TERM,
        is_asking=False,
        insists=False,
        rival=NO_TERM,
        unreachable="",
        silent_since=silent_since,
        waits_until=0.0,
    )


def _yielding(state: Election, until: float) -> Election:
    """A follower that asks again at this time, unless it hears a beat before."""
    return msgspec.structs.replace(_following(state, state.silent_since), waits_until=until)


def _stepped_down(state: Election, term: Term) -> Stepped:
    return state, (SteppedDown(term),)
