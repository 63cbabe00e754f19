"""How much memory an instance takes, and the largest context that fits a room. Bytes and tokens throughout.

    estimate = weights + KV + recurrent state + compute buffer + output buffer + process
    need     = max(256 MiB, factor x weights, weights + process) + all the others + parked states
               factor 1.10 for GGUF, 1.30 for MLX; what the maximum adds to weights and process is the headroom

    KV              kv_cells x KV bytes of a token, by the node's cache type, a stream's cells in multiples of 256;
                    layers with a sliding window keep (window + rows) cells a stream, or (n_parallel x window + rows)
                    of a unified cache, where that is less
    compute buffer  rows x (4 x the card's activations + masks of 2 a cell of one stream); rows: the node's n_ubatch
    output buffer   n_parallel rows of logits, 4 bytes each
    process         what a runner takes without a model, as the node measured it once for its build, 256 a token of
                    the vocabulary and 48 a cell of the cache (llama.cpp's tables)
    parked states   a quarter of the KV, 1 GiB at most, and no more than all the rest leaves: host memory for sequences
                    that yield and for prefixes that come back

The estimate is what a runner should be seen to take right after its load; its status carries both figures. Compute
and output buffers hold for flash attention and ``n_outputs_max = n_parallel``. A card without activations (of an older
peer) counts 16 times the embedding's length.

Cells. ``context_length`` is the window of one request; ``kv_cells`` lies between it and ``n_parallel`` times it. Full
streams (``n_parallel x context_length`` cells, one stream a sequence) decode fastest, but most of their cells stay
empty; so they are taken only while all KV stays within a quarter of the room; otherwise one unified cache takes that
quarter, or one context if that is more.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from skulk.units import GIB, MIB
from skulk.wire.beats import EngineFacts
from skulk.wire.model import ModelCard
from skulk.wire.placement import MemoryEstimate

CELL_STEP: Final = 256
"""llama.cpp pads each stream's cells to multiples of this (``GGML_PAD(n_ctx, 256)``)."""
MIN_CONTEXT: Final = 2048
"""The smallest context admitted when none was asked for; less is of little use to a chat."""
MIN_NEED: Final = 256 * MIB
ACTIVATIONS: Final = 16
"""Times the embedding's length: 32-bit values of one row where the card doesn't tell."""
TOKEN_BYTES: Final = 256
"""Of the runner's tables for each token of the vocabulary: 12 MiB were seen for 49,152."""
CELL_BYTES: Final = 48
"""Of llama.cpp's table of a cache, for each cell (``llama_kv_cells``: a position, a shift, 256 bits of sequences)."""
KV_BITS: Final = {
    "f32": 32.0,
    "f16": 16.0,
    "bf16": 16.0,
    "q8_0": 8.5,
    "q5_1": 6.0,
    "q5_0": 5.5,
    "q4_1": 5.0,
    "q4_0": 4.5,
    "iq4_nl": 4.5,
}
"""Bits of one value of the cache, scales included; cards count 16."""
UNMEASURED: Final = EngineFacts()
"""A node that hasn't measured its engine, or is older than these facts."""
KV_SHARE: Final = 4
"""KV beyond one context may take up to the room divided by this."""
PARK_SHARE: Final = 4
PARK_MAX: Final = GIB
"""The most host memory for parked states: the KV divided by `PARK_SHARE`, and this."""
_FACTOR_PERCENT: Final = {"gguf": 110, "mlx": 130}


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """What is admitted: the window of one request, how many run side by side, the cells they share, and the memory."""

    context_length: int
    n_parallel: int
    kv_cells: int
    memory: MemoryEstimate


def round_down(tokens: int) -> int:
    """To a multiple of 256 cells."""
    return tokens // CELL_STEP * CELL_STEP


def round_up(tokens: int) -> int:
    """To a multiple of 256 cells."""
    return -(-tokens // CELL_STEP) * CELL_STEP


def context_limit(card: ModelCard) -> int:
    """The largest context that a card allows: what the model was trained for, or less where the card says so."""
    if card.max_context_tokens is None:
        return card.context_length
    return min(card.context_length, card.max_context_tokens)


def smallest_context(card: ModelCard, asked: int | None) -> int:
    """The least that may be admitted: what was asked for; without a wish `MIN_CONTEXT`, or all of a shorter model."""
    limit = context_limit(card)
    return _admissible(min(asked, limit) if asked is not None else min(MIN_CONTEXT, limit))


def largest_context(card: ModelCard, asked: int | None) -> int:
    """The most that may be admitted: what was asked for, within the card's limit."""
    limit = context_limit(card)
    return _admissible(limit if asked is None else min(asked, limit))


def _admissible(tokens: int) -> int:
    """A window that fills its cells; one below 256 keeps its length and wastes the rest of its cells."""
    return round_down(tokens) or tokens


def is_streamed(context_length: int, n_parallel: int, kv_cells: int) -> bool:
    """Whether every sequence gets a stream of its own; else all share one unified cache."""
    return kv_cells >= n_parallel * round_up(context_length)


def estimate(
    card: ModelCard,
    context_length: int,
    n_parallel: int,
    kv_cells: int,
    backend: str,
    engine: EngineFacts = UNMEASURED,
) -> MemoryEstimate:
    """What an instance takes.

    Args:
        card: the model.
        context_length: window of one request, tokens.
        n_parallel: sequences served side by side.
        kv_cells: cells of all sequences together; rounded up to multiples of 256.
        backend: resolved tag; an MLX engine needs MLX's headroom whatever the card calls its format.
        engine: the node's, by its beat.
    """
    assert context_length > 0
    assert n_parallel > 0
    assert kv_cells >= context_length, f"{kv_cells} cells can't hold a context of {context_length}"
    is_mlx = backend.startswith("mlx")
    cells = round_up(kv_cells)
    spans = _spans(card, context_length, n_parallel, cells, engine.ubatch)
    process = engine.process_bytes + (0 if is_mlx else TOKEN_BYTES * card.vocabulary_size + CELL_BYTES * spans.cells)
    factor = _FACTOR_PERCENT["mlx" if is_mlx else card.format]
    headed = max(MIN_NEED, card.weights_bytes * factor // 100, card.weights_bytes + process)
    kv = _kv_bytes(card, spans, 16.0 if is_mlx else KV_BITS.get(engine.kv_type, 16.0))
    kv += n_parallel * card.recurrent_bytes
    row = 4 * (card.activations or ACTIVATIONS * card.embedding_length) + 2 * spans.masked
    buffers = min(engine.ubatch, cells) * row + n_parallel * card.vocabulary_size * 4
    return MemoryEstimate(
        weights_bytes=card.weights_bytes,
        kv_bytes=kv,
        compute_bytes=buffers,
        process_bytes=process,
        headroom_bytes=headed - card.weights_bytes - process,
        need_bytes=headed + kv + buffers,
    )


class _Spans(NamedTuple):
    """Cells of all streams: of the layers that see everything, and of those with a window.

    ``masked``: those of one stream that one row's masks span.
    """

    full: int
    narrow: int
    masked: int

    @property
    def cells(self) -> int:
        return self.full + self.narrow


def _spans(card: ModelCard, context_length: int, n_parallel: int, cells: int, rows: int) -> _Spans:
    streams = n_parallel if is_streamed(context_length, n_parallel, cells) else 1
    of_stream = cells // streams
    narrow = 0
    if card.window_kv_bytes_per_token:
        # llama_kv_cache_iswa: the window of each sequence that shares the cache, and one step's rows.
        narrow = min(of_stream, round_up(card.window * n_parallel // streams + rows))
    return _Spans(cells, narrow * streams, of_stream + narrow)


def _kv_bytes(card: ModelCard, spans: _Spans, bits: float) -> int:
    wide = card.kv_bytes_per_token - card.window_kv_bytes_per_token
    return int((spans.full * wide + spans.narrow * card.window_kv_bytes_per_token) * bits / 16.0)


def fit_context(
    card: ModelCard,
    *,
    room_bytes: int,
    asked: int | None,
    n_parallel: int,
    backend: str,
    engine: EngineFacts = UNMEASURED,
) -> Fit | None:
    """The largest context that fits a room, and the cells beside it. None: not even the smallest one fits.

    Args:
        card: the model.
        room_bytes: what the node has left.
        asked: the request's context; it is never exceeded, and a smaller one may come out (multiples of 256).
        n_parallel: sequences served side by side.
        backend: resolved tag.
        engine: the node's, by its beat.

    Cost: O(log context).
    """
    most = largest_context(card, asked)
    least = min(smallest_context(card, None), most)
    if _one_context(card, least, n_parallel, backend, engine).need_bytes > room_bytes:
        return None
    low, high = max(least // CELL_STEP, 1), max(most // CELL_STEP, 1)
    while low < high:
        middle = (low + high + 1) // 2
        if _one_context(card, middle * CELL_STEP, n_parallel, backend, engine).need_bytes <= room_bytes:
            low = middle
        else:
            high = middle - 1
    context = min(low * CELL_STEP, most)
    cells = _cells(card, context, n_parallel, backend, room_bytes, engine)
    memory = estimate(card, context, n_parallel, cells, backend, engine)
    assert memory.need_bytes <= room_bytes
    if not backend.startswith("mlx"):
        memory = _with_parked(memory, room_bytes)
    return Fit(context_length=context, n_parallel=n_parallel, kv_cells=cells, memory=memory)


def _with_parked(memory: MemoryEstimate, room_bytes: int) -> MemoryEstimate:
    """Room for parked states beside the rest: it takes no token of context from anyone."""
    park = min(memory.kv_bytes // PARK_SHARE, PARK_MAX, room_bytes - memory.need_bytes)
    return msgspec.structs.replace(memory, park_bytes=park, need_bytes=memory.need_bytes + park)


def least_need(
    card: ModelCard, asked: int | None, n_parallel: int, backend: str, engine: EngineFacts = UNMEASURED
) -> MemoryEstimate:
    """What the smallest admissible context takes: the figure that a refusal names."""
    return _one_context(card, smallest_context(card, asked), n_parallel, backend, engine)


def _one_context(card: ModelCard, context: int, n_parallel: int, backend: str, engine: EngineFacts) -> MemoryEstimate:
    return estimate(card, context, n_parallel, round_up(context), backend, engine)


def _cells(card: ModelCard, context: int, n_parallel: int, backend: str, room_bytes: int, engine: EngineFacts) -> int:
    """The module's rule for cells, within the room."""
    single, full = round_up(context), n_parallel * round_up(context)

    def fits(cells: int) -> bool:
        memory = estimate(card, context, n_parallel, cells, backend, engine)
        return memory.need_bytes <= room_bytes and memory.kv_bytes <= room_bytes // KV_SHARE

    if fits(full):
        return full
    low, high = single // CELL_STEP, full // CELL_STEP - 1
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * CELL_STEP):
            low = middle
        else:
            high = middle - 1
    return max(low * CELL_STEP, single)
