"""What a step gave, folded into the batch."""

from __future__ import annotations

from typing import Any

import msgspec

from skulk.batching.answer import Vocabulary, draw
from skulk.batching.cells import grown
from skulk.batching.operations import Operation
from skulk.batching.plan import passed_slots
from skulk.batching.requests import Emitted, Output, Progressed, Sequence
from skulk.batching.slots import close_choice, end_request
from skulk.batching.state import BatchState, Changed
from skulk.batching.step import StepPlan, StepResult, StepRow
from skulk.wire.generation import FinishReason


def apply(state: BatchState, plan: StepPlan, result: StepResult, vocabulary: Vocabulary, now: float) -> Changed:
    """The batch after ``plan`` was run on it, once or several times.

    Tokens are counted as computed, drawn ones turned into text, ended choices leave their slots, and requests of which
    a choice can't go on end. O(`n_parallel`).
    """
    rows = {row.slot: row for row in plan.rows}
    outputs: list[Output] = []
    running: list[Sequence] = []
    ended: list[tuple[Sequence, FinishReason]] = []
    next_id = state.next_id
    passed = passed_slots(state, plan)
    for sequence in state.running:
        row = rows.get(sequence.slot)
        changes: dict[str, Any] = {"passed": sequence.passed + 1} if sequence.slot in passed else {}
        if row is None:
            running.append(msgspec.structs.replace(sequence, **changes) if changes else sequence)
            continue
        if state.shape.is_unified:
            changes["cells"] = grown(sequence.cells, result.computed(row), next_id)
            next_id += 1
        after, finish_reason = _advance(sequence, row, result, vocabulary, now, changes, outputs)
        running.append(after)
        if finish_reason is not None:
            ended.append((after, finish_reason))
    state = msgspec.structs.replace(state, running=tuple(running), next_id=next_id)
    operations: list[Operation] = []
    for sequence, finish_reason in ended:
        state, end, left = close_choice(state, sequence, now, finish_reason)
        operations += left
        if end is not None:
            outputs.append(end)
    failed = {seq.request.key: result.failed[seq.slot] for seq in running if seq.slot in result.failed}
    for key, error in failed.items():
        changed = end_request(state, key, now, reason="error", error=error)
        state = changed.state
        outputs += changed.outputs
        operations += changed.operations
    return Changed(state, tuple(outputs), tuple(operations))


def _advance(
    sequence: Sequence,
    row: StepRow,
    result: StepResult,
    vocabulary: Vocabulary,
    now: float,
    changes: dict[str, Any],
    outputs: list[Output],
) -> tuple[Sequence, FinishReason | None]:
    """One sequence after its row and ``changes``; what it has to tell goes to ``outputs``."""
    assert row.start == sequence.computed, (
        f"slot {row.slot}: planned from {row.start}, computed are {sequence.computed}"
    )
    changes["computed"] = computed = row.start + result.computed(row)
    key = sequence.request.key
    if not row.sample:
        outputs.append(Progressed(key=key, phase="prefill", processed=computed, total=sequence.known))
        return msgspec.structs.replace(sequence, **changes), None
    assert row.start + len(row.tokens) == sequence.known, f"slot {row.slot} drew before {sequence.known} tokens"
    if not sequence.is_decoding:
        outputs.append(Progressed(key=key, phase="decode", processed=computed, total=computed))
        if sequence.first_at == 0.0:
            changes["first_at"] = now
    tokens = result.sampled.get(row.slot, ())
    assert len(tokens) + (row.slot in result.failed) == result.steps, f"slot {row.slot} drew {len(tokens)} tokens"
    if not tokens:
        return msgspec.structs.replace(sequence, **changes), None
    after, text, finish_reason = draw(sequence, tokens, vocabulary, **changes)
    assert after.known == sequence.known + len(tokens), f"slot {row.slot} was computed beyond its end"
    outputs.append(Emitted(key=key, choice=after.choice, text=text, tokens=tokens, finish_reason=finish_reason))
    return after, finish_reason
