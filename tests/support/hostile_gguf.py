"""Hostile GGUF files: sound ones edited by a script that hypothesis makes and shrinks, and what must hold for all."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from functools import cache
from typing import Final

from hypothesis import strategies as st

from skulk.errors import RequestError
from skulk.models.card import card_from_gguf
from skulk.models.gguf import MAX_KEPT_BYTES, read_header
from skulk.wire.model import ModelFile
from tests.support.gguf import TENSORS, U64, Tensor, gguf_bytes, llama_metadata

# What is kept, once more as Python's objects, and the reader's block.
MEMORY_BOUND: Final = 3 * MAX_KEPT_BYTES
TIME_BOUND_S: Final = 20.0
EXTREMES: Final = (
    0, 1, 2, 7, 8, 9, 12, 13, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1
)  # fmt: skip

Edit = tuple[int, int, int]
Script = tuple[int, list[Edit], int]


@cache
def seeds() -> tuple[bytes, ...]:
    """Sound files: short and long values, arrays of every kind, both versions."""
    return (
        gguf_bytes(llama_metadata(), TENSORS),
        gguf_bytes(llama_metadata() | {"tokenizer.ggml.tokens": ["a"] * 700, "x.heads": [1, 2, 3] * 9}, TENSORS),
        gguf_bytes({"general.alignment": 64, "a": [0.5] * 40, "b": True, "c": U64(7), "d": -3}, version=2),
        gguf_bytes({}, tuple(Tensor(f"t{number}", (32, number + 1), 8) for number in range(30))),
        gguf_bytes({"general.architecture": "llama"}, ()),
        b"GGUF",
    )


def scripts() -> st.SearchStrategy[Script]:
    """Which seed, edits of it, and where it is cut (0: not at all)."""
    edit = st.tuples(st.integers(0, 5), st.integers(0, 2**16), st.integers(0, 2**16))
    return st.tuples(st.integers(0, len(seeds()) - 1), st.lists(edit, max_size=10), st.integers(0, 2**16))


def random_script(dice: random.Random) -> Script:
    """One script by chance alone."""
    top = 2**16 + 1
    edits = [(dice.randrange(6), dice.randrange(top), dice.randrange(top)) for _ in range(dice.randrange(9))]
    return dice.randrange(len(seeds())), edits, dice.choice((0, 0, 0, dice.randrange(top)))


def file_of(script: Script) -> bytes:
    """The file that a script makes."""
    which, edits, cut = script
    body = bytearray(seeds()[which])
    for kind, where, value in edits:
        position = where % max(1, len(body))
        match kind:
            case 0:
                body[position : position + 1] = bytes([value % 256])
            case 1:
                body[position : position + 8] = struct.pack("<Q", EXTREMES[value % len(EXTREMES)])
            case 2:
                body[position : position + 4] = struct.pack("<I", EXTREMES[value % len(EXTREMES)] % 2**32)
            case 3:
                del body[position : position + value % 64]
            case 4:
                body[position:position] = body[position : position + value % 512]
            case _:
                # the counts that everything hangs on
                body[8 + position % 16 // 8 * 8 : 16 + position % 16 // 8 * 8] = struct.pack("<Q", value)
    return bytes(body[: cut % (len(body) + 1)] if cut else body)


def check(script: Script, claimed_bytes: int = 0) -> bool:
    """Reads the file as a header, and a card from it; whether it was taken. ``claimed_bytes``: a sparse rest of zeros.

    Raises:
        AssertionError: something else came out than a header or a refusal, it took too long, or too much memory.
    """
    body = file_of(script)
    size = max(len(body), claimed_bytes)

    def read_at(offset: int, length: int) -> bytes:
        part = body[offset : offset + length]
        return part + bytes(min(length, size - offset) - len(part)) if offset < size else b""

    began = time.process_time()
    tracemalloc.start(1)
    refusal: RequestError | None = None
    try:
        header = read_header(read_at, size, "m.gguf")
        assert header.described_bytes <= size
        card_from_gguf([header], model_id="m", files=[ModelFile(name="m.gguf", size_bytes=size)])
    except RequestError as error:
        refusal = error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak <= MEMORY_BOUND, f"{peak:,} bytes"
    assert time.process_time() - began <= TIME_BOUND_S
    assert refusal is None or refusal.code == "model_file_invalid", refusal
    return refusal is None
