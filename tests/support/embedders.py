"""Models that give vectors or scores, written once and kept: all-MiniLM-L6-v2, and a tiny ranker of random weights."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests.support.gguf import Tensor, gguf_bytes
from tests.support.real_models import CACHE
from tools.make_minilm import package_folder, vocabulary, write_minilm

SENTENCES: Final = (
    "A cat sits on the mat.",
    "A kitten rests upon the rug.",
    "Stock markets fell sharply today.",
    "Die Ströme Europas fließen nach Osten und Westen.",
)
WIDTH: Final = 32
_INNER: Final = 64
_LAYERS: Final = 2
_RANK: Final = 4


def minilm() -> Path:
    """all-MiniLM-L6-v2 with F16 weights, 46 MB."""
    target = CACHE / "all-MiniLM-L6-v2-F16.gguf"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        write_minilm(target.with_suffix(f".{os.getpid()}")).replace(target)
    return target


def write_ranker(path: Path, **changes: Any) -> Path:
    """A BERT of two layers that scores pairs; ``changes``: of its metadata, ``__`` for a dot."""
    words = vocabulary(package_folder())
    size = len(words["tokenizer.ggml.tokens"])
    metadata: dict[str, Any] = {
        "general.architecture": "bert",
        "general.name": "Tiny ranker",
        "bert.block_count": _LAYERS,
        "bert.context_length": 128,
        "bert.embedding_length": WIDTH,
        "bert.feed_forward_length": _INNER,
        "bert.attention.head_count": 4,
        "bert.attention.layer_norm_epsilon": 1e-12,
        "bert.attention.causal": False,
        "bert.pooling_type": _RANK,
        **words,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    tensors = [Tensor(name, shape) for name, shape in _shapes(size).items()]
    path.write_bytes(gguf_bytes(metadata, tensors, values=_random))
    return path


def _shapes(vocabulary_size: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (WIDTH, vocabulary_size),
        "token_types.weight": (WIDTH, 2),
        "position_embd.weight": (WIDTH, 128),
        "token_embd_norm.weight": (WIDTH,),
        "token_embd_norm.bias": (WIDTH,),
        "cls.weight": (WIDTH, WIDTH),
        "cls.bias": (WIDTH,),
        "cls.output.weight": (WIDTH, 1),
        "cls.output.bias": (1,),
    }
    for layer in range(_LAYERS):
        for name, into, out in (
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH, WIDTH),
            ("attn_v", WIDTH, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_up", WIDTH, _INNER),
            ("ffn_down", _INNER, WIDTH),
        ):
            shapes[f"blk.{layer}.{name}.weight"] = (into, out)
            shapes[f"blk.{layer}.{name}.bias"] = (out,)
        for name in ("attn_output_norm", "layer_output_norm"):
            shapes[f"blk.{layer}.{name}.weight"] = shapes[f"blk.{layer}.{name}.bias"] = (WIDTH,)
    return shapes


def _random(tensor: Tensor) -> bytes:
    draw = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    values = draw.normal(0.0, 0.3, tensor.shape[::-1]).astype(np.float32)
    return (values + (1.0 if tensor.name.endswith("norm.weight") else 0.0)).astype(np.float32).tobytes()
