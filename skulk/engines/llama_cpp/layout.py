"""How a context is laid out, as pure functions: cache layout, rounding, and the parts of a step that fit one call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Final

import msgspec

from skulk.batching.step import StepRow
from skulk.engines.protocol import LoadSpec
from skulk.errors import StartError

# llama.cpp rounds a stream's cells up to this (GGML_PAD in llama_context); we round down before it can.
CELL_STEP: Final = 256

# ggml_type of ggml.h, those that llama.cpp accepts for a cache.
KV_TYPES: Final[dict[str, int]] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}
_LEAST_OF_OWN: Final = 1 / 32


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """What to ask ``llama_init_from_model`` for. Lengths in tokens.

    Attributes:
        unified: one cache that all sequences share; else one stream of equal size a sequence.
        n_ctx: cells in all, a multiple of `CELL_STEP` times the streams.
        window: the most one request may use.
        n_batch: the most tokens of one call.
    """

    unified: bool
    n_ctx: int
    window: int
    n_batch: int
    n_ubatch: int


def layout_of(spec: LoadSpec) -> Layout:
    """The layout for what was admitted: streams when every sequence has its whole window, else one unified cache.

    Streams decode faster (unified was measured at 0.79 to 0.96 of them with distinct prompts). Cells are rounded
    down to multiples of 256 a stream, so that no more is allocated than was admitted; only below 256 up to 256.
    """
    assert spec.context_length > 0 and spec.n_parallel > 0 and spec.kv_cells > 0
    streams = spec.n_parallel if spec.kv_cells >= spec.n_parallel * spec.context_length else 1
    cells_per_stream = max(CELL_STEP, spec.kv_cells // streams // CELL_STEP * CELL_STEP)
    n_ctx = cells_per_stream * streams
    n_batch = min(spec.n_batch, n_ctx)
    return Layout(
        unified=streams == 1,
        n_ctx=n_ctx,
        window=min(spec.context_length, cells_per_stream),
        n_batch=n_batch,
        n_ubatch=min(spec.n_ubatch, n_batch),
    )


def kv_type_of(name: str) -> int:
    """The ``ggml_type`` of a cache type's name.

    Raises:
        StartError: ``config_invalid``: there is no such type.
    """
    if name not in KV_TYPES:
        raise StartError(
            "config_invalid",
            f"SKULK_LLAMA_CPP_KV_TYPE is {name!r}, which llama.cpp's cache can't be; choose one of "
            f"{', '.join(KV_TYPES)}.",
        )
    return KV_TYPES[name]


def idle_cell_s(cells: int, *, own_s: float, beside_s: float) -> float:
    """Seconds that one idle cell adds to each row of a decode step.

    Kernels on processors pass over cells that a row doesn't attend to; that costs a small part of attending to them (a
    fourteenth was measured), less than what steps differ by anyway, so it is taken for a thirty-second at least.

    Args:
        cells: so many.
        own_s: what they add to a step of the sequence they belong to; negative where other things weighed more.
        beside_s: what they add to a step of another sequence.
    """
    return max(0.0, beside_s, own_s * _LEAST_OF_OWN) / cells


def calls_of(rows: Sequence[StepRow], layout: Layout) -> tuple[tuple[StepRow, ...], ...]:
    """The native calls that compute a step, each with its rows in the order of their slots.

    llama.cpp cuts a call of several streams so that all of its neighbouring slots get equally many rows at a time
    (``llama_batch_allocr::split_equal``). Decode rows beside a chunk of 64 would take one row of it and leave 63, and
    below 64 flash attention is half as fast. So only rows of one length share a call where each sequence has a
    stream, and only as many as one pass takes; a unified cache attends to all rows of a call at once.
    """
    if len(rows) == 1 and len(rows[0].tokens) <= layout.n_ubatch:
        return (tuple(rows),)
    if layout.unified:
        return split_rows(sorted(rows, key=lambda row: row.slot), layout.n_batch)
    ordered = sorted(rows, key=lambda row: (len(row.tokens), row.slot))
    calls: list[tuple[StepRow, ...]] = []
    for length, group in groupby(ordered, key=lambda row: len(row.tokens)):
        equal = tuple(group)
        width = max(1, layout.n_ubatch // length)
        for at in range(0, len(equal), width):
            calls += split_rows(equal[at : at + width], layout.n_batch)
    return tuple(calls)


def split_rows(rows: Sequence[StepRow], limit: int) -> tuple[tuple[StepRow, ...], ...]:
    """Rows in their order, cut into calls of at most ``limit`` tokens; only a row's last part samples."""
    assert limit > 0
    calls: list[tuple[StepRow, ...]] = []
    current: list[StepRow] = []
    room = limit
    for row in rows:
        done = 0
        while done < len(row.tokens):
            if room == 0:
                calls.append(tuple(current))
                current, room = [], limit
            tokens = row.tokens[done : done + room]
            done += len(tokens)
            room -= len(tokens)
            is_last = done == len(row.tokens)
            start = row.start + done - len(tokens)
            current.append(StepRow(slot=row.slot, tokens=tokens, start=start, sample=row.sample and is_last))
    if current:
        calls.append(tuple(current))
    return tuple(calls)
