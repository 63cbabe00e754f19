"""What the engine computes next: decode rows first, then prefill in the order of arrival, within a step's time.

A short prompt that fits into the step may be computed before a longer one that doesn't, at most `MAX_PASSED` times: it
is done at once, and the longer one waits one step more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import msgspec

from skulk.batching.rate import CHUNK_UNIT, Rate, chunk_tokens, prefill_token_s, run_steps
from skulk.batching.requests import Sequence
from skulk.batching.state import BatchState, used_cells
from skulk.batching.step import StepPlan, StepRow

MAX_PASSED: Final = 4


class StepBudget(msgspec.Struct, frozen=True, kw_only=True):
    """What one step may take.

    Attributes:
        tokens: of all rows.
        prefill_tokens: of prefill rows among them, if all of them were as deep as the prompt whose turn it is.
        steps: of a run, where there are no prefill rows.
        prices: of a token of other prompts, by slot, in tokens of the one whose turn it is; 1 where none is named.
    """

    tokens: int
    prefill_tokens: int
    steps: int = 1
    prices: Mapping[int, float] = {}

    def price(self, seq: Sequence, count: int) -> int:
        """What ``count`` tokens of this prompt take of ``prefill_tokens``; never less than their number."""
        return math.ceil(count * self.prices.get(seq.slot, 1.0))


def budget_for(state: BatchState, rate: Rate) -> StepBudget:
    """The budget that keeps the next step within its time, at the depth of the prompt whose turn it is, and its cells.

    `skulk.batching.schedule` has seen to it that one chunk of that prompt has its cells.
    """
    prompts = _prompts(state)
    if not prompts:
        return StepBudget(tokens=state.shape.n_batch, prefill_tokens=0, steps=_steps(state, rate))
    prefill = chunk_tokens(
        rate,
        depth=prompts[0].computed,
        others_decode=len(prompts) < len(state.running),
        n_ubatch=state.shape.n_ubatch,
        gap=prompts[0].gap,
        backlog=sum(seq.gap for seq in prompts),
    )
    if state.shape.is_unified:
        prefill = _within_cells(state, prefill)
    return StepBudget(tokens=state.shape.n_batch, prefill_tokens=prefill, prices=_prices(prompts, rate))


def _prices(prompts: list[Sequence], rate: Rate) -> dict[int, float]:
    """Of the prompts behind the first one that are deeper than it, so that a token of theirs takes longer."""
    if len(prompts) == 1:
        return {}
    first = prefill_token_s(rate, prompts[0].computed)
    if first <= 0.0:
        return {}
    prices = {seq.slot: prefill_token_s(rate, seq.computed) / first for seq in prompts[1:]}
    return {slot: price for slot, price in prices.items() if price > 1.0}


def _steps(state: BatchState, rate: Rate) -> int:
    """The steps of a run in which nothing has to happen between two of them, but that an end token ends it.

    None goes beyond a limit of tokens, a position to be kept, or the cells. A stop string is found in the text alone.
    """
    steps = run_steps(rate)
    for seq in state.running:
        if seq.request.stop or seq.marks:
            return 1
        steps = min(steps, seq.may_need)
    if steps > 1 and state.running and state.shape.is_unified:
        steps = min(steps, _free_cells(state) // len(state.running))
    return max(1, steps)


def _free_cells(state: BatchState) -> int:
    return state.shape.kv_cells - used_cells(state.running, state.idle)


def _within_cells(state: BatchState, prefill: int) -> int:
    free = _free_cells(state) - sum(seq.is_decoding for seq in state.running)
    if prefill <= free:
        return prefill
    assert free > 0, "no cell is free for a prompt"
    return free // CHUNK_UNIT * CHUNK_UNIT or free


def plan_step(state: BatchState, budget: StepBudget) -> StepPlan | None:
    """The next step, or None where nothing runs.

    Every decoding sequence gets its row; then prompts get what the budget leaves, the oldest first, each as much as it
    can use, so that one prompt is done early instead of all late. Behind one unit of them others join only whole: the
    first tokens of who is done needn't wait for a part of the next prompt. O(`n_parallel`).
    """
    decoding = sorted([seq for seq in state.running if seq.is_decoding], key=_slot)
    rows = [StepRow(slot=seq.slot, tokens=(seq.drawn.last,), start=seq.computed, sample=True) for seq in decoding]
    if len(rows) == len(state.running):
        return StepPlan(rows=tuple(rows), steps=budget.steps) if rows else None
    room = left = min(budget.prefill_tokens, budget.tokens - len(rows))
    prompts = _prompts(state)
    for seq in _prefill_order(prompts, budget, left):
        price = budget.price(seq, seq.gap)
        if left <= 0 or (price > left and seq is not prompts[0] and room - left >= CHUNK_UNIT):
            break
        count = seq.gap if price <= left else max(1, left * seq.gap // price)
        left -= budget.price(seq, count)
        rows.append(_row(seq, _up_to_mark(seq, count)))
    return StepPlan(rows=tuple(rows)) if rows else None


def passed_slots(state: BatchState, plan: StepPlan) -> frozenset[int]:
    """Slots whose prompts waited in this step for one that came later."""
    if len(state.running) < 2:
        return frozenset()
    prompts = {seq.slot: seq.order for seq in state.running if not seq.is_decoding}
    if len(prompts) < 2:
        return frozenset()
    passed: set[int] = set()
    for row in plan.rows:
        order = prompts.pop(row.slot, None)
        if order is not None:
            passed.update(slot for slot, older in prompts.items() if older < order)
    return frozenset(passed)


def _prompts(state: BatchState) -> list[Sequence]:
    """What is to be prefilled, the oldest first."""
    return [seq for seq in state.running if not seq.is_decoding]


def _prefill_order(prompts: list[Sequence], budget: StepBudget, left: int) -> list[Sequence]:
    """Prompts, the oldest first; while that one is too long for the step, those behind it that fit it go before it."""
    if prompts[0].gap <= left:
        return prompts
    ahead: list[Sequence] = []
    behind: list[Sequence] = []
    may_pass = True
    for seq in prompts:
        price = budget.price(seq, seq.gap)
        if may_pass and behind and price <= left:
            ahead.append(seq)
            left -= price
        else:
            behind.append(seq)
            may_pass = may_pass and seq.passed < MAX_PASSED
    return [*ahead, *behind]


def _row(seq: Sequence, count: int) -> StepRow:
    return StepRow(
        slot=seq.slot,
        tokens=seq.known_tokens(seq.computed, seq.computed + count),
        start=seq.computed,
        sample=count == seq.gap,
    )


def _to_mark(seq: Sequence) -> int | None:
    return seq.marks[0] - seq.computed if seq.marks else None


def _up_to_mark(seq: Sequence, count: int) -> int:
    """A chunk ends where the sequence's state is to be kept."""
    mark = _to_mark(seq)
    return count if mark is None else min(count, mark)


def _slot(sequence: Sequence) -> int:
    return sequence.slot
