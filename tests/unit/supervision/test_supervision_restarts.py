"""The restart policy: back-off, its reset, and the breaker."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from skulk.supervision.restarts import (
    GiveUp,
    RestartAfter,
    RestartPolicy,
    RestartState,
    on_crash,
    on_ready,
)

PATIENT = RestartPolicy(budget=1_000)


def delays(policy: RestartPolicy, crashes: list[float]) -> list[float | None]:
    state, seen = RestartState(), list[float | None]()
    for at in crashes:
        state, decision = on_crash(policy, state, at)
        seen.append(decision.delay_s if isinstance(decision, RestartAfter) else None)
    return seen


def test_the_wait_doubles_to_its_end() -> None:
    assert delays(PATIENT, [float(n) for n in range(8)]) == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]


def test_the_fifth_crash_within_ten_minutes_opens_the_breaker() -> None:
    assert delays(RestartPolicy(), [0, 100, 200, 300, 400])[-1] is None
    assert None not in delays(RestartPolicy(), [0, 150, 300, 450, 600, 750])


def test_a_healthy_minute_resets_the_wait_but_not_the_budget() -> None:
    policy, state = RestartPolicy(), RestartState()
    for n in range(4):
        state = on_ready(state, n * 100.0)
        state, decision = on_crash(policy, state, n * 100.0 + 60.0)
        assert decision == RestartAfter(delay_s=0.2)
    state, decision = on_crash(policy, on_ready(state, 400.0), 460.0)
    assert isinstance(decision, GiveUp)


def test_a_life_just_short_of_healthy_does_not_reset_the_wait() -> None:
    state, _ = on_crash(PATIENT, RestartState(), 0.0)
    _, decision = on_crash(PATIENT, on_ready(state, 1.0), 60.9)
    assert decision == RestartAfter(delay_s=0.4)


def test_a_life_that_was_never_ready_is_not_healthy_however_long() -> None:
    state, _ = on_crash(PATIENT, RestartState(), 0.0)
    assert on_crash(PATIENT, state, 500.0)[1] == RestartAfter(delay_s=0.4)


def test_giving_up_says_what_happened_how_often_and_what_to_do() -> None:
    policy = RestartPolicy(budget=1, advice="Read the log.")
    _, decision = on_crash(policy, RestartState(), 0.0, "nats-server was killed by SIGSEGV.")
    assert decision == GiveUp(
        code="child_failed",
        detail="nats-server was killed by SIGSEGV. 1 crash within 10 min: not started again. Read the log.",
    )


gaps = st.lists(st.floats(0, 2_000, allow_nan=False), max_size=40)


@given(gaps=gaps, budget=st.integers(1, 8))
def test_the_breaker_opens_exactly_when_the_window_is_full(gaps: list[float], budget: int) -> None:
    policy, state, times, now = RestartPolicy(budget=budget), RestartState(), list[float](), 0.0
    for gap in gaps:
        now += gap
        times.append(now)
        state, decision = on_crash(policy, state, now)
        inside = [at for at in times if now - at < policy.window_s]
        # The state forgets what the budget can't see, so a full window is seen as full, never as more.
        assert isinstance(decision, GiveUp) == (len(inside) >= budget)
        assert len(state.crashes) <= budget


@given(
    gaps=gaps,
    first=st.floats(0.01, 5),
    longest=st.floats(5, 100),
    lives=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_the_wait_is_bounded_never_shrinks_without_health_and_is_repeatable(
    gaps: list[float], first: float, longest: float, lives: list[bool]
) -> None:
    policy = RestartPolicy(first_s=first, longest_s=longest, budget=1_000)
    state, now, before = RestartState(), 0.0, 0.0
    for gap, is_ready in zip(gaps, lives, strict=False):
        if is_ready:
            state = on_ready(state, now)
        now += gap
        was_healthy = is_ready and gap >= policy.healthy_s
        assert on_crash(policy, state, now) == on_crash(policy, state, now)
        state, decision = on_crash(policy, state, now)
        assert isinstance(decision, RestartAfter)
        assert first <= decision.delay_s <= longest
        assert decision.delay_s == first if was_healthy else decision.delay_s >= min(before, longest)
        before = decision.delay_s


def test_two_thousand_crashes_do_not_overflow() -> None:
    assert delays(RestartPolicy(budget=10_000), [0.0] * 2_000)[-1] == 10.0
