"""How fast the engine is, as measured, and the prefill chunk that keeps a step within its time.

Attention costs more the deeper a prompt is, and a token costs less in a larger chunk (kernels work in tiles: with nine
heads on two threads a token of a chunk of 64 took 1.4 times as long as one of a chunk of 512). So the prefill rate is
kept by depth, in bands of `DEPTH_BAND` tokens, and by size, doubling from `CHUNK_UNIT`. A size that was never run is
guessed to be somewhat cheaper a token than the next smaller one, so that it is tried when that would do: a slow spell
must not leave small chunks for ever.
"""

from __future__ import annotations

from typing import Final

import msgspec

from skulk.batching.step import StepPlan

CHUNK_UNIT: Final = 64
"""Prefill chunks are multiples of this, or a prompt's whole rest; below it llama.cpp is less than half as fast."""
STEP_SHARED_S: Final = 0.25
"""Longest step while others decode and little is to be prefilled: the gap that a prompt puts between their tokens."""
STEP_CROWDED_S: Final = 0.7
"""The same, however much is to be prefilled; with what a guess may be off it stays within a second."""
STEPS_OF_BACKLOG: Final = 3
"""Between the two a step may take this part of what is to be prefilled; see ADR 18."""
STEP_ALONE_S: Final = 1.0
"""Longest step while none decodes: how long a cancel may wait."""
RUN_S: Final = 0.05
"""Longest run of decode steps: for how long a drawn token may wait for the others of its run; see ADR 19."""
MAX_RUN: Final = 16
"""The most steps of a run: what comes between two runs is then a small part of what it was."""
IDLE_SHARE: Final = 0.03
"""How much of a decode step idle cells may cost the running sequences."""
DEPTH_BAND: Final = 512
_SIZES: Final = 4
_LARGER_IS_CHEAPER: Final = 0.85
_NEW_SHARE: Final = 0.3
"""Share of a new measurement in the running mean: five steps forget a disturbance."""


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """Measured seconds; 0: unknown. ``decode_s``: a step that only decodes; ``prefill_s``: a token, by band, size."""

    decode_s: float = 0.0
    prefill_s: tuple[tuple[float, ...], ...] = ()


def measured(rate: Rate, plan: StepPlan, elapsed_s: float) -> Rate:
    """The rate after a step of ``plan`` that took ``elapsed_s``.

    Chunks below `CHUNK_UNIT` teach nothing about larger ones and are left out.
    """
    prefill = [row for row in plan.rows if len(row.tokens) > 1]
    if not prefill:
        return Rate(decode_s=_mean(rate.decode_s, elapsed_s), prefill_s=rate.prefill_s)
    count = sum(len(row.tokens) for row in prefill)
    if count < CHUNK_UNIT:
        return rate
    decoding_s = rate.decode_s if len(prefill) < len(plan.rows) else 0.0
    per_token = max(elapsed_s - decoding_s, elapsed_s / 2) / count
    band = max(row.start for row in prefill) // DEPTH_BAND
    bands = rate.prefill_s + ((),) * (band + 1 - len(rate.prefill_s))
    sizes = bands[band] + (0.0,) * (_SIZES - len(bands[band]))
    size = _size_of(count)
    sizes = (*sizes[:size], _mean(sizes[size], per_token), *sizes[size + 1 :])
    return Rate(decode_s=rate.decode_s, prefill_s=(*bands[:band], sizes, *bands[band + 1 :]))


def prefill_token_s(rate: Rate, depth: int, count: int = CHUNK_UNIT) -> float:
    """Seconds of one prompt token at ``depth`` in a chunk of ``count``; 0: nothing is known.

    From the nearest measured band, shallower ones first; in it the size itself, else the next smaller one, which is
    taken to be somewhat dearer however much smaller it is, else the next larger one.
    """
    band = depth // DEPTH_BAND
    shallower = rate.prefill_s[: band + 1]
    deeper = rate.prefill_s[band + 1 :]
    sizes = next((sizes for sizes in (*reversed(shallower), *deeper) if any(sizes)), ())
    size = _size_of(count)
    for smaller in range(min(size, len(sizes) - 1), -1, -1):
        if sizes[smaller] > 0.0:
            return sizes[smaller] * (_LARGER_IS_CHEAPER if smaller < size else 1.0)
    return next((s for s in sizes[size + 1 :] if s > 0.0), 0.0)


def shared_step_s(backlog_s: float) -> float:
    """Longest step while others decode, when prompts of ``backlog_s`` seconds are to be computed.

    Every step computes the running sequences beside a chunk, and few of them cost as much time as many: where a crowd
    of prompts is to be computed in small chunks, answers are drawn at a time when that is dear.
    """
    return min(max(STEP_SHARED_S, backlog_s / STEPS_OF_BACKLOG), STEP_CROWDED_S)


def chunk_tokens(rate: Rate, *, depth: int, others_decode: bool, n_ubatch: int, gap: int = 0, backlog: int = 0) -> int:
    """Prefill tokens of the next step: the most that end in time, in units of 64; or ``gap``, if so many do.

    ``gap`` too, if no more than half a unit of it would be left. One unit at least and while nothing is measured,
    ``n_ubatch`` at most.

    Args:
        rate: what was measured.
        depth: of the prompt whose turn it is.
        others_decode: whether sequences draw tokens beside it.
        n_ubatch: the most that one pass of the engine takes.
        gap: what that prompt still needs.
        backlog: what all prompts that have a slot still need, that one among them.
    """
    unit = min(CHUNK_UNIT, n_ubatch)
    room_s = STEP_ALONE_S
    if others_decode:
        room_s = shared_step_s(backlog * prefill_token_s(rate, depth)) - rate.decode_s
    chunk = _most_units(rate, depth, room_s, unit, n_ubatch)
    if chunk < gap <= n_ubatch:
        # Its last few tokens in a step of their own would cost the others one more gap, and twice as much a token.
        is_rest = gap - chunk <= unit // 2
        if is_rest or 0.0 < gap * prefill_token_s(rate, depth, gap) <= room_s:
            return gap
    return chunk


def run_steps(rate: Rate) -> int:
    """How many decode steps may follow one another before their tokens are told; 1 while nothing is measured."""
    return max(1, min(int(RUN_S / rate.decode_s), MAX_RUN)) if rate.decode_s > 0.0 else 1


def _most_units(rate: Rate, depth: int, room_s: float, unit: int, n_ubatch: int) -> int:
    chunk = n_ubatch // unit * unit
    while chunk > unit:
        per_token = prefill_token_s(rate, depth, chunk)
        if per_token <= 0.0:
            return unit
        if chunk * per_token <= room_s:
            return chunk
        # No smaller chunk of this size can take more tokens than fit at its rate.
        fits = int(room_s / per_token) // unit * unit
        chunk = max(unit, min(chunk - unit, max(fits, _smallest_of(chunk) - unit)))
    return chunk


def _size_of(count: int) -> int:
    """0 for less than two units, 1 for less than four, …"""
    return min(max(count // CHUNK_UNIT, 1).bit_length() - 1, _SIZES - 1)


def _smallest_of(count: int) -> int:
    """The least count that is of the same size."""
    return CHUNK_UNIT << _size_of(count)


def idle_limit(rate: Rate, *, cell_s: float, rows: int) -> int | None:
    """Cells that may lie idle in a unified cache beside ``rows`` decoding sequences.

    ``cell_s``: seconds that each of them adds to each row of a step. None: nothing is known, or nobody runs.
    """
    if cell_s <= 0.0 or rows == 0 or rate.decode_s <= 0.0:
        return None
    return int(IDLE_SHARE * rate.decode_s / (cell_s * rows))


def _mean(old: float, new: float) -> float:
    return new if old <= 0.0 else old + _NEW_SHARE * (new - old)
