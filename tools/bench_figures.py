"""Figures of the benchmarks: percentiles, medians of pairs, tables. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Spread(NamedTuple):
    """What repeated measurements gave: the median and both ends."""

    median: float
    low: float
    high: float


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of the values lie, interpolated between neighbours; NaN of none."""
    assert 0.0 <= share <= 1.0, share
    if not values:
        return math.nan
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def spread(values: Sequence[float]) -> Spread:
    """Median and ends of the values that are numbers; NaN of none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Spread(math.nan, math.nan, math.nan)
    return Spread(statistics.median(known), min(known), max(known))


def pair_ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Each of ours divided by its partner of the same round, so that a slow spell of the machine hits both."""
    return [one / other if other > 0 else math.nan for one, other in zip(ours, theirs, strict=True)]


def number(value: float, digits: int = 2) -> str:
    """A figure for a table; a dash where there is none."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal; the first column is left-aligned."""
    assert all(len(row) == len(header) for row in rows), "a row of another width"
    widths = [max(3, *(len(line[at]) for line in (header, *rows))) for at in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *padded[1:]])} |"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(header), f"|{rule}|", *(line(row) for row in rows)])
