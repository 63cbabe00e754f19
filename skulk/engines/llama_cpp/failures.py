"""What went wrong while loading, in a sentence: llama.cpp's log lines in, one of our errors out. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from skulk.errors import RequestError, ServiceError, SkulkError, StartError
from skulk.units import format_bytes

_CUT_SHORT: Final = re.compile(
    r"not within the file bounds|unexpectedly reached end|failed to read (key-value|tensor|magic|header|version)",
    re.IGNORECASE,
)
_NO_MEMORY: Final = re.compile(
    r"(failed|unable|not able) to allocate|out of (device |host )?memory|bad_alloc|cudaMalloc failed"
    r"|OutOf(Device|Host)Memory",
    re.IGNORECASE,
)
_ARCHITECTURE: Final = re.compile(r"unknown model architecture: '?([^'\n]*)'?")
_NEEDS_FLASH: Final = re.compile(r"cache .*requires.*flash.att(n|ention)", re.IGNORECASE)
_MISSING_PART: Final = re.compile(r"failed to load GGUF split from (\S+)")


def load_failure(path: str, size_bytes: int, lines: Sequence[str], version: str) -> SkulkError:
    """Why ``llama_model_load_from_file`` gave nothing.

    Args:
        path: the file, as it was given.
        size_bytes: its size.
        lines: llama.cpp's error lines, oldest first.
        version: of the engine, for people to compare.
    """
    text = "\n".join(lines)
    if _NO_MEMORY.search(text):
        return ServiceError(
            "runner_failed",
            f"there is not enough memory to load {path} ({format_bytes(size_bytes)}): {_reason(lines)}. Stop another "
            "instance, or place a smaller quantization.",
        )
    if found := _ARCHITECTURE.search(text):
        return RequestError(
            "model_file_invalid",
            f"{path} holds a model of the architecture {found.group(1)!r}, which the installed engine doesn't know "
            f"({version}); update llama-cpp-python or choose another model.",
        )
    if found := _MISSING_PART.search(text):
        return RequestError(
            "model_file_invalid", f"{path} is one part of several, and {found.group(1)} can't be read; copy all parts."
        )
    if _CUT_SHORT.search(text):
        return RequestError(
            "model_file_invalid",
            f"{path} is cut short: it has {size_bytes:,} bytes and ends before its tensors do ({_reason(lines)}); "
            "copy or download it again.",
        )
    return RequestError(
        "model_file_invalid",
        f"llama.cpp can't load {path}: {_reason(lines)} ({version}); download it again or choose another file.",
    )


def context_failure(cells: int, n_parallel: int, kv_type: str, lines: Sequence[str]) -> ServiceError | StartError:
    """Why ``llama_init_from_model`` gave nothing."""
    if any(_NEEDS_FLASH.search(line) for line in lines):
        return StartError(
            "config_invalid",
            f"a {kv_type} cache needs flash attention, which is off or which this backend can't do: set "
            "SKULK_LLAMA_CPP_FLASH_ATTN to auto, or SKULK_LLAMA_CPP_KV_TYPE to f16.",
        )
    return ServiceError(
        "runner_failed",
        f"llama.cpp can't make a context of {cells:,} cells for {n_parallel} sequences with a {kv_type} cache: "
        f"{_reason(lines)}. Place the model with a shorter context or fewer parallel sequences.",
    )


def _reason(lines: Sequence[str]) -> str:
    """The line that tells most: the first that isn't just "failed to load"."""
    told = [line for line in lines if not line.endswith("failed to load model")]
    chosen = next(
        (line for line in told if "error loading model" in line and "failed to load model from" not in line), None
    )
    text = chosen or (told[0] if told else "no reason given")
    return re.sub(r"^[a-z_0-9]+: (error loading model: )?", "", text)
