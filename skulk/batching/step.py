"""A step: what the engine is asked to compute at once, and what came of it. Plain data between planner and engine."""

from __future__ import annotations

import msgspec

from skulk.wire.base import ErrorBody


class StepRow(msgspec.Struct, frozen=True, kw_only=True):
    """Consecutive tokens of one slot.

    Attributes:
        slot: which sequence of the engine, 0 to ``n_parallel`` - 1.
        tokens: ids to compute, at least one.
        start: position of the first of them in its sequence.
        sample: draw the next token after the last of them; only such rows produce logits.
    """

    slot: int
    tokens: tuple[int, ...]
    start: int
    sample: bool


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What one step computes: decode rows first, then prefill rows; each slot at most once.

    ``steps``: as many may follow one another in a run, each on the tokens that the one before drew; more than 1 only
    where every row is a single token that samples.
    """

    rows: tuple[StepRow, ...]
    steps: int = 1

    @property
    def token_count(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a step gave, or a run of them.

    Attributes:
        sampled: the drawn tokens of each slot that was to draw, one a step.
        failed: of those, the ones in which nothing can be drawn any more, and why; they lack the last step's token.
        steps: how many there were, at least 1; none follows one that drew an end token, or in which a slot failed.
        elapsed_s: how long it took, seconds.
    """

    sampled: dict[int, tuple[int, ...]]
    failed: dict[int, ErrorBody] = {}
    steps: int = 1
    elapsed_s: float

    def computed(self, row: StepRow) -> int:
        """How many tokens of its sequence a row of the plan has computed: its own, and one in each further step."""
        return len(row.tokens) + self.steps - 1

    @property
    def step_s(self) -> float:
        """Seconds of one step of it."""
        return self.elapsed_s / self.steps
