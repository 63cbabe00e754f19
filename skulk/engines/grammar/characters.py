"""Sets of characters as sequences of bytes: what their UTF-8 looks like.

    [a-z]    (a-z)
    [^"]     (00-7F without the quotation mark) | (C2-DF)(80-BF) | (E0)(A0-BF)(80-BF) | ...

A range is parted where the length of its encoding changes and where a byte runs from its least to its greatest value;
what is left are sequences whose bytes don't hang on each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

MAX_CHARACTER: Final = 0x10FFFF
_SURROGATES: Final = (0xD800, 0xDFFF)
# The last character of each length in bytes.
_LAST_OF_LENGTH: Final = (0x7F, 0x7FF, 0xFFFF, MAX_CHARACTER)

Range = tuple[int, int]
"""First and last, both in it."""


def complement(ranges: Iterable[Range]) -> list[Range]:
    """All other characters but U+0000, which no text of a token holds."""
    others: list[Range] = []
    start = 1
    for low, high in sorted(ranges):
        if low > start:
            others.append((start, low - 1))
        start = max(start, high + 1)
    if start <= MAX_CHARACTER:
        others.append((start, MAX_CHARACTER))
    return others


def merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same characters in ascending ranges that don't touch, without surrogates, which aren't characters."""
    parts: list[Range] = []
    for low, high in sorted(_without_surrogates(ranges)):
        if parts and low <= parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], max(parts[-1][1], high))
        else:
            parts.append((low, high))
    return tuple(parts)


def _without_surrogates(ranges: Iterable[Range]) -> Iterator[Range]:
    first, last = _SURROGATES
    for low, high in ranges:
        if low < first:
            yield low, min(high, first - 1)
        if high > last:
            yield max(low, last + 1), high


def byte_sequences(ranges: Iterable[Range]) -> list[tuple[Range, ...]]:
    """One range of bytes for each byte of a character; at most some ten sequences a range. Of `merged` ranges."""
    found: list[tuple[Range, ...]] = []
    for low, high in ranges:
        start = low
        for length, last in enumerate(_LAST_OF_LENGTH, start=1):
            if start <= min(high, last):
                found.extend(_of_length(start, min(high, last), length))
                start = last + 1
    return found


def _of_length(low: int, high: int, length: int) -> Iterator[tuple[Range, ...]]:
    """Of characters that all have so many bytes."""
    todo = [(low, high)]
    while todo:
        start, end = todo.pop()
        for followers in range(length - 1, 0, -1):
            # Bytes after the one that differs must run through all their values, or the range is parted.
            span = 1 << (6 * followers)
            if start // span == end // span:
                continue
            if start % span:
                border = start // span * span + span
                todo += [(border, end), (start, border - 1)]
                break
            if end % span != span - 1:
                border = end // span * span
                todo += [(border, end), (start, border - 1)]
                break
        else:
            yield tuple(zip(chr(start).encode(), chr(end).encode(), strict=True))
