"""How much memory an instance takes. Bytes and tokens throughout.

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
    parked states   a quarter of the KV, 1 GiB at most, and no more than all the rest leaves of a room: host memory for
                    sequences that yield and for prefixes that come back

The estimate is what a runner should be seen to take right after its load; its status carries both figures. Compute
and output buffers hold for flash attention and ``n_outputs_max = n_parallel``. A card without activations (of an older
peer) counts 16 times the embedding's length.
"""

from __future__ import annotations

from typing import Final

from skulk.units import GIB, MIB
from skulk.wire.beats import EngineFacts
from skulk.wire.model import ModelCard
from skulk.wire.placement import MemoryEstimate

CELL_STEP: Final = 256
"""llama.cpp pads each stream's cells to multiples of this (``GGML_PAD(n_ctx, 256)``)."""
PARK_SHARE: Final = 4
PARK_MAX: Final = GIB
"""The most host memory for parked states: the KV divided by `PARK_SHARE`, and this."""
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
_HALF_BITS: Final = {kind: int(2 * bits) for kind, bits in KV_BITS.items()}
UNMEASURED: Final = EngineFacts()
"""A node that hasn't measured its engine, or is older than these facts."""
_FACTOR_PERCENT: Final = {"gguf": 110, "mlx": 130}


def round_down(tokens: int) -> int:
    """To a multiple of 256 cells."""
    return tokens // CELL_STEP * CELL_STEP


def round_up(tokens: int) -> int:
    """To a multiple of 256 cells."""
    return -(-tokens // CELL_STEP) * CELL_STEP


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
    *,
    parks_in: int | None = None,
) -> MemoryEstimate:
    """What an instance takes.

    Args:
        card: the model.
        context_length: window of one request, tokens.
        n_parallel: sequences served side by side.
        kv_cells: cells of all sequences together; rounded up to multiples of 256.
        backend: resolved tag; an MLX engine needs MLX's headroom whatever the card calls its format.
        engine: the node's, by its beat.
        parks_in: the room in bytes, of which parked states may take what is left; None: nothing is parked.
    """
    assert context_length > 0
    assert n_parallel > 0
    assert kv_cells >= context_length, f"{kv_cells} cells can't hold a context of {context_length}"
    is_mlx = backend.startswith("mlx")
    cells = round_up(kv_cells)
    streams = n_parallel if is_streamed(context_length, n_parallel, cells) else 1
    of_stream = cells // streams
    windowed = card.window_kv_bytes_per_token
    narrow = min(of_stream, window_cells(card, n_parallel, streams, engine.ubatch)) if windowed else 0
    tables = 0 if is_mlx else TOKEN_BYTES * card.vocabulary_size + CELL_BYTES * (cells + narrow * streams)
    process = engine.process_bytes + tables
    weights = card.weights_bytes
    headed = max(weights_with_headroom(card, is_mlx=is_mlx), weights + process)
    values = cells * card.kv_bytes_per_token - (cells - narrow * streams) * windowed
    kv = values * half_bits(engine, is_mlx=is_mlx) // 32 + n_parallel * card.recurrent_bytes
    row = row_bytes(card) + 2 * (of_stream + narrow)
    buffers = min(engine.ubatch, cells) * row + n_parallel * card.vocabulary_size * 4
    need = headed + kv + buffers
    park = 0 if parks_in is None or is_mlx else max(0, min(kv // PARK_SHARE, PARK_MAX, parks_in - need))
    return MemoryEstimate(
        weights_bytes=weights,
        kv_bytes=kv,
        compute_bytes=buffers,
        process_bytes=process,
        headroom_bytes=headed - weights - process,
        need_bytes=need + park,
        park_bytes=park,
    )


def window_cells(card: ModelCard, n_parallel: int, streams: int, rows: int) -> int:
    """The most cells of one stream that layers with a sliding window keep.

    Of ``llama_kv_cache_iswa``: the window of each sequence that shares the cache, and one step's rows.
    """
    return round_up(card.window * n_parallel // streams + rows)


def row_bytes(card: ModelCard) -> int:
    """Bytes of the compute buffer for one row, masks left out."""
    return 4 * (card.activations or ACTIVATIONS * card.embedding_length)


def half_bits(engine: EngineFacts, *, is_mlx: bool) -> int:
    """Twice the bits of one value of the cache (they come in halves); an MLX cache is 16-bit."""
    return 32 if is_mlx else _HALF_BITS.get(engine.kv_type, 32)


def weights_with_headroom(card: ModelCard, *, is_mlx: bool) -> int:
    """What weights and process count at least, so that an estimate that is a little short does no harm."""
    return max(MIN_NEED, card.weights_bytes * _FACTOR_PERCENT["mlx" if is_mlx else card.format] // 100)
