"""Copies of the embedded model, made once by llama.cpp itself and kept with the build: exact weights, fewer layers.

Quantised weights are multiplied with rounded activations, so a batch's shape shows in the logits; with F32 weights it
doesn't. The first `FEW` layers alone say nothing sensible, but they compute as the whole model does, ten times as fast.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from skulk.engines.llama_cpp.native import library
from skulk.wire.generation import Prompt, TextPrompt
from tests.support.gguf import embedded_model

CACHE: Final = Path(__file__).parents[2] / "build" / "models"
LAYERS: Final = 30
FEW: Final = 3
_ALL_F32: Final = 0


def exact_copy(*, layers: int = LAYERS) -> Path:
    """The embedded model with F32 weights and its first ``layers`` layers; 540 MB whole, 160 MB with `FEW`."""
    return _copy(f"f32-{layers}", layers, ftype=_ALL_F32, allow_requantize=True)


def short_copy(*, layers: int = FEW) -> Path:
    """The embedded model's first ``layers`` layers, quantised as they are."""
    return _copy(f"quantised-{layers}", layers, only_copy=True)


def _copy(name: str, layers: int, **settings: Any) -> Path:
    source = embedded_model()
    target = CACHE / f"{source.stem}-{source.stat().st_size}-{name}.gguf"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(f".{os.getpid()}")
    lib: Any = library()
    params = lib.llama_model_quantize_default_params()
    for key, value in settings.items():
        setattr(params, key, value)
    pruned = (ctypes.c_int32 * (LAYERS - layers + 1))(*range(layers, LAYERS), -1)
    if layers < LAYERS:
        params.prune_layers = ctypes.cast(pruned, ctypes.POINTER(ctypes.c_int32))
    status = lib.llama_model_quantize(os.fsencode(source), os.fsencode(unfinished), ctypes.byref(params))
    assert status == 0, f"llama_model_quantize gave {status}"
    unfinished.replace(target)
    return target


def story(tokens_of: Callable[[Prompt], Sequence[int]], *, lines: int = 40) -> tuple[int, ...]:
    """Some 500 tokens of plain text, no two lines alike."""
    colours, things = ("red", "green", "blue", "white", "grey"), ("door", "garden", "roof", "dog")
    text = "".join(
        f"House {7 * at + 3} has a {colours[at % 5]} {things[at % 4]} and {at % 11 + 2} windows. "
        for at in range(lines)
    )
    return tuple(tokens_of(TextPrompt(text=text)))
