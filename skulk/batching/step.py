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
    """What one step computes: decode rows first, then prefill rows; each slot at most once."""

    rows: tuple[StepRow, ...]

    @property
    def token_count(self) -> int:
        return sum(len(row.tokens) for row in self.rows)


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a step gave.

    Attributes:
        sampled: the drawn token of each slot that was to draw.
        failed: of those, the ones in which nothing can be drawn any more, and why; they are not in ``sampled``.
        elapsed_s: how long it took, seconds.
    """

    sampled: dict[int, int]
    failed: dict[int, ErrorBody] = {}
    elapsed_s: float
