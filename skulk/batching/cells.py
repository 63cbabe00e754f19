"""Cells of a unified cache, counted without asking the engine: which sequences share which of them.

A cell belongs to every sequence whose id it carries, and is free when it carries none. Sequences share cells only where
one took another's beginning (``llama_memory_seq_cp``), so what a sequence holds is a row of segments:

    a computes 100        a: A100
    b takes 60 of a       a: A100        b: A60
    both go on            a: A130        b: A60 B30       160 cells, for A's first 60 are the same ones
    a keeps 40, goes on   a: A40 C10     b: A60 B30       100: what a cut off and nobody holds is free

A segment grows only at the end that its first holder has; whoever cut or took starts a new one, so that a place in a
segment always means one cell.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple


class Segment(NamedTuple):
    """``length`` cells from the beginning of the segment ``id``."""

    id: int
    length: int


class Cells(NamedTuple):
    """The cells of one sequence in the order of its positions; ``may_grow``: its last segment is its own."""

    segments: tuple[Segment, ...] = ()
    may_grow: bool = False


NO_CELLS: Final = Cells()


def grown(cells: Cells, count: int, fresh_id: int) -> Cells:
    """With ``count`` cells more; ``fresh_id`` names a new segment, where one is needed."""
    if count == 0:
        return cells
    if cells.may_grow:
        *before, last = cells.segments
        return Cells((*before, Segment(last.id, last.length + count)), may_grow=True)
    return Cells((*cells.segments, Segment(fresh_id, count)), may_grow=True)


def beginning(cells: Cells, count: int) -> Cells:
    """The first ``count`` cells, for whoever takes them or keeps only them; all of them stay what they were."""
    held: list[Segment] = []
    for segment in cells.segments:
        if count <= 0:
            break
        held.append(Segment(segment.id, min(segment.length, count)))
        count -= segment.length
    return Cells(tuple(held))


def count_used(holders: Iterable[Cells]) -> int:
    """How many cells these hold together, shared ones once; O(segments)."""
    lengths: dict[int, int] = {}
    for cells in holders:
        for segment in cells.segments:
            if segment.length > lengths.get(segment.id, 0):
                lengths[segment.id] = segment.length
    return sum(lengths.values())
