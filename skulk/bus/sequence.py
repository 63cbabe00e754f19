"""The order of one stream's chunks, whatever the bus did to them. Pure.

what comes                       what it does
the next number                  is ready, and so are those held behind it
a later number                   is held; the numbers between are missing: ask from `missing_from`
an earlier number, or one held   a duplicate: ignored
"the last number is n" (alive)   numbers up to n that are not here are missing too: a lost tail shows
the terminal chunk, in order     ends it; nothing comes after
"""

from __future__ import annotations

from typing import Final

from skulk.wire.generation import Chunk

HELD_LIMIT: Final = 4_096


class StreamSequence:
    """Chunks of one attempt go in as they come and come out in order, each once."""

    def __init__(self) -> None:
        self._next = 0
        self._last_known = -1
        self._held: dict[int, Chunk] = {}
        self._has_ended = False

    @property
    def next_seq(self) -> int:
        """The number that comes out next."""
        return self._next

    @property
    def has_ended(self) -> bool:
        """The terminal chunk came out."""
        return self._has_ended

    @property
    def missing_from(self) -> int | None:
        """The first number known to exist that isn't here; None where nothing is missing."""
        return self._next if self._next <= self._last_known else None

    def feed(self, chunk: Chunk) -> list[Chunk]:
        """Takes one chunk and returns those that are ready now, in order.

        Beyond 4,096 held ones it is not kept, only its number: a resend brings it again.
        """
        if self._has_ended or chunk.seq < self._next or chunk.seq in self._held:
            return []
        self._last_known = max(self._last_known, chunk.seq)
        if chunk.seq != self._next:
            if len(self._held) < HELD_LIMIT:
                self._held[chunk.seq] = chunk
            return []
        ready = [chunk]
        while not ready[-1].end and (behind := self._held.pop(chunk.seq + len(ready), None)) is not None:
            ready.append(behind)
        self._next += len(ready)
        if ready[-1].end is not None:
            self._has_ended = True
            self._last_known = self._next - 1
            self._held.clear()
        return ready

    def note_last(self, last_seq: int) -> None:
        """The sender says that it has sent everything up to ``last_seq``."""
        if not self._has_ended:
            self._last_known = max(self._last_known, last_seq)
