"""Which replica is asked first: cached beginnings, queues, load and speed, and what two gateways at once do."""

from __future__ import annotations

import itertools
from collections import Counter

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from skulk.placement.prefixes import NO_PREFIX, Held, filter_of, held_by, prefix_of
from skulk.placement.routing import PREFILL_TPS, REQUEST_S, Replica, expected_at, route
from skulk.wire.generation import TextPrompt

PROMPT = prefix_of(TextPrompt(text=" ".join(map(str, range(4000)))))
SHORT = prefix_of(TextPrompt(text="hello"))
THERE = held_by(filter_of(mark.digest for mark in PROMPT.marks))
A = Replica(name="a", slots=4, prefill_tps=500.0, request_s=2.0)
B = Replica(name="b", slots=4, prefill_tps=500.0, request_s=2.0)


def changed(replica: Replica, **fields: object) -> Replica:
    return msgspec.structs.replace(replica, **fields)


def first_of(replicas: tuple[Replica, ...], seed: int = 7, prefix: object = PROMPT) -> str:
    return route(replicas, prefix, seed)[0].name  # type: ignore[arg-type]


def test_none_and_one() -> None:
    assert route((), PROMPT, 1) == ()
    assert [one.name for one in route((A,), PROMPT, 1)] == ["a"]


def test_the_one_that_has_the_beginning_is_asked() -> None:
    assert first_of((A, changed(B, held=THERE))) == "b"


def test_the_beginning_is_found_among_many_whoever_is_drawn() -> None:
    others = tuple(changed(A, name=f"other-{number}") for number in range(30))
    assert {first_of((*others, changed(B, held=THERE)), seed) for seed in range(40)} == {"b"}


def test_a_long_queue_outweighs_a_beginning() -> None:
    assert first_of((A, changed(B, held=THERE, active=4, waiting=20))) == "a"
    assert first_of((A, changed(B, held=THERE, active=3))) == "b"


def test_the_faster_one_and_the_less_busy_one() -> None:
    assert first_of((A, changed(B, prefill_tps=2000.0))) == "b"
    assert first_of((changed(A, active=2), B)) == "b"
    assert first_of((changed(A, active=2, prefill_tps=5000.0), B)) == "a"


def test_what_this_gateway_has_sent_counts_before_the_status_tells() -> None:
    assert first_of((changed(A, sent=3), B)) == "b"
    assert first_of((changed(A, sent=3), changed(B, active=4)), prefix=SHORT) == "a"


def test_a_guess_doesn_t_beat_a_measurement() -> None:
    slow = changed(B, prefill_tps=20.0, request_s=60.0, held=THERE)
    new = Replica(name="new", slots=4)
    assert {first_of((new, slow), seed) for seed in range(20)} == {"b"}
    assert {first_of((changed(new, active=1), changed(slow, held=Held())), seed) for seed in range(20)} == {"b"}


def test_the_figures_of_an_expectation() -> None:
    free = expected_at(changed(A, active=2), NO_PREFIX)
    assert (free.wait_s, free.prefill_s) == (0.0, 1.0 / 500.0 * 1.5)
    full = expected_at(changed(A, active=4, waiting=3), PROMPT)
    assert full.wait_s == 4 / 4 * 2.0
    assert full.prefill_s == PROMPT.tokens / 500.0 * 2.0
    unknown = expected_at(Replica(name="new", active=1), SHORT)
    assert (unknown.wait_s, unknown.prefill_s) == (REQUEST_S, SHORT.tokens / PREFILL_TPS * 2)


def test_two_gateways_that_see_the_same_idle_replica_dont_both_overrun_it() -> None:
    """Ten replicas of one speed, one of them idle by everybody's last word: a few requests of 1,000 go there."""
    busy = tuple(changed(A, name=f"busy-{number}", active=2) for number in range(9))
    chosen = Counter(first_of((*busy, changed(B, name="idle")), seed) for seed in range(1000))
    assert len(chosen) == 10
    assert 120 < chosen["idle"] < 280  # 1 - 9/10 x 8/9 = 0.2


def test_equal_replicas_share_the_work() -> None:
    chosen = Counter(first_of((A, B), seed) for seed in range(1000))
    assert 400 < chosen["a"] < 600


names = st.lists(st.text("abcdefgh", min_size=1, max_size=3), min_size=1, max_size=8, unique=True)
replicas_of = names.flatmap(
    lambda found: st.tuples(
        *(
            st.builds(
                Replica,
                name=st.just(name),
                slots=st.integers(1, 16),
                active=st.integers(0, 16),
                waiting=st.integers(0, 64),
                sent=st.integers(0, 64),
                prefill_tps=st.sampled_from((0.0, 10.0, 400.0, 5000.0)),
                request_s=st.sampled_from((0.0, 0.5, 20.0)),
                held=st.sampled_from((Held(), THERE)),
            )
            for name in found
        )
    )
)


@given(replicas_of, st.integers())
@settings(max_examples=200)
def test_every_replica_stands_in_the_order_once_and_input_order_is_irrelevant(
    replicas: tuple[Replica, ...], seed: int
) -> None:
    order = route(replicas, PROMPT, seed)
    assert sorted(one.name for one in order) == sorted(replica.name for replica in replicas)
    assert route(tuple(reversed(replicas)), PROMPT, seed) == order
    assert all(first.first_token_s <= later.first_token_s for first, later in itertools.pairwise(order[1:]))


@given(replicas_of, st.integers())
@settings(max_examples=200)
def test_the_first_is_no_later_than_half_of_the_others_can_be_by_chance(
    replicas: tuple[Replica, ...], seed: int
) -> None:
    """It is the soonest of at least two, so never the very last where the last is alone in that."""
    order = route(replicas, PROMPT, seed)
    latest = max(one.first_token_s for one in order)
    alone = sum(one.first_token_s == latest for one in order) == 1
    assert len(order) == 1 or not alone or order[0].first_token_s < latest


@given(replicas_of, st.integers(), st.integers(1, 50))
@settings(max_examples=200)
def test_more_load_never_makes_a_replica_sooner(replicas: tuple[Replica, ...], seed: int, more: int) -> None:
    one = replicas[0]
    busier = changed(one, active=one.active + more, waiting=one.waiting + more)
    assert expected_at(busier, PROMPT).first_token_s >= expected_at(one, PROMPT).first_token_s
    with_beginning = changed(one, held=THERE)
    assert expected_at(with_beginning, PROMPT).prefill_s <= expected_at(one, PROMPT).prefill_s
    if route(replicas, PROMPT, seed)[0].name != one.name:
        assert route((busier, *replicas[1:]), PROMPT, seed)[0].name != one.name or len(replicas) == 1
