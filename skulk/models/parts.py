"""A file on its way: its bytes beside a list of the chunks that are whole, so that nothing whole is fetched twice.

    <folder>/<key>.part     the bytes, each chunk at its place
    <folder>/<key>.done     one byte for each chunk: 1 when it is whole

A chunk is marked after its bytes were written, so a process killed at any moment leaves nothing marked that isn't
there. After a loss of power that order may be broken: the hash of the whole, taken before the file gets its name,
notices.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

from skulk.errors import RequestError
from skulk.files import disk_full_error, is_disk_full
from skulk.wire.model import ModelFile

CHUNK_BYTES: Final = 16 * 1024 * 1024
_HASH_BYTES: Final = 4 * 1024 * 1024
_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC

Digest: TypeAlias = Literal["sha256", "git"]


class Run(NamedTuple):
    """Chunks ``first`` to before ``last``, which belong to whoever claimed them."""

    first: int
    last: int


def part_key(model_id: str, file: ModelFile) -> str:
    """The name of a file's parts: of the content where it is pinned, so that two models share what is the same."""
    identity = file.sha256 or file.git_oid or f"{model_id}\0{file.name}\0{file.size_bytes}"
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


class PartFile:
    """One file of a known size. One process at a time, any thread of it; close it.

    Args:
        folder: where parts lie; on the file system of the final place.
        key: what the bytes will be, see `part_key`.
        size_bytes: of the whole file.
        chunk_bytes: what is whole or not; parts of another chunk size are begun anew.

    Raises:
        ServiceError: ``disk_full``.
        OSError: the folder can't be used.
    """

    def __init__(self, folder: Path, key: str, size_bytes: int, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path: Final = folder / f"{key}.part"
        self.size_bytes: Final = size_bytes
        self.chunk_bytes: Final = chunk_bytes
        self.count: Final = -(-size_bytes // chunk_bytes)
        self._marks_path = folder / f"{key}.done"
        self._lock = threading.Lock()
        self._claimed: set[int] = set()
        self._is_abandoned = False
        with _told(self.path):
            self._file = _open_locked(self.path)
            self._done = self._read_marks()
            self._marks = os.open(self._marks_path, _FLAGS, 0o644)
            os.ftruncate(self._file, size_bytes)
            os.ftruncate(self._marks, self.count + 8)
            os.pwrite(self._marks, chunk_bytes.to_bytes(8, "little"), self.count)

    def _read_marks(self) -> bytearray:
        try:
            marks = self._marks_path.read_bytes()
            is_same = self.path.stat().st_size == self.size_bytes
        except OSError:
            return bytearray(self.count)
        if not is_same or len(marks) != self.count + 8 or marks[-8:] != self.chunk_bytes.to_bytes(8, "little"):
            self._marks_path.unlink()
            return bytearray(self.count)
        return bytearray(marks[: self.count])

    @property
    def done_bytes(self) -> int:
        """Bytes of whole chunks."""
        with self._lock:
            done = self._done.count(1)
            last_is_done = bool(self._done) and self._done[-1] == 1
        short = self.count * self.chunk_bytes - self.size_bytes
        return done * self.chunk_bytes - (short if last_is_done else 0)

    @property
    def is_whole(self) -> bool:
        with self._lock:
            return 0 not in self._done

    def claim(self, most: int) -> Run | None:
        """The next missing chunks that nobody has, one after the other, at most so many; None: none is left."""
        with self._lock:
            first = next((n for n in range(self.count) if self._is_free(n)), None)
            if first is None:
                return None
            last = first + 1
            while last < self.count and last - first < most and self._is_free(last):
                last += 1
            self._claimed.update(range(first, last))
            return Run(first, last)

    def _is_free(self, index: int) -> bool:
        return not self._done[index] and index not in self._claimed

    def release(self, run: Run) -> None:
        """Gives back what was claimed; what is whole stays so."""
        with self._lock:
            self._claimed.difference_update(range(run.first, run.last))

    def span(self, run: Run) -> tuple[int, int]:
        """The bytes of a run: start, and the end that isn't part of it."""
        return run.first * self.chunk_bytes, min(run.last * self.chunk_bytes, self.size_bytes)

    def is_done(self, index: int) -> bool:
        with self._lock:
            return self._done[index] == 1

    def abandon(self) -> None:
        """Ends every writer at its next block: what they fetch isn't wanted any more."""
        self._is_abandoned = True

    def write(self, position: int, block: bytes | bytearray | memoryview) -> None:
        """Writes bytes at their place; marks nothing.

        Raises:
            ServiceError: ``disk_full``.
            RequestError: ``download_cancelled``: `abandon` was called.
        """
        if self._is_abandoned:
            raise RequestError("download_cancelled", "the download was ended.")
        view = memoryview(block)
        assert position + len(view) <= self.size_bytes
        with _told(self.path):
            while view:
                written = os.pwrite(self._file, view, position)
                position += written
                view = view[written:]

    def mark(self, index: int) -> None:
        """Says that all bytes of a chunk are written."""
        with _told(self.path):
            os.pwrite(self._marks, b"\1", index)
        with self._lock:
            self._done[index] = 1

    def clear(self) -> None:
        """Begins anew: what was written is of no use."""
        with self._lock:
            self._done = bytearray(self.count)
            self._claimed.clear()
        with _told(self.path):
            os.pwrite(self._marks, bytes(self.count), 0)

    def digest(self, kind: Digest) -> str:
        """The hash of the whole, see `file_digest`."""
        return file_digest(self.path, kind)

    def discard(self) -> None:
        """Removes the parts: they aren't needed."""
        for path in (self.path, self._marks_path):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def finish(self, target: Path) -> None:
        """Gives the file its name, whole and on disk; the parts are gone.

        Raises:
            ServiceError: ``disk_full``.
        """
        with _told(self.path):
            os.fsync(self._file)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.path, target)
        with contextlib.suppress(FileNotFoundError):
            self._marks_path.unlink()

    def close(self) -> None:
        os.close(self._file)
        os.close(self._marks)

    def __enter__(self) -> PartFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def file_digest(path: Path, kind: Digest) -> str:
    """The hash of a file, hexadecimal: its ``sha256``, or the name that ``git`` gives it as a blob."""
    digest = hashlib.sha256()
    if kind == "git":
        digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    buffer = memoryview(bytearray(_HASH_BYTES))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            digest.update(buffer[:length])
    return digest.hexdigest()


def _open_locked(path: Path) -> int:
    """The file, locked against other processes. Whoever had it may have given it its final name meanwhile: then a new
    one is made, for nothing may be written into a finished file.
    """
    while True:
        file = os.open(path, _FLAGS, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), path.stat()):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


@contextlib.contextmanager
def _told(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(path, error) from error
        raise
