"""The election told as stories: a list of (time, what was heard, what follows)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from skulk.cluster.election import (
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
from skulk.wire.commands import PreVoted
from skulk.wire.state import NO_TERM, Term

Line = tuple[float, ElectionInput, tuple[ElectionEffect, ...]]


def term(number: int, node_id: str = "bbbb") -> Term:
    return Term(number=number, node_id=node_id, incarnation="1")


MINE = term(1, "aaaa")
OTHER = term(1, "cccc")
CAMPAIGN: tuple[Line, ...] = (
    (0.0, BusChanged(True), ()),
    (0.5, Tick(), ()),
    (1.0, Tick(), ()),
    (1.5, Tick(), (AskOthers(1),)),
)
LEADING: tuple[Line, ...] = (
    *CAMPAIGN,
    (1.6, PreVoteEnded(1), (Gather(2, MINE),)),
    (1.7, RoundEnded(2), (BeganTerm(MINE),)),
)


def tell(story: Sequence[Line], *, patience_s: float = 1.5, lead: bool = True, node_id: str = "aaaa") -> Election:
    state = Election(node_id=node_id, incarnation="1", patience_s=patience_s, can_lead=lead, is_connected=False)
    for now, heard, expected in story:
        state, effects = step(state, heard, now)
        assert effects == expected, f"at {now} after {heard}"
    return state


def told(node_id: str, *, master: Term | None = None, ready: bool = False, partial: bool = False) -> PreVoted:
    return PreVoted(node_id=node_id, master=master, is_ready=ready, is_partial=partial)


def test_a_lone_node_leads_at_its_first_tick() -> None:
    state = tell(
        [
            (0.0, BusChanged(True), ()),
            (0.0, Tick(), (AskOthers(1),)),
            (0.0, PreVoteEnded(1), (Gather(2, MINE),)),
            (0.0, RoundEnded(2), (BeganTerm(MINE),)),
        ],
        patience_s=0.0,
    )
    assert state.role == "master"


def test_silence_leads_through_pre_vote_and_round_to_a_term() -> None:
    assert tell(LEADING).term == MINE


def test_beats_keep_a_follower_quiet_and_the_next_term_is_higher() -> None:
    tell(
        [
            (0.0, BusChanged(True), ()),
            (0.9, Tick(), ()),
            (1.0, BeatHeard(OTHER), ()),
            (1.8, Tick(), ()),
            (2.4, Tick(), ()),
            (2.5, Tick(), (AskOthers(1),)),
            (2.6, PreVoteEnded(1), (Gather(2, term(2, "aaaa")),)),
        ]
    )


def test_one_fresh_yes_ends_the_campaign_and_is_told() -> None:
    state = tell([*CAMPAIGN, (1.6, PreVoteEnded(1, (told("bbbb"), told("dddd", master=OTHER))), ())])
    assert state.role == "follower"
    assert state.unreachable == "cccc"
    again, effects = step(state, Tick(), 2.1)
    assert effects == (AskOthers(2),)
    assert step(again, BeatHeard(OTHER), 2.2)[0].unreachable == ""


def test_a_yes_that_means_the_asker_itself_is_none() -> None:
    earlier = Term(number=7, node_id="aaaa", incarnation="0")
    tell([*CAMPAIGN, (1.6, PreVoteEnded(1, (told("bbbb", master=earlier),)), (Gather(2, MINE),))])


@pytest.mark.parametrize(
    ("other", "yields"),
    [
        (told("aaaa0", ready=True), False),
        (told("aa", ready=True), True),
        (told("aa", ready=False), False),
        (told("aa", ready=True, partial=True), False),
    ],
)
def test_the_first_in_order_campaigns(other: PreVoted, yields: bool) -> None:
    expected = () if yields else (Gather(2, MINE),)
    state = tell([*CAMPAIGN, (1.6, PreVoteEnded(1, (other,)), expected)])
    if yields:
        state, effects = step(state, Tick(), 2.4)
        assert effects == ()
        assert answer(state, 2.4).is_ready, "who can't hear the better one yields to this one"
        assert step(state, Tick(), 2.7)[1] == (AskOthers(2),)


def test_a_partial_state_yields_to_a_whole_one() -> None:
    ticks = [(at, Tick(is_partial=True), effects) for at, heard, effects in CAMPAIGN if isinstance(heard, Tick)]
    yes = (told("bbbb", ready=True),)
    tell([CAMPAIGN[0], *ticks, (1.6, PreVoteEnded(1, yes), ())])


def test_a_beat_during_the_pre_vote_ends_it() -> None:
    tell([*CAMPAIGN, (1.55, BeatHeard(OTHER), ()), (1.6, PreVoteEnded(1), ())])


def test_answers_of_an_earlier_pre_vote_or_round_are_late() -> None:
    tell([*CAMPAIGN, (1.6, PreVoteEnded(7), ()), (1.6, RoundEnded(1), ())])
    tell([*LEADING, (1.8, RoundEnded(2), ())])


def test_the_new_term_is_above_all_that_anybody_has_seen() -> None:
    seen = PreVoted(node_id="bbbb", highest=term(5))
    tell(
        [
            *CAMPAIGN,
            (1.6, PreVoteEnded(1, (seen,)), (Gather(2, term(6, "aaaa")),)),
            (1.7, TermSeen(term(8)), ()),
            (1.8, RoundEnded(2, term(10)), (BeganTerm(term(11, "aaaa")),)),
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
            (2.9, Tick(), (AskOthers(1),)),
        ]
    )


def test_a_tick_from_before_the_last_beat_is_no_silence() -> None:
    """The bus's last sign of life may be a little older than what came with it."""
    tell([(5.0, BusChanged(True), ()), (4.9, Tick(), (AskOthers(1),))], patience_s=0.0)


def test_a_master_that_slept_asks_before_it_writes_again() -> None:
    state = tell(
        [
            *LEADING,
            (1.8, Tick(), ()),
            (9.0, Tick(), (SteppedDown(MINE), AskOthers(3))),
            (9.1, PreVoteEnded(3, (told("aa", ready=True),)), (Gather(4, term(2, "aaaa")),)),
        ]
    )
    assert state.role == "gathering"


def test_a_master_that_slept_follows_the_one_that_leads_by_now() -> None:
    slept = (9.0, Tick(), (SteppedDown(MINE), AskOthers(3)))
    state = tell([*LEADING, (1.8, Tick(), ()), slept, (9.1, PreVoteEnded(3, (told("bbbb", master=OTHER),)), ())])
    assert state.role == "follower"


def test_a_master_whose_bus_breaks_stops_and_asks_when_it_is_back() -> None:
    tell(
        [
            *LEADING,
            (1.8, BusChanged(False), (SteppedDown(MINE),)),
            (1.9, Tick(), ()),
            (2.0, BusChanged(True), (AskOthers(3),)),
        ]
    )


def beats(at: float, other: Term, *, followers: int, own: int, last: tuple[ElectionEffect, ...]) -> tuple[Line, Line]:
    heard = BeatHeard(other, followers, own)
    return (at, heard, ()), (at + 0.5, heard, last)


def test_of_two_masters_the_one_with_more_followers_begins_a_higher_term() -> None:
    high = term(9)
    asks = (Gather(3, term(10, "aaaa")),)
    state = tell([*LEADING, *beats(3.0, high, followers=1, own=2, last=asks)])
    assert state.role == "master"
    tell(
        [
            *LEADING,
            *beats(3.0, high, followers=1, own=2, last=asks),
            (3.6, RoundEnded(3), (SteppedDown(MINE), BeganTerm(term(10, "aaaa")))),
        ]
    )


def test_the_other_one_stops_or_waits_for_the_higher_term() -> None:
    assert tell([*LEADING, *beats(3.0, term(9), followers=2, own=1, last=(SteppedDown(MINE),))]).role == "follower"
    lower = Term(number=0, node_id="bbbb", incarnation="1")
    assert tell([*LEADING, *beats(3.0, lower, followers=2, own=1, last=())]).role == "master"


def test_equal_followers_leave_it_to_the_lower_node_id() -> None:
    tell([*LEADING, *beats(3.0, term(1), followers=1, own=1, last=(Gather(3, term(2, "aaaa")),))])


def test_the_last_word_of_a_deposed_master_is_no_meeting() -> None:
    tell([*LEADING, (3.0, BeatHeard(OTHER, 5, 0), ()), (3.1, BeatHeard(OTHER, 5, 0), ())])


def test_a_round_of_a_higher_term_deposes_and_a_lower_one_does_not() -> None:
    assert tell([*LEADING, (2.0, GatherHeard(term(0)), ())]).role == "master"
    assert tell([*LEADING, (2.0, GatherHeard(term(2)), (SteppedDown(MINE),))]).role == "follower"
    assert tell([*CAMPAIGN, (1.6, GatherHeard(term(2)), ()), (1.7, PreVoteEnded(1), ())]).role == "follower"


def test_who_asks_in_a_round_counts_as_a_master_until_it_leads_or_has_failed() -> None:
    """A node that can't hear the candidate learns of it from those that can, and doesn't begin a term beside it."""
    follower = tell([(0.0, BusChanged(True), ()), (0.5, GatherHeard(term(4)), ())])
    assert answer(follower, 1.4).master == term(4)
    assert answer(follower, 1.6).master is None
    deposed = tell([*LEADING, (2.0, GatherHeard(term(4)), (SteppedDown(MINE),))])
    assert answer(deposed, 2.5).master == term(4)


def test_what_the_log_lacks_makes_a_master_repeat_the_round() -> None:
    lacked = TermSeen(term(4), is_unmerged=True)
    tell([*LEADING, (3.0, lacked, (Gather(3, term(5, "aaaa")),)), (3.1, lacked, ())])
    tell([*LEADING, (1.8, lacked, ()), (3.0, TermSeen(NO_TERM, is_unmerged=True), (Gather(3, term(5, "aaaa")),))])
    tell([*LEADING, (3.0, TermSeen(term(4)), ())])


def test_a_goodbye_ends_the_wait() -> None:
    tell(
        [
            (0.0, BusChanged(True), ()),
            (0.1, BeatHeard(OTHER), ()),
            (0.2, MasterLeft("dddd"), ()),
            (0.3, Tick(), ()),
            (0.4, MasterLeft("cccc"), ()),
            (0.5, Tick(), (AskOthers(1),)),
        ]
    )


def test_a_node_that_is_being_stopped_leads_no_more() -> None:
    state = tell([*LEADING, (2.0, Retired(), (SteppedDown(MINE),)), (2.9, Tick(), ()), (3.8, Tick(), ())])
    assert not answer(state, 4.0).is_ready


def test_a_follower_by_setting_never_leads() -> None:
    tell([(0.0, BusChanged(True), ()), (0.9, Tick(), ()), (1.8, Tick(), ())], lead=False)


def test_an_answer_names_the_living_master_or_none() -> None:
    leading = tell([*LEADING, (1.8, Tick(), ())])
    assert answer(leading, 1.9).master == MINE
    assert answer(leading, 9.0).master is None, "it has slept and doesn't know"
    follower = tell([(0.0, BusChanged(True), ()), (0.5, BeatHeard(OTHER), ())])
    assert answer(follower, 1.4).master == OTHER
    assert not answer(follower, 1.4).is_ready
    assert answer(follower, 1.6).master is None
    assert answer(follower, 1.6).is_ready
