"""The process that reads the headers of a model's files before a runner loads them: limited memory, limited time.

A hostile file can take down this process and nothing else; what it says is only "sound", or what is wrong.
"""

from __future__ import annotations

import os
import resource
import sys
from typing import Final

from skulk.errors import RequestError, SkulkError
from skulk.models.gguf import read_header
from skulk.node.children import HeaderSpec
from skulk.supervision.ready import announce_error, announce_ready, read_spec
from skulk.units import GIB
from skulk.wire.base import decode

MEMORY_BYTES: Final = GIB
CPU_S: Final = 50


def main() -> int:
    """Reads the headers; returns the exit status."""
    paths: tuple[str, ...] = ("the file",)
    try:
        paths = decode(read_spec(), HeaderSpec).paths
        limit()
        for path in paths:
            read(path)
    except SkulkError as error:
        announce_error(error)
        return error.exit_status
    except (MemoryError, OSError, RecursionError) as error:
        reason = f"{paths[0]} can't be read ({type(error).__name__}: {error}); copy or download it again."
        announce_error(RequestError("model_file_invalid", reason))
        return 1
    announce_ready({})
    return 0


def limit() -> None:
    """Bounds what this process may take; where the system can't (macOS counts no address space), time is bounded."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
    if sys.platform.startswith("linux"):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


def read(path: str) -> None:
    """Reads one header.

    Raises:
        RequestError: ``model_file_invalid``.
        OSError: the file can't be read.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        read_header(lambda offset, length: os.pread(file, length, offset), os.fstat(file).st_size, path)
    finally:
        os.close(file)
