"""Bytes from a pipe into lines, however long or unfinished they are."""

from __future__ import annotations

from typing import Final

LINE_LIMIT: Final = 8192
CUT_MARK: Final = b" [cut]"


class LineSplitter:
    """Cut a byte stream at its ends of line; holds at most ``limit`` bytes whatever comes.

    Args:
        limit: longer lines lose what exceeds it and end in `CUT_MARK`.
    """

    def __init__(self, limit: int = LINE_LIMIT) -> None:
        assert limit > 0
        self._limit = limit
        self._open = bytearray()
        self._is_cut = False

    def feed(self, part: bytes) -> list[bytes]:
        """The lines that ``part`` finishes, without their ends (LF or CR LF)."""
        *finished, rest = part.split(b"\n")
        lines: list[bytes] = []
        for piece in finished:
            self._append(piece)
            lines.append(self._take())
        self._append(rest)
        return lines

    def flush(self) -> list[bytes]:
        """The last line, if the stream ended in the midst of one."""
        return [self._take()] if self._open else []

    def _append(self, piece: bytes) -> None:
        room = self._limit - len(self._open)
        self._open += piece[:room]
        self._is_cut = self._is_cut or len(piece) > room

    def _take(self) -> bytes:
        line = bytes(self._open) + CUT_MARK if self._is_cut else bytes(self._open).removesuffix(b"\r")
        self._open.clear()
        self._is_cut = False
        return line
