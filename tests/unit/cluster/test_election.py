"""The election told as stories: a list of (time, what was heard, what follows)."""

from __future__ import annotations

from collections.abc import Sequence

from skulk.cluster.election import (
    BeatHeard,
    BeganTerm,
    BusChanged,
    Election,
    ElectionEffect,
    ElectionInput,
    SteppedDown,
    Tick,
    step,
)
from skulk.wire.state import Term

OTHER = Term(number=1, node_id="bbbb", incarnation="1")
MINE = Term(number=1, node_id="aaaa", incarnation="1")


def tell(
    story: Sequence[tuple[float, ElectionInput, tuple[ElectionEffect, ...]]],
    *,
    patience_s: float = 1.5,
    lead: bool = True,
) -> Election:
    state = Election(node_id="aaaa", incarnation="1", patience_s=patience_s, can_lead=lead, is_connected=False)
    for now, heard, expected in story:
        state, effects = step(state, heard, now)
        assert effects == expected, f"at {now} after {heard}"
    return state


def test_a_lone_node_leads_at_its_first_tick() -> None:
    state = tell([(0.0, BusChanged(True), ()), (0.0, Tick(), (BeganTerm(MINE),))], patience_s=0.0)
    assert state.role == "master"


def test_silence_makes_a_master_after_the_patience() -> None:
    tell(
        [
            (0.0, BusChanged(True), ()),
            (0.5, Tick(), ()),
            (1.0, Tick(), ()),
            (1.5, Tick(), (BeganTerm(MINE),)),
        ]
    )


def test_beats_keep_a_follower_quiet_and_the_next_term_is_higher() -> None:
    tell(
        [
            (0.0, BusChanged(True), ()),
            (0.9, Tick(), ()),
            (1.0, BeatHeard(OTHER), ()),
            (1.8, Tick(), ()),
            (2.4, Tick(), ()),
            (2.5, Tick(), (BeganTerm(Term(number=2, node_id="aaaa", incarnation="1")),)),
        ]
    )


def test_without_a_bus_nobody_campaigns() -> None:
    tell([(0.5, Tick(), ()), (1.2, Tick(), ()), (2.0, Tick(), ())])


def test_a_late_tick_restarts_the_silence() -> None:
    tell([(0.0, BusChanged(True), ()), (0.2, Tick(), ()), (60.0, Tick(), ()), (61.0, Tick(), ())])


def test_a_reconnect_restarts_the_silence() -> None:
    tell(
        [
            (0.0, BusChanged(True), ()),
            (0.9, Tick(), ()),
            (1.0, BusChanged(False), ()),
            (1.4, BusChanged(True), ()),
            (1.8, Tick(), ()),
            (2.5, Tick(), ()),
            (2.9, Tick(), (BeganTerm(MINE),)),
        ]
    )


def test_a_tick_from_before_the_last_beat_is_no_silence() -> None:
    """The bus's last sign of life may be a little older than what came with it."""
    state = tell([(5.0, BusChanged(True), ()), (4.9, Tick(), (BeganTerm(MINE),))], patience_s=0.0)
    assert state.role == "master"


def test_a_higher_term_deposes_and_a_lower_one_does_not() -> None:
    higher = Term(number=2, node_id="bbbb", incarnation="1")
    lower = Term(number=0, node_id="bbbb", incarnation="1")
    state = tell(
        [
            (0.0, BusChanged(True), ()),
            (0.0, Tick(), (BeganTerm(MINE),)),
            (0.1, BeatHeard(MINE), ()),
            (0.2, BeatHeard(lower), ()),
            (0.3, BeatHeard(higher), (SteppedDown(MINE),)),
        ],
        patience_s=0.0,
    )
    assert state.role == "follower"


def test_equal_numbers_are_different_terms_ordered_by_node() -> None:
    """Two masters can share a number, never a term: the one with the greater node id goes on."""
    tell(
        [
            (0.0, BusChanged(True), ()),
            (0.0, Tick(), (BeganTerm(MINE),)),
            (0.1, BeatHeard(OTHER), (SteppedDown(MINE),)),
        ],
        patience_s=0.0,
    )


def test_a_master_without_a_bus_steps_down() -> None:
    tell(
        [
            (0.0, BusChanged(True), ()),
            (0.0, Tick(), (BeganTerm(MINE),)),
            (0.1, BusChanged(False), (SteppedDown(MINE),)),
        ],
        patience_s=0.0,
    )


def test_a_follower_by_setting_never_leads() -> None:
    tell([(0.0, BusChanged(True), ()), (0.9, Tick(), ()), (1.8, Tick(), ())], lead=False)
