"""When does a child that crashed start again? Pure: times are arguments.

| event                                        | streak        | decision                                    |
|----------------------------------------------|---------------|---------------------------------------------|
| crash, budget left                           | + 1           | `RestartAfter` 0.2 s x 2^(streak-1), <= 10 s|
| crash after `healthy_s` of being ready       | starts at 1   | `RestartAfter` 0.2 s                        |
| crash number `budget` within `window_s`      | (kept)        | `GiveUp`                                    |

The streak sets the back-off, the window sets the end: a child that lives a minute between crashes starts again
quickly each time, and still doesn't do so for ever.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How patient to be with a child.

    Attributes:
        first_s: wait after the first crash; doubles with each further one.
        longest_s: longest wait.
        healthy_s: ready for so long, and the next crash counts as a first one.
        budget: so many crashes within `window_s` are one too many.
        window_s: see `budget`.
        advice: what the reader of `GiveUp` should do, a whole sentence.
    """

    first_s: float = 0.2
    longest_s: float = 10.0
    healthy_s: float = 60.0
    budget: int = 5
    window_s: float = 600.0
    advice: str = "Look at its log for the reason, then start it again."


class RestartState(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered between crashes; the empty one stands for a child that never crashed.

    Attributes:
        crashes: times of the crashes within the window, oldest first; at most `RestartPolicy.budget`.
        streak: crashes since the last healthy life.
        ready_at: since when the present life is ready; None before it is.
    """

    crashes: tuple[float, ...] = ()
    streak: int = 0
    ready_at: float | None = None


class RestartAfter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Start it again after ``delay_s``."""

    delay_s: float


class GiveUp(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Don't start it again: the breaker is open until somebody acts.

    Attributes:
        code: of `skulk.errors`; ``child_failed`` when the budget is used up, else the child's own refusal.
        detail: one or two sentences: what happened, what to do.
    """

    code: str
    detail: str


Decision: TypeAlias = RestartAfter | GiveUp


def on_ready(state: RestartState, ready_at: float) -> RestartState:
    """The child serves since ``ready_at``."""
    return RestartState(crashes=state.crashes, streak=state.streak, ready_at=ready_at)


def on_crash(
    policy: RestartPolicy, state: RestartState, crashed_at: float, what: str = "It crashed."
) -> tuple[RestartState, Decision]:
    """The child ended unasked, or didn't become ready.

    Args:
        policy: the patience.
        state: what is remembered.
        crashed_at: seconds on the clock of `RestartState.ready_at`, never before an earlier crash.
        what: the last crash in one sentence, for the text of `GiveUp`.
    """
    assert policy.budget >= 1 and policy.first_s > 0
    assert not state.crashes or crashed_at >= state.crashes[-1], "the clock ran backwards"
    was_healthy = state.ready_at is not None and crashed_at - state.ready_at >= policy.healthy_s
    streak = 1 if was_healthy else state.streak + 1
    recent = (*(at for at in state.crashes if crashed_at - at < policy.window_s), crashed_at)
    after = RestartState(crashes=recent[-policy.budget :], streak=streak)
    if len(recent) >= policy.budget:
        text = f"{what} {_crash_count(len(recent))} within {policy.window_s / 60:g} min: not started again."
        return after, GiveUp(code="child_failed", detail=f"{text} {policy.advice}")
    # The exponent is bounded first: a float overflows after 1,023 doublings.
    return after, RestartAfter(delay_s=min(policy.longest_s, policy.first_s * 2.0 ** min(streak - 1, 64)))


def _crash_count(count: int) -> str:
    return "1 crash" if count == 1 else f"{count} crashes"
