"""What the native batch holds after it was filled, read back as llama.cpp reads it."""

from __future__ import annotations

from typing import Any

import pytest

from skulk.batching.step import StepRow
from skulk.engines.llama_cpp.batch import Batch


def row(slot: int, *tokens: int, start: int, sample: bool = True) -> StepRow:
    return StepRow(slot=slot, tokens=tokens, start=start, sample=sample)


def held(batch: Batch) -> list[tuple[int, int, int, int, int]]:
    """Token, position, how many sequences, which, and whether it gives logits, of each row."""
    native: Any = batch.native
    return [
        (native.token[at], native.pos[at], native.n_seq_id[at], native.seq_id[at][0], native.logits[at])
        for at in range(native.n_tokens)
    ]


def test_rows_of_one_token_and_of_many() -> None:
    batch = Batch(8, 4)
    outputs = batch.fill([row(0, 7, start=5), row(2, 8, start=9, sample=False), row(3, 1, 2, 3, start=20)])
    assert outputs == {0: 0, 3: 4}
    assert held(batch) == [(7, 5, 1, 0, 1), (8, 9, 1, 2, 0), (1, 20, 1, 3, 0), (2, 21, 1, 3, 0), (3, 22, 1, 3, 1)]


def test_nothing_is_left_of_the_call_before() -> None:
    batch = Batch(4, 2)
    batch.fill([row(1, 1, 2, 3, 4, start=0)])
    assert batch.fill([row(0, 9, start=3, sample=False), row(1, 5, 6, start=4, sample=False)]) == {}
    assert held(batch) == [(9, 3, 1, 0, 0), (5, 4, 1, 1, 0), (6, 5, 1, 1, 0)]


def test_more_than_it_holds_is_refused() -> None:
    with pytest.raises(AssertionError, match="5 tokens in a batch of 4"):
        Batch(4, 2).fill([row(0, 1, start=0), row(1, 1, 2, 3, 4, start=0)])
