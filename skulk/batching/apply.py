"""What a step gave, folded into the batch."""

from __future__ import annotations

import msgspec

from skulk.batching.answer import Vocabulary, draw
from skulk.batching.requests import Emitted, Output, Progressed, Sequence
from skulk.batching.slots import BatchState, Changed, close_choice
from skulk.batching.step import StepPlan, StepResult, StepRow
from skulk.wire.generation import FinishReason


def apply(state: BatchState, plan: StepPlan, result: StepResult, vocabulary: Vocabulary, now: float) -> Changed:
    """The batch after ``plan`` was run on it.

    Tokens are counted as computed, drawn ones turned into text, ended choices leave their slots. O(`n_parallel`).
    """
    rows = {row.slot: row for row in plan.rows}
    outputs: list[Output] = []
    running: list[Sequence] = []
    ended: list[tuple[Sequence, FinishReason]] = []
    for sequence in state.running:
        row = rows.get(sequence.slot)
        if row is None:
            running.append(sequence)
            continue
        after, finish_reason = _advance(sequence, row, result, vocabulary, now, outputs)
        running.append(after)
        if finish_reason is not None:
            ended.append((after, finish_reason))
    state = msgspec.structs.replace(state, running=tuple(running))
    for sequence, finish_reason in ended:
        state, end = close_choice(state, sequence, now, finish_reason)
        if end is not None:
            outputs.append(end)
    return Changed(state, tuple(outputs), tuple(sequence.slot for sequence, _ in ended))


def _advance(
    sequence: Sequence,
    row: StepRow,
    result: StepResult,
    vocabulary: Vocabulary,
    now: float,
    outputs: list[Output],
) -> tuple[Sequence, FinishReason | None]:
    """One sequence after its row; what it has to tell goes to ``outputs``."""
    assert row.start == sequence.computed, (
        f"slot {row.slot}: planned from {row.start}, computed are {sequence.computed}"
    )
    computed = row.start + len(row.tokens)
    was_prefill = not sequence.is_decoding
    sequence = msgspec.structs.replace(sequence, computed=computed)
    key = sequence.request.key
    if not row.sample:
        outputs.append(Progressed(key=key, phase="prefill", processed=computed, total=sequence.known))
        return sequence, None
    assert computed == sequence.known, f"slot {row.slot}: drew at {computed} of {sequence.known} tokens"
    if was_prefill:
        outputs.append(Progressed(key=key, phase="decode", processed=computed, total=computed))
        sequence = msgspec.structs.replace(sequence, first_at=now)
    token = result.sampled[row.slot]
    sequence, text, finish_reason = draw(sequence, token, vocabulary)
    outputs.append(Emitted(key=key, choice=sequence.choice, text=text, tokens=(token,), finish_reason=finish_reason))
    return sequence, finish_reason
