"""What the engine computes next: decode rows first, then prefill in the order of arrival, within a step's time."""

from __future__ import annotations

import msgspec

from skulk.batching.rate import Rate, chunk_tokens
from skulk.batching.requests import Sequence
from skulk.batching.slots import BatchState
from skulk.batching.step import StepPlan, StepRow


class StepBudget(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one step: of all rows, and of prefill rows among them."""

    tokens: int
    prefill_tokens: int


def budget_for(state: BatchState, rate: Rate) -> StepBudget:
    """The budget that keeps the next step within its time, at the depth of the prompt whose turn it is."""
    head = next((seq for seq in state.running if not seq.is_decoding), None)
    prefill = 0
    if head is not None:
        prefill = chunk_tokens(
            rate,
            depth=head.computed,
            others_decode=any(seq.is_decoding for seq in state.running),
            n_ubatch=state.shape.n_ubatch,
        )
    return StepBudget(tokens=state.shape.n_batch, prefill_tokens=prefill)


def plan_step(state: BatchState, budget: StepBudget) -> StepPlan | None:
    """The next step, or None where nothing runs.

    Every decoding sequence gets its row; then prompts get what the budget leaves, the oldest first, each as much as it
    can use, so that one prompt is done early instead of all late. O(`n_parallel`).
    """
    decoding = sorted((seq for seq in state.running if seq.is_decoding), key=_slot)
    rows = [
        StepRow(slot=seq.slot, tokens=seq.known_tokens(seq.computed, seq.computed + 1), start=seq.computed, sample=True)
        for seq in decoding
    ]
    left = min(budget.prefill_tokens, budget.tokens - len(rows))
    for seq in state.running:
        if left <= 0:
            break
        if seq.is_decoding:
            continue
        count = min(seq.gap, left)
        left -= count
        rows.append(
            StepRow(
                slot=seq.slot,
                tokens=seq.known_tokens(seq.computed, seq.computed + count),
                start=seq.computed,
                sample=count == seq.gap,
            )
        )
    return StepPlan(rows=tuple(rows)) if rows else None


def _slot(sequence: Sequence) -> int:
    return sequence.slot
