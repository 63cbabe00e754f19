"""The largest context that fits a room, and how many cells beside it.

Cells. ``context_length`` is the window of one request; ``kv_cells`` lies between it and ``n_parallel`` times it. Full
streams (``n_parallel x context_length`` cells, one stream a sequence) decode fastest, but most of their cells stay
empty; so they are taken only while all KV stays within its share, a quarter of the room; otherwise one unified cache
takes that share, or one context if that is more. Where nobody asked for a number of sequences, the share is no more
than twice the weights (half a GiB at least): a small model on a large machine doesn't need gigabytes of cells.

How it is found. The need of a unified cache is, above the rows of one step, two straight lines in its cells on each
side of the sliding window's end: one where the headroom counts, one where weights and process outgrow it. So the most
cells that a room holds is a division, not a search; a master asks for it once a node at every placement.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from skulk.placement.memory import (
    CELL_BYTES,
    CELL_STEP,
    TOKEN_BYTES,
    UNMEASURED,
    estimate,
    half_bits,
    round_down,
    round_up,
    row_bytes,
    weights_with_headroom,
    window_cells,
)
from skulk.units import MIB
from skulk.wire.beats import EngineFacts
from skulk.wire.model import ModelCard
from skulk.wire.placement import MemoryEstimate

MIN_CONTEXT: Final = 2048
"""The smallest context admitted when none was asked for; less is of little use to a chat."""
KV_SHARE: Final = 4
"""KV beyond one context may take up to the room divided by this."""
KV_WEIGHTS: Final = 2
KV_FREE: Final = 512 * MIB
"""Where no number of sequences was asked for, KV beyond one context may take `KV_WEIGHTS` times the weights, and this
much at least."""
_NO_END: Final = 2**62


class Fit(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What is admitted: the window of one request, how many run side by side, the cells they share, and the memory."""

    context_length: int
    n_parallel: int
    kv_cells: int
    memory: MemoryEstimate


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


def least_need(
    card: ModelCard, asked: int | None, n_parallel: int, backend: str, engine: EngineFacts = UNMEASURED
) -> MemoryEstimate:
    """What the smallest admissible context takes: the figure that a refusal names."""
    context = smallest_context(card, asked)
    return estimate(card, context, n_parallel, round_up(context), backend, engine)


def least_fit(
    card: ModelCard, asked: int | None, n_parallel: int, backend: str, engine: EngineFacts = UNMEASURED
) -> Fit:
    """The smallest admissible context, whatever room there is: what a placement that is forced gets."""
    context = smallest_context(card, asked)
    cells = round_up(context)
    memory = estimate(card, context, n_parallel, cells, backend, engine)
    return Fit(context_length=context, n_parallel=n_parallel, kv_cells=cells, memory=memory)


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
    """
    return Fitter(card, asked).fit(room_bytes, n_parallel, backend, engine)


class _Line(NamedTuple):
    """Bytes by cells, from ``low`` to ``high`` of them: base + slope x cells + (kv_slope x cells + kv_base) // 32."""

    low: int
    high: int
    base: int
    slope: int
    kv_slope: int
    kv_base: int

    def inverse(self) -> _Inverse:
        """The same, asked the other way round."""
        return _Inverse(self.low, self.high, 32 * (self.base - 1) + 1 + self.kv_base, self.kv_slope + 32 * self.slope)


class _Inverse(NamedTuple):
    """Cells by bytes: (32 x room - offset) // divisor."""

    low: int
    high: int
    offset: int
    divisor: int

    def most(self, room_bytes: int) -> int:
        """The most cells, multiples of 256 or not, that stay within a room; negative where none do."""
        spare = 32 * room_bytes - self.offset
        if self.divisor == 0:
            return _NO_END if spare >= 0 else -1
        return spare // self.divisor


class _Need(NamedTuple):
    """What a unified cache needs, lowest piece first: by headroom, by process (without the node's part); its KV alone.

    Attributes:
        kv_slope: 32nds of a byte that each cell beyond any window adds to it.
        capped_cells: those of the most KV that a model of this size may have beyond one context.
        least_bytes: less than any context needs.
    """

    headed: tuple[_Inverse, ...]
    worked: tuple[_Inverse, ...]
    kv: tuple[_Inverse, ...]
    kv_slope: int
    capped_cells: int
    least_bytes: int


class Fitter:
    """`fit_context` for many nodes: what depends on card and engine build alone is computed once.

    Args:
        card: the model.
        asked: the request's context; None: as much as fits.
        is_capped: nobody asked for a number of sequences, so that their cells are bounded by the model's size.
    """

    def __init__(self, card: ModelCard, asked: int | None, *, is_capped: bool = False) -> None:
        self.card: Final = card
        self._most_kv: Final = max(KV_FREE, KV_WEIGHTS * card.weights_bytes) if is_capped else _NO_END
        self.most: Final = largest_context(card, asked)
        self._least: Final = min(smallest_context(card, None), self.most)
        self._least_cells: Final = round_up(self._least)
        self._needs: dict[tuple[int, str, bool, int], _Need] = {}
        wide = card.kv_bytes_per_token - card.window_kv_bytes_per_token
        # of the largest context, by the smallest type of cache there is
        self._full_kv: Final = round_up(self.most) * wide // 4
        self._least_bytes: dict[bool, int] = {}
        self._ample: dict[tuple[EngineFacts, str, int], Fit | None] = {}

    def least_bytes(self, backend: str) -> int:
        """Less than any context needs, however few sequences run."""
        is_mlx = backend.startswith("mlx")
        if is_mlx not in self._least_bytes:
            self._least_bytes[is_mlx] = weights_with_headroom(self.card, is_mlx=is_mlx)
        return self._least_bytes[is_mlx]

    def fit(self, room_bytes: int, n_parallel: int, backend: str, engine: EngineFacts = UNMEASURED) -> Fit | None:
        """The largest context that fits, as `fit_context`. Cost: O(1) from the second node of a build on.

        Where the number of sequences wasn't asked for, all nodes of a build with room enough get the same.
        """
        if room_bytes // KV_SHARE < self._most_kv or room_bytes < self._full_kv:
            return self._fitted(room_bytes, n_parallel, backend, engine)
        key = (engine, backend, n_parallel)
        if key not in self._ample:
            self._ample[key] = self._fitted(_NO_END, n_parallel, backend, engine)
        ample = self._ample[key]
        if ample is not None and ample.memory.need_bytes <= room_bytes:
            return ample
        return self._fitted(room_bytes, n_parallel, backend, engine)

    def _fitted(self, room_bytes: int, n_parallel: int, backend: str, engine: EngineFacts) -> Fit | None:
        is_mlx = backend.startswith("mlx")
        key = (engine.ubatch, engine.kv_type, is_mlx, n_parallel)
        need = self._needs.get(key)
        if need is None:
            need = self._needs[key] = _need_of(self.card, n_parallel, engine, self._most_kv, is_mlx=is_mlx)
        if room_bytes < need.least_bytes:
            return None
        most = self._most_unified(need, room_bytes, n_parallel, backend, engine)
        if most < self._least_cells:
            return None
        context = min(self.most, most)
        share = room_bytes // KV_SHARE
        if share >= self._most_kv:
            share, cells_of_share = self._most_kv, need.capped_cells
        else:
            cells_of_share = _most_cells(need.kv, share)
        single = round_up(context)
        found = None
        if n_parallel * single * need.kv_slope // 32 <= share:
            found = self._streams(context, n_parallel, backend, engine, room_bytes, share)
        if found is None:
            shared = round_down(min(most, n_parallel * single - CELL_STEP, cells_of_share))
            cells = max(single, shared)
            found = cells, estimate(self.card, context, n_parallel, cells, backend, engine, parks_in=room_bytes)
        kv_cells, memory = found
        assert memory.need_bytes <= room_bytes
        return Fit(
            context_length=context,
            n_parallel=n_parallel,
            kv_cells=kv_cells,
            memory=memory,
        )

    def _streams(
        self, context: int, n_parallel: int, backend: str, engine: EngineFacts, room_bytes: int, share: int
    ) -> tuple[int, MemoryEstimate] | None:
        """Cells and memory of one stream a sequence, where that stays within the room and its share."""
        cells = n_parallel * round_up(context)
        memory = estimate(self.card, context, n_parallel, cells, backend, engine, parks_in=room_bytes)
        return (cells, memory) if memory.need_bytes <= room_bytes and memory.kv_bytes <= share else None

    def _most_unified(self, need: _Need, room_bytes: int, n_parallel: int, backend: str, engine: EngineFacts) -> int:
        """The most cells of a unified cache that a room holds, a multiple of 256; 0 where not even 256 fit."""
        headed = _most_cells(need.headed, room_bytes)
        worked = _most_cells(need.worked, room_bytes - engine.process_bytes)
        most = round_down(min(headed, worked))
        if most:
            return most
        # fewer cells than one step has rows: a curve, with a handful of points
        for cells in range(round_down(engine.ubatch - 1), 0, -CELL_STEP):
            if estimate(self.card, cells, n_parallel, cells, backend, engine).need_bytes <= room_bytes:
                return cells
        return 0


def _most_cells(lines: Sequence[_Inverse], room_bytes: int) -> int:
    """The most cells on a chain of lines, lowest first, that grow without a gap; 0 where none are within the room."""
    if len(lines) == 1:  # as of most models
        most = lines[0].most(room_bytes)
        return min(most, lines[0].high) if most >= lines[0].low else 0
    for line in reversed(lines):
        most = line.most(room_bytes)
        if most >= line.low:
            return min(most, line.high)
    return 0


def _need_of(card: ModelCard, n_parallel: int, engine: EngineFacts, most_kv: int, *, is_mlx: bool) -> _Need:
    """The formulas of `memory.estimate` for a unified cache of at least one step's rows."""
    rows = round_up(engine.ubatch)
    lines = [_lines(card, n_parallel, engine, low=rows, high=_NO_END, narrow=(0, 0), is_mlx=is_mlx)]
    if card.window_kv_bytes_per_token:
        end = window_cells(card, n_parallel, 1, engine.ubatch)
        lines = [_lines(card, n_parallel, engine, low=max(rows, end), high=_NO_END, narrow=(0, end), is_mlx=is_mlx)]
        if end > rows:
            lines.insert(0, _lines(card, n_parallel, engine, low=rows, high=end, narrow=(1, 0), is_mlx=is_mlx))
    headed, worked, kv = (tuple(line.inverse() for line in kind) for kind in zip(*lines, strict=True))
    least = weights_with_headroom(card, is_mlx=is_mlx)
    return _Need(headed, worked, kv, lines[-1][2].kv_slope, _most_cells(kv, most_kv), least)


def _lines(
    card: ModelCard,
    n_parallel: int,
    engine: EngineFacts,
    *,
    low: int,
    high: int,
    narrow: tuple[int, int],
    is_mlx: bool,
) -> tuple[_Line, _Line, _Line]:
    """By headroom, by process, KV; ``narrow``: cells of layers with a window, so many times the others and so many."""
    times, more = narrow
    bits = half_bits(engine, is_mlx=is_mlx)
    wide = card.kv_bytes_per_token - card.window_kv_bytes_per_token
    kv = _Line(
        low=low,
        high=high,
        base=n_parallel * card.recurrent_bytes,
        slope=0,
        kv_slope=(wide + times * card.window_kv_bytes_per_token) * bits,
        kv_base=more * card.window_kv_bytes_per_token * bits,
    )
    buffers = engine.ubatch * (row_bytes(card) + 2 * more) + n_parallel * card.vocabulary_size * 4
    masks = 2 * engine.ubatch * (1 + times)
    tables = 0 if is_mlx else CELL_BYTES
    process = 0 if is_mlx else TOKEN_BYTES * card.vocabulary_size + tables * more
    headed = kv._replace(base=kv.base + weights_with_headroom(card, is_mlx=is_mlx) + buffers, slope=masks)
    worked = kv._replace(base=kv.base + card.weights_bytes + process + buffers, slope=masks + tables * (1 + times))
    return headed, worked, kv
