"""What a reader is behind with: its first chunks as they came, the later ones joined into what they say.

up to `KEPT` chunks, or    each stays itself: who reads in time sees every token, a burst too
`KEPT_BEHIND` where the
reader can't go on
beyond                     one delta a choice, which grows
the last chunk             stays itself
"""

from __future__ import annotations

from typing import Final

import msgspec

from skulk.wire.generation import Chunk, FinishReason

KEPT: Final = 1024
KEPT_BEHIND: Final = 64
_CHUNK_BYTES: Final = 64
_TOKEN_BYTES: Final = 4


class _Delta:
    """What came of one choice since the reader fell behind."""

    def __init__(self, first: Chunk) -> None:
        self._first = first
        self._texts: list[str] = []
        self._tokens: list[int] = []
        self._finish_reason: FinishReason | None = None

    def add(self, chunk: Chunk) -> None:
        if chunk.text:
            self._texts.append(chunk.text)
        self._tokens.extend(chunk.tokens)
        self._finish_reason = chunk.finish_reason or self._finish_reason

    def chunk(self) -> Chunk:
        return msgspec.structs.replace(
            self._first, text="".join(self._texts), tokens=tuple(self._tokens), finish_reason=self._finish_reason
        )


class Pending:
    """Chunks that wait for their reader, in order within each choice.

    Attributes:
        size_bytes: about what they take.
        is_behind: the reader can't go on: its client takes nothing.
    """

    def __init__(self) -> None:
        self.size_bytes = 0
        self.is_behind = False
        self._chunks: list[Chunk] = []
        self._deltas: dict[int, _Delta] = {}
        self._end: Chunk | None = None

    def __bool__(self) -> bool:
        return bool(self._chunks) or self._end is not None

    def add(self, chunk: Chunk) -> None:
        """Takes the next chunk of the stream."""
        if not self._deltas and len(self._chunks) < (KEPT_BEHIND if self.is_behind else KEPT):
            self._chunks.append(chunk)
            self.size_bytes += _CHUNK_BYTES + _text_bytes(chunk.text)
            return
        if chunk.end is not None:
            self._end = chunk
            return
        self.size_bytes += _text_bytes(chunk.text) + _TOKEN_BYTES * len(chunk.tokens)
        delta = self._deltas.get(chunk.choice)
        if delta is None:
            delta = self._deltas[chunk.choice] = _Delta(chunk)
            self.size_bytes += _CHUNK_BYTES
        delta.add(chunk)

    def take(self) -> list[Chunk]:
        """Everything; the last chunk of a stream is the last of the list."""
        taken, self._chunks = self._chunks, []
        if self._deltas:
            taken += [delta.chunk() for delta in self._deltas.values()]
            self._deltas.clear()
        if self._end is not None:
            taken.append(self._end)
            self._end = None
        self.size_bytes = 0
        return taken


def _text_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
