"""Who writes: a pure state machine, `step(state, input, now) -> (state, effects)`; time is an argument.

    role      input                                    becomes   effect
    follower  silence of the master for `patience_s`   master    BeganTerm(number + 1)
    follower  beat of a master                         follower  silence restarts
    any       bus lost, or a tick more than 1 s late   same      silence restarts
    master    beat of a higher term                    follower  SteppedDown
    master    bus lost                                 follower  SteppedDown

A node without a bus connection never campaigns. The pre-vote, the deterministic order of candidates and the round
in which a new master gathers what others know join here with the control plane of many nodes.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import msgspec

from skulk.wire.state import NO_TERM, Term

LATE_TICK_S: Final = 1.0


class BeatHeard(msgspec.Struct, frozen=True):
    """A master's beat of this term."""

    term: Term


class BusChanged(msgspec.Struct, frozen=True):
    """The own bus connection came or went."""

    is_connected: bool


class Tick(msgspec.Struct, frozen=True):
    """Time went on; due every quarter of a second.

    Its ``now`` is when the bus last showed a sign of life: nobody can have been heard after that.
    """


class BeganTerm(msgspec.Struct, frozen=True):
    """This node is the master of a new term from now on."""

    term: Term


class SteppedDown(msgspec.Struct, frozen=True):
    """This node must not write any more."""

    term: Term


ElectionInput: TypeAlias = BeatHeard | BusChanged | Tick
ElectionEffect: TypeAlias = BeganTerm | SteppedDown


class Election(msgspec.Struct, frozen=True, kw_only=True):
    """What one node knows of the mastership.

    Attributes:
        patience_s: silence of a master after which this node takes its place.
        can_lead: False: a node that only follows.
        highest: the highest term seen; the next one is above it.
        silent_since: when a beat was last heard, or the silence clock restarted.
        ticked_at: when `Tick` last came.
    """

    node_id: str
    incarnation: str
    patience_s: float
    can_lead: bool = True
    role: Literal["follower", "master"] = "follower"
    term: Term = NO_TERM
    highest: Term = NO_TERM
    is_connected: bool = False
    silent_since: float = 0.0
    ticked_at: float = 0.0


def step(state: Election, heard: ElectionInput, now: float) -> tuple[Election, tuple[ElectionEffect, ...]]:
    """The next state and what is to be done."""
    match heard:
        case BeatHeard():
            return _beat_heard(state, heard.term, now)
        case BusChanged():
            changed = msgspec.structs.replace(state, is_connected=heard.is_connected, silent_since=now)
            if state.role == "master" and not heard.is_connected:
                return _stepped_down(changed)
            return changed, ()
        case Tick():
            return _ticked(state, now)


def _beat_heard(state: Election, term: Term, now: float) -> tuple[Election, tuple[ElectionEffect, ...]]:
    if term == state.term or term < state.highest:
        return state, ()
    followed = msgspec.structs.replace(state, highest=term, silent_since=now)
    return _stepped_down(followed) if state.role == "master" else (followed, ())


def _ticked(state: Election, now: float) -> tuple[Election, tuple[ElectionEffect, ...]]:
    is_late = state.ticked_at > 0 and now - state.ticked_at > LATE_TICK_S
    ticked = msgspec.structs.replace(
        state,
        ticked_at=now,
        silent_since=now if is_late else state.silent_since,
    )
    is_due = max(0.0, now - ticked.silent_since) >= state.patience_s
    if state.role == "master" or not (is_due and state.can_lead and state.is_connected):
        return ticked, ()
    term = Term(number=state.highest.number + 1, node_id=state.node_id, incarnation=state.incarnation)
    master = msgspec.structs.replace(ticked, role="master", term=term, highest=term)
    return master, (BeganTerm(term),)


def _stepped_down(state: Election) -> tuple[Election, tuple[ElectionEffect, ...]]:
    return msgspec.structs.replace(state, role="follower", term=NO_TERM), (SteppedDown(state.term),)
