"""Stop strings, wherever the tokens cut them.

A stop string ends the text before its first character. The match that is complete first counts, of those the longest;
so the result doesn't depend on how tokens cut the text. What may still become a match is held back.
"""

from __future__ import annotations

from typing import NamedTuple


class StopScan(NamedTuple):
    """``text``: may go out; ``held``: may become a stop string; ``is_stopped``: one was found, ``held`` is empty."""

    text: str
    held: str
    is_stopped: bool


def scan(stops: tuple[str, ...], held: str, new: str) -> StopScan:
    """Looks for ``stops`` in ``held + new``, where ``held`` comes from the scan before.

    O(length of both x number of stops); ``held`` is shorter than the longest stop.
    """
    data = held + new
    if not stops or not new:
        return StopScan("" if stops else data, held if stops else "", False)
    first = min(
        ((at + len(stop), at) for stop in stops if (at := data.find(stop)) >= 0),
        default=None,
    )
    if first is not None:
        return StopScan(data[: first[1]], "", True)
    keep = max(_open_prefix(stop, data) for stop in stops)
    return StopScan(data[: len(data) - keep], data[len(data) - keep :], False)


def _open_prefix(stop: str, data: str) -> int:
    """Length of the longest end of ``data`` that is a true beginning of ``stop``."""
    for length in range(min(len(stop) - 1, len(data)), 0, -1):
        if data.endswith(stop[:length]):
            return length
    return 0
