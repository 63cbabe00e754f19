"""The measured rate and the chunk that follows from it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from skulk.batching.rate import (
    CHUNK_UNIT,
    DEPTH_BAND,
    MAX_RUN,
    RUN_S,
    STEP_ALONE_S,
    STEP_CROWDED_S,
    STEP_SHARED_S,
    STEPS_OF_BACKLOG,
    Rate,
    chunk_tokens,
    measured,
    prefill_token_s,
    run_steps,
    shared_step_s,
)
from skulk.batching.step import StepPlan, StepRow


def plan_of(*, decode: int = 0, prefill: int = 0, depth: int = 0) -> StepPlan:
    rows = [StepRow(slot=slot, tokens=(1,), start=9, sample=True) for slot in range(decode)]
    if prefill:
        rows.append(StepRow(slot=decode, tokens=(1,) * prefill, start=depth, sample=False))
    return StepPlan(rows=tuple(rows))


def test_nothing_measured_means_the_smallest_chunk() -> None:
    assert chunk_tokens(Rate(), depth=0, others_decode=False, n_ubatch=512) == CHUNK_UNIT


def test_the_chunk_ends_in_time_alone_and_beside_others() -> None:
    rate = measured(Rate(), plan_of(prefill=512), 0.512)
    assert chunk_tokens(rate, depth=0, others_decode=False, n_ubatch=2048) == 960
    assert chunk_tokens(rate, depth=0, others_decode=False, n_ubatch=512) == 512
    assert chunk_tokens(rate, depth=0, others_decode=True, n_ubatch=512) == 192


def test_quick_steps_follow_one_another_in_runs() -> None:
    assert run_steps(Rate()) == 1, "nothing is known"
    assert run_steps(Rate(decode_s=RUN_S / 2)) == 2
    assert run_steps(Rate(decode_s=RUN_S / 1.9)) == 1
    assert run_steps(Rate(decode_s=3.0)) == 1
    assert run_steps(Rate(decode_s=1e-9)) == MAX_RUN


def test_a_crowd_of_prompts_makes_longer_steps_and_a_few_do_not() -> None:
    rate = measured(Rate(), plan_of(prefill=512), 0.512)
    few, crowd = (int(seconds * STEPS_OF_BACKLOG / 0.001) for seconds in (STEP_SHARED_S, STEP_CROWDED_S))

    def chunk(backlog: int) -> int:
        return chunk_tokens(rate, depth=0, others_decode=True, n_ubatch=2048, backlog=backlog)

    assert chunk(0) == chunk(few) == 192
    assert chunk((few + crowd) // 2) == 448
    assert chunk(crowd) == chunk(10**6) == 640


def test_a_size_is_guessed_one_step_cheaper_however_far_it_is() -> None:
    rate = measured(Rate(), plan_of(prefill=64), 0.064)
    assert prefill_token_s(rate, 0, 64) == 0.001
    assert prefill_token_s(rate, 0, 128) == prefill_token_s(rate, 0, 512) < 0.001


def test_few_last_tokens_get_no_step_of_their_own() -> None:
    rate = measured(Rate(), plan_of(prefill=64), 0.32)

    def chunk(gap: int, n_ubatch: int = 512) -> int:
        return chunk_tokens(rate, depth=0, others_decode=True, n_ubatch=n_ubatch, gap=gap, backlog=gap)

    assert chunk(CHUNK_UNIT + CHUNK_UNIT // 2) == CHUNK_UNIT + CHUNK_UNIT // 2
    assert chunk(CHUNK_UNIT + CHUNK_UNIT // 2 + 1) == CHUNK_UNIT
    assert chunk(CHUNK_UNIT + 1, n_ubatch=CHUNK_UNIT) == CHUNK_UNIT


def test_a_prompt_that_ends_in_time_is_not_cut() -> None:
    rate = measured(Rate(), plan_of(prefill=512), 0.512)
    for gap, expected in ((200, 200), (250, 250), (251, 192), (100, 192)):
        assert chunk_tokens(rate, depth=0, others_decode=True, n_ubatch=512, gap=gap) == expected
    assert chunk_tokens(rate, depth=0, others_decode=False, n_ubatch=512, gap=520) == 512


@given(st.floats(0.0, 1e6))
def test_a_step_beside_others_has_two_bounds(backlog_s: float) -> None:
    assert STEP_SHARED_S <= shared_step_s(backlog_s) <= STEP_CROWDED_S < STEP_ALONE_S


def test_what_decoding_takes_is_not_there_for_prefill() -> None:
    rate = measured(measured(Rate(), plan_of(prefill=512), 0.512), plan_of(decode=4), 0.1)
    assert chunk_tokens(rate, depth=0, others_decode=True, n_ubatch=512) == 128


def test_a_mixed_step_teaches_the_prefill_rate_without_its_decode_rows() -> None:
    rate = measured(Rate(), plan_of(decode=4), 0.1)
    assert prefill_token_s(measured(rate, plan_of(decode=4, prefill=100), 0.3), 0) == 0.002


def test_the_rate_is_kept_by_depth_and_the_nearest_band_stands_in() -> None:
    rate = measured(Rate(), plan_of(prefill=100), 0.1)
    rate = measured(rate, plan_of(prefill=100, depth=3 * DEPTH_BAND), 0.4)
    assert prefill_token_s(rate, 0) == 0.001
    assert prefill_token_s(rate, 2 * DEPTH_BAND) == 0.001
    assert prefill_token_s(rate, 3 * DEPTH_BAND) == 0.004
    assert prefill_token_s(rate, 90 * DEPTH_BAND) == 0.004
    only_deep = measured(Rate(), plan_of(prefill=100, depth=3 * DEPTH_BAND), 0.4)
    assert prefill_token_s(only_deep, 0) == 0.004


def test_small_chunks_teach_nothing() -> None:
    assert measured(Rate(), plan_of(prefill=CHUNK_UNIT - 1), 5.0) == Rate()


def test_one_slow_step_moves_the_mean_but_does_not_become_it() -> None:
    rate = measured(Rate(), plan_of(prefill=100), 0.1)
    disturbed = prefill_token_s(measured(rate, plan_of(prefill=100), 1.1), 0)
    assert 0.001 < disturbed < 0.006


@given(
    st.floats(1e-6, 1.0),
    st.floats(0.0, 1.0),
    st.integers(0, 5000),
    st.booleans(),
    st.sampled_from([1, 32, 64, 100, 512, 2048]),
    st.integers(0, 3000),
    st.integers(0, 100_000),
)
def test_a_chunk_is_whole_units_within_its_time(
    per_token: float, decode_s: float, depth: int, others_decode: bool, n_ubatch: int, gap: int, backlog: int
) -> None:
    rate = Rate(decode_s=decode_s, prefill_s=((per_token,),))
    chunk = chunk_tokens(rate, depth=depth, others_decode=others_decode, n_ubatch=n_ubatch, gap=gap, backlog=backlog)
    unit = min(CHUNK_UNIT, n_ubatch)
    assert unit <= chunk <= n_ubatch
    assert chunk % unit == 0 or chunk == gap
    # The last few tokens of a prompt, half a unit at most, go along (ADR 18).
    rest = chunk % unit
    counted = chunk - rest if rest <= unit // 2 else chunk
    if counted > unit:
        limit_s = shared_step_s(backlog * prefill_token_s(rate, depth)) if others_decode else STEP_ALONE_S
        assert counted * prefill_token_s(rate, depth, chunk) + (decode_s if others_decode else 0.0) <= limit_s + 1e-9


def test_a_larger_chunk_that_was_never_run_is_tried_and_kept_if_it_is_cheaper() -> None:
    """In tiles a token of 64 costs 3.5 ms and one of 128 costs 1.9: after a slow spell the larger chunk comes back."""
    rate = measured(Rate(), plan_of(prefill=64), 64 * 0.02)
    assert chunk_tokens(rate, depth=0, others_decode=True, n_ubatch=512) == 64
    for _ in range(20):
        rate = measured(rate, plan_of(prefill=64), 64 * 0.0022)
    assert chunk_tokens(rate, depth=0, others_decode=True, n_ubatch=512) == 128, "0.24 s by the guess"
    rate = measured(rate, plan_of(prefill=128), 128 * 0.0012)
    assert chunk_tokens(rate, depth=0, others_decode=True, n_ubatch=512) == 192
    rate = measured(measured(rate, plan_of(prefill=192), 192 * 0.002), plan_of(prefill=192), 192 * 0.002)
    assert chunk_tokens(rate, depth=0, others_decode=True, n_ubatch=512) == 128, "it was dearer than guessed"
