"""A step is a hang by its age against what steps took, and only while the process itself ran on time."""

from __future__ import annotations

import pytest

from skulk.runner.hang import LEAST_S, TIMES, StepWatch


def looks(watch: StepWatch, start: float, stop: float, *, has_work: bool = True) -> float | None:
    """Looks each second; the first hang."""
    now = start
    while now <= stop:
        age_s = watch.look(now, has_work=has_work)
        if age_s is not None:
            return age_s
        now += 1.0
    return None


@pytest.mark.parametrize(
    ("most_s", "longest_s", "limit_s"),
    [(120.0, 0.1, LEAST_S), (120.0, 4.0, 4.0 * TIMES), (120.0, 50.0, 120.0), (1.0, 0.1, 1.0)],
)
def test_the_limit_follows_the_steps_within_its_bounds(most_s: float, longest_s: float, limit_s: float) -> None:
    watch = StepWatch(most_s)
    watch.finished(10.0)
    watch.finished(10.0 + longest_s)
    watch.finished(10.0 + longest_s + 0.01)
    assert watch.limit_s == pytest.approx(limit_s)


def test_a_step_that_does_not_end_is_a_hang_and_one_that_ends_is_none() -> None:
    watch = StepWatch(120.0)
    assert looks(watch, 0.0, 1.0) is None
    watch.finished(1.0)
    assert looks(watch, 2.0, LEAST_S) is None
    assert looks(watch, LEAST_S + 1.0, 200.0) == pytest.approx(LEAST_S + 1.0)


def test_an_idle_engine_never_hangs_and_its_idle_time_is_no_age() -> None:
    watch = StepWatch(5.0)
    assert looks(watch, 0.0, 100.0, has_work=False) is None
    assert looks(watch, 101.0, 106.0) is None
    assert looks(watch, 107.0, 107.0) == pytest.approx(6.0)


def test_a_process_that_stood_still_counts_anew() -> None:
    watch = StepWatch(5.0)
    assert looks(watch, 0.0, 3.0) is None
    assert watch.look(60.0, has_work=True) is None, "it was stopped for 57 s, not its engine"
    assert looks(watch, 61.0, 65.0) is None
    assert looks(watch, 66.0, 66.0) == pytest.approx(6.0)
