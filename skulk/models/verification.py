"""Remembers which files were hashed: a hash is taken once per content, not once per start.

A file is taken for unchanged while its path, size, modification time and inode are; that guards against damage and
mix-ups, not against somebody who sets times back on purpose.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from skulk.errors import RequestError

log = logging.getLogger(__name__)

MAX_ENTRIES: Final = 10_000
_BLOCK_BYTES: Final = 8 * 1024 * 1024


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    """What a file looked like when it was hashed."""

    size_bytes: int
    modified_ns: int
    inode: int
    sha256: str


class VerificationCache:
    """The hashes, in memory and in one JSON file that is replaced whole. Any thread.

    A cache that can't be read or written costs time, never correctness: both are logged and go on.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._entries = self._read()

    def known(self, path: Path) -> str | None:
        """The digest of a file as it is now, if it was taken before; else None."""
        entry = self._entries.get(str(path))
        if entry is None:
            return None
        try:
            now = _fingerprint(path, entry.sha256)
        except OSError:
            return None
        return entry.sha256 if now == entry else None

    def sha256(self, path: Path, on_block: Callable[[int], None] | None = None) -> str:
        """The digest of a file, hexadecimal; hashes it where it isn't known (about 1 s for each GiB and more).

        Args:
            path: the file.
            on_block: told the bytes done so far; may raise to stop.

        Raises:
            RequestError: ``model_file_invalid``: the file can't be read, or changed while it was read.
        """
        if (known := self.known(path)) is not None:
            return known
        try:
            before = _fingerprint(path, "")
            digest = _hash(path, on_block)
            after = _fingerprint(path, "")
        except OSError as error:
            raise RequestError("model_file_invalid", f"{path} can't be read: {error.strerror}.") from error
        if before != after:
            raise RequestError("model_file_invalid", f"{path} changed while it was hashed; try again when it is whole.")
        self._remember(path, msgspec.structs.replace(after, sha256=digest))
        return digest

    def forget(self, path: Path) -> None:
        """Drops what is known of a file."""
        with self._lock:
            self._entries = {name: entry for name, entry in self._entries.items() if name != str(path)}

    def note(self, path: Path, sha256: str) -> None:
        """Takes down the hash of a file as it is now, which somebody else has just taken."""
        try:
            self._remember(path, _fingerprint(path, sha256))
        except OSError as error:
            log.warning("the hash of %s is not kept: %s", path, error)

    def _remember(self, path: Path, entry: Fingerprint) -> None:
        with self._lock:
            entries = {**self._entries, str(path): entry}
            while len(entries) > MAX_ENTRIES:
                del entries[next(iter(entries))]
            self._entries = entries
            self._write(entries)

    def _read(self) -> dict[str, Fingerprint]:
        try:
            return msgspec.json.decode(self._path.read_bytes(), type=dict[str, Fingerprint])
        except FileNotFoundError:
            return {}
        except (OSError, msgspec.DecodeError) as error:
            log.warning(
                "the list of verified files %s can't be read (%s); files will be hashed again", self._path, error
            )
            return {}

    def _write(self, entries: dict[str, Fingerprint]) -> None:
        fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(msgspec.json.format(msgspec.json.encode(entries)))
            os.replace(fresh, self._path)
        except OSError as error:
            log.warning("the list of verified files %s can't be written: %s", self._path, error)
            with contextlib.suppress(OSError):
                fresh.unlink()


def _fingerprint(path: Path, sha256: str) -> Fingerprint:
    stat = path.stat()
    return Fingerprint(size_bytes=stat.st_size, modified_ns=stat.st_mtime_ns, inode=stat.st_ino, sha256=sha256)


def _hash(path: Path, on_block: Callable[[int], None] | None) -> str:
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            done += len(block)
            if on_block is not None:
                on_block(done)
    return digest.hexdigest()
