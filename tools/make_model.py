r"""Writes a GGUF model of any shape with random weights and a real tokenizer, for tests of memory and speed.

    python tools/make_model.py build/big.gguf --architecture qwen3 --layers 8 --width 1024 --heads 16 --kv-heads 4 \
        --head 64 --feed-forward 3072 --context 32768 --quantization Q4_K
    python tools/make_model.py build/moe.gguf --architecture qwen3moe --experts 16 --experts-used 4
    python tools/make_model.py build/window.gguf --architecture gemma3 --window 512 --window-every 6
    python tools/make_model.py build/huge.gguf --layers 80 --width 8192 --heads 64 --kv-heads 8 --sparse

What it says means nothing. Equal flags give equal files. `--sparse` writes the header alone and leaves the weights a
hole (zeros that take no room on the disk): enough to see what llama.cpp would allocate. The tokenizer is that of the
embedded model, or of any file given with `--tokenizer`.
"""

from __future__ import annotations

import argparse
import math
import sys
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.gguf import Tensor, embedded_model, raw_pairs, write_gguf  # noqa: E402
from tests.support.model_shapes import ARCHITECTURES, Shape, layout_of  # noqa: E402

QUANTIZATIONS: Final = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14}
"""ggml's number of each type."""
_FILE_TYPES: Final = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K": 15, "Q6_K": 18}
_BLOCKS: Final = {0: 1, 1: 1, 2: 32, 3: 32, 8: 32, 12: 256, 14: 256}
_BLOCK_BYTES: Final = {2: 18, 3: 20, 8: 34, 12: 144, 14: 210}
# Where the 16-bit scales of a block lie, and what a stored number counts to.
_SCALES: Final = {2: ((0,), 8.0), 3: ((0,), 8.0), 8: ((0,), 74.0), 12: ((0,), 240.0), 14: ((208,), 1200.0)}
_OFFSETS: Final = {3: 2, 12: 2}


def write_model(
    path: Path,
    architecture: str = "llama",
    shape: Shape | None = None,
    *,
    quantization: str = "F16",
    tokenizer: Path | None = None,
    sparse: bool = False,
    seed: int = 1,
    **changes: Any,
) -> Path:
    """Writes the model.

    Args:
        path: the file to make.
        architecture: one of `ARCHITECTURES`.
        shape: its sizes; None: a tiny one.
        quantization: of the matrices, one of `QUANTIZATIONS`; what a type can't hold (norms, rows that aren't a
            multiple of its block) stays F32.
        tokenizer: a GGUF file whose tokenizer is taken; None: the embedded model.
        sparse: no weights, see the module.
        seed: of the weights.
        changes: of its metadata; ``__`` stands for a dot.
    """
    tokens = {
        key: body for key, body in raw_pairs(tokenizer or embedded_model()).items() if key.startswith("tokenizer.")
    }
    vocabulary = int.from_bytes(_count_of(tokens["tokenizer.ggml.tokens"]), "little")
    header, shapes = layout_of(architecture, shape or Shape(), vocabulary, **changes)
    header |= {"general.name": f"Random {architecture}", "general.file_type": _FILE_TYPES[quantization]}
    number = QUANTIZATIONS[quantization]
    tensors = [Tensor(name, sizes, _type_of(name, sizes, number)) for name, sizes in shapes.items()]
    return write_gguf(path, header, tensors, raw=tokens, values=None if sparse else lambda one: weights(one, seed))


def _count_of(pair: bytes) -> bytes:
    """The length of an array pair: after the key, the type 'array' and the type of its items."""
    start = 8 + int.from_bytes(pair[:8], "little") + 8
    return pair[start : start + 8]


def _type_of(name: str, sizes: tuple[int, ...], number: int) -> int:
    row, *others = sizes
    is_matrix = bool(others) and not any(part in name for part in ("conv", "ssm_a", "ffn_gate_inp"))
    return number if is_matrix and row % _BLOCKS[number] == 0 else 0


def weights(tensor: Tensor, seed: int) -> bytes:
    """Random values with which states neither explode nor die; equal name and seed, equal values."""
    draw = np.random.default_rng((seed, zlib.crc32(tensor.name.encode())))
    deviation = 1.0 / math.sqrt(next(iter(tensor.shape)))
    if tensor.type_number > 1:
        return _blocks(tensor, deviation, draw)
    values = draw.standard_normal(tensor.shape[::-1], dtype=np.float32) * np.float32(deviation)
    if "norm" in tensor.name:
        values = np.float32(1.0) + values / np.float32(10.0)
    elif tensor.name.endswith("ssm_a"):
        values = -np.abs(values)
    return values.astype(np.float16 if tensor.type_number == 1 else np.float32).tobytes()


def _blocks(tensor: Tensor, deviation: float, draw: np.random.Generator) -> bytes:
    """Random bits in blocks of a quantised type, whose scales give about the wanted deviation."""
    number = tensor.type_number
    count = tensor.size_bytes // _BLOCK_BYTES[number]
    blocks = draw.integers(0, 256, (count, _BLOCK_BYTES[number]), dtype=np.uint8)
    places, spread = _SCALES[number]
    # Numbers spread evenly over their range have a deviation of 0.58 of its half.
    scale = np.float16(deviation / spread * 1.7)
    for place in places:
        blocks[:, place : place + 2] = np.frombuffer(scale.tobytes(), np.uint8)
    if number in _OFFSETS:
        # Q4_1 adds a minimum, Q4_K takes one away (times a 6-bit number): so that the mean is about zero.
        shift = np.float16(-7.5 * float(scale)) if number == 3 else np.float16(7.5 * float(scale))
        at = _OFFSETS[number]
        blocks[:, at : at + 2] = np.frombuffer(shift.tobytes(), np.uint8)
    return blocks.tobytes()


def main(arguments: list[str]) -> int:
    """Writes the file that the flags describe; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools/make_model.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="the file to make")
    parser.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="llama")
    parser.add_argument("--quantization", choices=sorted(QUANTIZATIONS), default="F16", help="of the matrices")
    parser.add_argument("--head", type=int, help="both lengths of a head (default: width divided by heads)")
    for name, default in Shape()._asdict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"default: {default}")
    parser.add_argument("--tokenizer", type=Path, help="a GGUF file to take the tokenizer from")
    parser.add_argument("--sparse", action="store_true", help="leave the weights a hole")
    parser.add_argument("--seed", type=int, default=1)
    flags = parser.parse_args(arguments)
    given = {name: value for name in Shape._fields if (value := getattr(flags, name)) is not None}
    shape = Shape(**given)
    head = flags.head or shape.width // max(1, shape.heads)
    shape = Shape(**{"key_length": head, "value_length": head, **given})
    write_model(
        flags.path,
        flags.architecture,
        shape,
        quantization=flags.quantization,
        tokenizer=flags.tokenizer,
        sparse=flags.sparse,
        seed=flags.seed,
    )
    print(f"{flags.path}: {flags.path.stat().st_size:,} bytes, {flags.architecture}, {shape}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
