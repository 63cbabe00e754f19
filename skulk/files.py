"""Files that are whole or not there: atomic replacement, and a full disk told in one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from pathlib import Path
from typing import Final

from skulk.errors import ServiceError
from skulk.units import format_bytes

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def is_disk_full(error: OSError) -> bool:
    """Whether the file system or the user's quota had no room left."""
    return error.errno in _FULL


def disk_full_error(path: Path, error: OSError) -> ServiceError:
    """The error for a write to ``path`` that found no room (see `is_disk_full`)."""
    quota = " (the user's quota is used up)" if error.errno == errno.EDQUOT else ""
    return ServiceError(
        "disk_full",
        f"No room left on the disk for {path}: {_free_text(path)}{quota}. "
        "Free some space there (models take the most), or choose another folder with --home.",
    )


def write_atomic(path: Path, body: bytes, *, mode: int = 0o600, fsync: bool = True) -> None:
    """Replace ``path`` by ``body``: a reader, and a crash at any moment, finds the old or the new content whole.

    Blocks for two fsyncs (file and folder) unless ``fsync`` is false; call it in a thread where that matters.

    Args:
        path: the file; its folder must exist.
        body: the whole new content.
        mode: permissions of the new file, whatever the old one had.
        fsync: outlive a power cut. Without it the file outlives only the process.

    Raises:
        ServiceError: ``disk_full``.
        OSError: the folder is missing, read-only, or not ours.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        _write_new(temporary, body, mode=mode, fsync=fsync)
        os.replace(temporary, path)
        if fsync:
            _fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if is_disk_full(error):
            raise disk_full_error(path, error) from error
        raise


def _write_new(path: Path, body: bytes, *, mode: int, fsync: bool) -> None:
    # Opened with the final mode, not changed to it later: a secret is never readable for a moment.
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        view = memoryview(body)
        while view:
            view = view[os.write(file, view) :]
        if fsync:
            os.fsync(file)
    finally:
        os.close(file)


def _fsync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _free_text(path: Path) -> str:
    try:
        return f"{format_bytes(shutil.disk_usage(path.parent).free)} free"
    except OSError:
        return "free space unknown"
