"""Tiny models with random weights, of architectures whose memory works in different ways, as llama.cpp loads them.

What they say means nothing; but it is a function of all tokens before it, so a wrong state shows. What they consist of:
`tests.support.model_shapes`; larger ones, with a real vocabulary: `tools/make_model.py`.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests.support.gguf import Tensor, gguf_bytes, vocabulary_metadata
from tests.support.model_shapes import Shape, layout_of

ARCHITECTURES: Final = ("llama", "gemma3", "mamba", "jamba", "lfm2", "qwen3next")
WINDOW: Final = 48
"""Tokens that the sliding layers of gemma3 see."""
VOCABULARY: Final = len(vocabulary_metadata()["tokenizer.ggml.tokens"])
_DEVIATION: Final = 0.12


def write_tiny(path: Path, architecture: str, *, seed: int = 1, **changes: Any) -> Path:
    """Writes a model of one of `ARCHITECTURES`; equal arguments, equal file.

    ``changes``: of its own metadata; ``__`` stands for a dot.
    """
    header, shapes = layout_of(architecture, Shape(window=WINDOW), VOCABULARY, **changes)
    tensors = [Tensor(name, shape) for name, shape in shapes.items()]
    header |= {"general.name": f"Tiny {architecture}"}
    path.write_bytes(gguf_bytes(header | vocabulary_metadata(), tensors, values=lambda one: random_weights(one, seed)))
    return path


def story_of_numbers() -> tuple[int, ...]:
    """541 tokens of a tiny model's vocabulary without a pattern."""
    return tuple((index * 37 + index * index * 5) % (VOCABULARY - 5) + 5 for index in range(541))


def random_weights(tensor: Tensor, seed: int) -> bytes:
    """32-bit values with which states neither explode nor die; equal name and seed, equal values."""
    draw = np.random.default_rng((seed, zlib.crc32(tensor.name.encode())))
    values = draw.normal(0.0, _DEVIATION, tensor.shape[::-1]).astype(np.float32)
    if "norm" in tensor.name:
        values += 1.0
    elif tensor.name.endswith("ssm_a"):
        # States fade, some quickly and some slowly.
        values = -np.abs(values)
    elif "conv" in tensor.name:
        values *= 3.0
    elif tensor.name == "output.weight":
        values *= 2.0
    return values.tobytes()
