"""A log file that can't fill the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from skulk.units import MIB

DEFAULT_BYTES: Final = 8 * MIB


class RotatedLog:
    """Append lines to ``path``; when it is full it becomes ``path.1``, and the older ``path.1`` goes.

    Both together never exceed ``limit_bytes`` (but for one longer line). A write that fails (a full disk, a folder
    that went away) loses lines and counts them; it never disturbs the child whose output this is.

    Args:
        path: the file; its folder is made where it is missing.
        limit_bytes: room for the two files together.

    Attributes:
        dropped: lines that could not be written.
    """

    def __init__(self, path: Path, limit_bytes: int = DEFAULT_BYTES) -> None:
        assert limit_bytes > 0
        self._path = path
        self._half = max(1, limit_bytes // 2)
        self._file: int | None = None
        self._size = 0
        self.dropped = 0

    def write(self, line: bytes) -> None:
        """Append one line; the end of line is added here."""
        body = line + b"\n"
        try:
            if self._file is not None and self._size and self._size + len(body) > self._half:
                self._rotate()
            if self._file is None:
                self._open(len(body))
            assert self._file is not None
            self._size += os.write(self._file, body)
        except OSError:
            self.dropped += 1

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _open(self, needed: int) -> None:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # 0600: a child's words may hold what people asked the model.
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size
        if self._size and self._size + needed > self._half:
            self._rotate()
            self._open(needed)

    def _rotate(self) -> None:
        self.close()
        os.replace(self._path, self._path.with_name(self._path.name + ".1"))
