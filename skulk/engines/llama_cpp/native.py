"""The door to llama-cpp-python: its low-level module, imported once, and its log, turned into ours.

library() -> the module of C functions (`llama_decode`, …)
recent_errors() -> what llama.cpp complained about last, for the text of an error
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import logging
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from skulk.errors import StartError

log = logging.getLogger(__name__)

INSTALL_HINT: Final = (
    "install it with `pip install 'llama-cpp-python>=0.3.36,<0.4'` (for a GPU: with its CMAKE_ARGS in the "
    "environment), or run `make up` in a clone of this project"
)
MAX_ERRORS: Final = 32
_GPU_LIBRARY: Final = re.compile(r"(lib)?ggml-(cuda|hip|metal|vulkan)\b")
MAX_LINE_BYTES: Final = 64 * 1024

# ggml_log_level of ggml.h; llama.cpp's information is written for its developers, so it comes one level lower here.
_LEVEL_ERROR: Final = 4
_LEVEL_CONTINUE: Final = 5
_LEVELS: Final = {1: logging.DEBUG, 2: logging.DEBUG, 3: logging.INFO, 4: logging.WARNING}


class _LogSink:
    """Puts llama.cpp's fragments together to lines, passes them on and keeps the last errors.

    The callback may be called from any thread; appending to a deque and logging are safe there.
    """

    def __init__(self) -> None:
        self.errors: deque[str] = deque(maxlen=MAX_ERRORS)
        self._level = 0
        self._line = bytearray()

    def take(self, level: int, text: bytes | None, _user: Any) -> None:
        """The callback of ``llama_log_set``. Border: an exception must not cross into C."""
        try:
            self._take(level, text or b"")
        except Exception:
            self._line.clear()
            log.exception("could not log a line of llama.cpp")

    def _take(self, level: int, text: bytes) -> None:
        if level != _LEVEL_CONTINUE:
            self._flush()
            self._level = level
        self._line += text[: MAX_LINE_BYTES - len(self._line)]
        if text.endswith(b"\n"):
            self._flush()

    def _flush(self) -> None:
        line = self._line.decode("utf-8", "replace").strip()
        self._line.clear()
        if not line:
            return
        if self._level == _LEVEL_ERROR:
            self.errors.append(line)
        log.log(_LEVELS.get(self._level, logging.DEBUG), "%s", line)


_sink: Final = _LogSink()


@functools.cache
def library() -> Any:
    """llama-cpp-python's module of C functions, with the log attached and the backend started.

    Raises:
        StartError: ``engine_missing``: the package isn't installed, or its native library can't be loaded.
    """
    try:
        lib: Any = importlib.import_module("llama_cpp.llama_cpp")
    except ModuleNotFoundError as error:
        raise StartError("engine_missing", f"llama-cpp-python isn't installed ({error}); {INSTALL_HINT}.") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise StartError(
            "engine_missing",
            f"llama-cpp-python is installed, but its native library can't be loaded: {error}; {INSTALL_HINT}.",
        ) from error
    callback = lib.llama_log_callback(_sink.take)
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    # llama.cpp keeps the bare pointer; and native destructors that log must not call into a Python that is gone.
    atexit.register(_detach_log, lib, callback)
    lib.llama_backend_init()
    return lib


def _detach_log(lib: Any, _callback: Any) -> None:
    lib.llama_log_set(lib.llama_log_callback(), ctypes.c_void_p(0))


def address_of_row() -> Callable[[int, int], int | None]:
    """``llama_get_logits_ith`` as a function of context and batch row that gives the address, None: it has no logits.

    A bare number takes half the time of a ctypes pointer, once a token.
    """
    function: Any = library()._lib["llama_get_logits_ith"]
    function.argtypes = (ctypes.c_void_p, ctypes.c_int32)
    function.restype = ctypes.c_void_p
    return function


def forget_errors() -> None:
    """Starts a new collection of errors, before a call whose failure is to be explained."""
    _sink.errors.clear()


def recent_errors() -> tuple[str, ...]:
    """llama.cpp's error lines since `forget_errors`, oldest first, at most 32."""
    return tuple(_sink.errors)


def package_version() -> str:
    """The version of llama-cpp-python; empty where it isn't installed as a package."""
    try:
        return importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return ""


def native_folder() -> Path:
    """Where the native libraries of this build lie."""
    return Path(library().__file__).with_name("lib")


def build_id() -> str:
    """Names this very build: its version and its files by name, size and date."""
    files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in native_folder().glob("*"))
    return hashlib.sha256(f"{engine_version()} {files}".encode()).hexdigest()[:16]


def gpu_libraries() -> tuple[str, ...]:
    """The libraries for GPUs that came with this build, whether or not their drivers are here."""
    return tuple(sorted(file.name for file in native_folder().glob("*") if _GPU_LIBRARY.match(file.name)))


def engine_version() -> str:
    """Both versions that decide what is computed: the bindings' and llama.cpp's own."""
    return f"llama-cpp-python {package_version() or 'unknown'}, llama.cpp {library().llama_version().decode()}"
