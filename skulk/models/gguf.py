"""Reads the header of a GGUF file (version 2 or 3): metadata and tensor list, never the weights.

    magic "GGUF" | version u32 | tensors u64 | pairs u64 | pairs … | tensor infos … | padding | tensor data …

A file may be hostile or broken: every count, length and nesting has a limit, every offset is checked against the
file's size, and arrays are walked over, not kept. What is kept is at most `MAX_KEPT_BYTES`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, TypeAlias, TypeVar

import msgspec

from skulk.errors import RequestError
from skulk.models.ggml_types import TENSOR_TYPES

Scalar: TypeAlias = int | float | bool | str

ReadAt = Callable[[int, int], bytes]
"""(offset, length) -> at most that many bytes; fewer only at the end of the file."""

MAX_HEADER_BYTES: Final = 128 * 1024 * 1024
MAX_KEPT_BYTES: Final = 16 * 1024 * 1024
MAX_PAIRS: Final = 65_536
MAX_TENSORS: Final = 131_072
MAX_NAME_BYTES: Final = 65_535
MAX_STRING_BYTES: Final = 4 * 1024 * 1024
MAX_ARRAY_ITEMS: Final = 4 * 1024 * 1024
MAX_KEPT_ITEMS: Final = 4096
MAX_DIMENSIONS: Final = 4
MAX_NESTING: Final = 3
_BLOCK_BYTES: Final = 1024 * 1024

_STRING: Final = 8
_ARRAY: Final = 9
_BOOL: Final = 7
_SCALARS: Final[dict[int, struct.Struct]] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    _BOOL: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")

T = TypeVar("T")


class LongArray(msgspec.Struct, frozen=True, kw_only=True):
    """An array that was walked over, not kept."""

    count: int


Value: TypeAlias = Scalar | tuple[Scalar, ...] | LongArray


class TensorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor. ``offset`` counts from the header's ``data_offset``; ``shape``: fastest dimension first."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    offset: int
    size_bytes: int


class GgufHeader(msgspec.Struct, frozen=True, kw_only=True):
    """A header, checked.

    Attributes:
        data_offset: where tensor data begins in the file.
        described_bytes: the least size of a file that holds all that the header describes.
    """

    version: int
    metadata: dict[str, Value]
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    described_bytes: int

    @property
    def weights_bytes(self) -> int:
        """Sum of the tensors' sizes."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    def get(self, key: str, kind: type[T], default: T) -> T:
        """A metadata value of one scalar kind; the default where it is absent or of another kind."""
        value = self.metadata.get(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return kind(value)
        return value if type(value) is kind else default


def read_header(read_at: ReadAt, size_bytes: int, name: str) -> GgufHeader:
    """Reads and checks a header. Cost: linear in the header, mostly the vocabulary (0.1 to 0.5 s).

    Args:
        read_at: gives parts of the file; asked for blocks of 1 MiB.
        size_bytes: size of the whole file.
        name: the file, for the texts of errors.

    Raises:
        RequestError: ``model_file_invalid``: what is wrong with the file, and what to do.
    """
    return _HeaderReader(read_at, size_bytes, name).read()


class _HeaderReader:
    """One pass over one header."""

    def __init__(self, read_at: ReadAt, size_bytes: int, name: str) -> None:
        self._read_at = read_at
        self._size = size_bytes
        self._name = name
        self._position = 0
        self._block = b""
        self._block_start = 0
        self._kept = 0

    def read(self) -> GgufHeader:
        version = self._preamble()
        tensor_count = self._count(MAX_TENSORS, "tensors")
        pair_count = self._count(MAX_PAIRS, "metadata pairs")
        metadata: dict[str, Value] = {}
        for _ in range(pair_count):
            key = self._string(MAX_NAME_BYTES)
            if key in metadata:
                raise self._invalid(f"names {key!r} twice")
            metadata[key] = self._value(self._u32(), 0)
        alignment = self._alignment(metadata)
        tensors = tuple(self._tensor() for _ in range(tensor_count))
        data_offset = _padded(self._position, alignment)
        described = self._check_offsets(tensors, data_offset, alignment)
        return GgufHeader(
            version=version,
            metadata=metadata,
            tensors=tensors,
            data_offset=data_offset,
            described_bytes=described,
        )

    def _preamble(self) -> int:
        start = self._read_at(0, 8)
        if start[:4] != b"GGUF":
            raise self._invalid(f"is not a GGUF file: it starts with {start[:4]!r} instead of b'GGUF'")
        self._position = 4
        version = self._u32()
        if version not in (2, 3):
            if version & 0xFFFF == 0:
                raise self._invalid("is a GGUF for big-endian machines; choose the usual little-endian one")
            raise self._invalid(f"is GGUF version {version}; versions 2 and 3 are known")
        return version

    def _alignment(self, metadata: dict[str, Value]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 65_536 or alignment & (alignment - 1):
            raise self._invalid(f"has the alignment {alignment!r}, which is no power of two from 8 to 65536")
        return alignment

    def _tensor(self) -> TensorInfo:
        name = self._string(MAX_NAME_BYTES)
        dimensions = self._u32()
        if not 0 < dimensions <= MAX_DIMENSIONS:
            raise self._invalid(f"gives tensor {name!r} {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
        shape = tuple(self._u64() for _ in range(dimensions))
        type_number = self._u32()
        offset = self._u64()
        kind = TENSOR_TYPES.get(type_number)
        if kind is None:
            raise self._invalid(
                f"has tensor {name!r} in the type {type_number}, which this version doesn't know; choose another "
                "quantization or update"
            )
        values = 1
        for length in shape:
            values *= length
        if values >= 2**63 or 0 in shape or shape[0] % kind.block_values:
            raise self._invalid(f"gives tensor {name!r} the shape {shape}, which is impossible for {kind.name}")
        return TensorInfo(
            name=name,
            shape=shape,
            type_name=kind.name,
            offset=offset,
            size_bytes=values // kind.block_values * kind.block_bytes,
        )

    def _check_offsets(self, tensors: tuple[TensorInfo, ...], data_offset: int, alignment: int) -> int:
        """Tensors lie one after the other, in the order of the list, each aligned: llama.cpp loads nothing else."""
        expected = 0
        end = 0
        names: set[str] = set()
        for tensor in tensors:
            if tensor.name in names:
                raise self._invalid(f"names tensor {tensor.name!r} twice")
            names.add(tensor.name)
            if tensor.offset != expected:
                raise self._invalid(f"puts tensor {tensor.name!r} at {tensor.offset:,} instead of {expected:,}")
            end = tensor.offset + tensor.size_bytes
            expected = _padded(end, alignment)
        described = data_offset + end if tensors else self._position
        if described > self._size:
            raise self._invalid(f"is cut short: the header describes {described:,} bytes, the file has {self._size:,}")
        return described

    def _value(self, kind: int, depth: int) -> Value:
        if kind == _STRING:
            return self._string(MAX_STRING_BYTES)
        if kind == _ARRAY:
            return self._array(depth)
        return self._scalar(kind)

    def _scalar(self, kind: int) -> Scalar:
        form = _SCALARS.get(kind)
        if form is None:
            raise self._invalid(f"has a metadata value of the type {kind}, which GGUF doesn't have")
        return form.unpack(self._take(form.size))[0]

    def _array(self, depth: int) -> Value:
        if depth >= MAX_NESTING:
            raise self._invalid(f"nests arrays more than {MAX_NESTING} deep")
        kind = self._u32()
        count = self._count(MAX_ARRAY_ITEMS, "items of an array")
        if kind == _ARRAY:
            for _ in range(count):
                self._array(depth + 1)
            return LongArray(count=count)
        if kind == _STRING:
            return self._string_array(count)
        form = _SCALARS.get(kind)
        if form is None:
            raise self._invalid(f"has an array of the type {kind}, which GGUF doesn't have")
        if count > MAX_KEPT_ITEMS:
            self._skip(count * form.size)
            return LongArray(count=count)
        self._keep(count * form.size)
        return tuple(item for (item,) in form.iter_unpack(self._take(count * form.size))) if count else ()

    def _string_array(self, count: int) -> Value:
        if count <= MAX_KEPT_ITEMS // 16:
            return tuple(self._string(MAX_STRING_BYTES) for _ in range(count))
        for _ in range(count):
            self._skip(self._length(MAX_STRING_BYTES))
        return LongArray(count=count)

    def _string(self, limit: int) -> str:
        length = self._length(limit)
        self._keep(length)
        return self._take(length).decode("utf-8", "replace")

    def _length(self, limit: int) -> int:
        length = self._u64()
        if length > limit:
            raise self._invalid(f"has a text of {length:,} bytes in its header; at most {limit:,} are possible")
        return length

    def _count(self, limit: int, what: str) -> int:
        count = self._u64()
        if count > limit:
            raise self._invalid(f"claims {count:,} {what}; at most {limit:,} are possible")
        return count

    def _keep(self, length: int) -> None:
        self._kept += length
        if self._kept > MAX_KEPT_BYTES:
            raise self._invalid(f"has more than {MAX_KEPT_BYTES:,} bytes of texts in its header")

    def _u32(self) -> int:
        return _U32.unpack(self._take(4))[0]

    def _u64(self) -> int:
        return _U64.unpack(self._take(8))[0]

    def _skip(self, length: int) -> None:
        self._check_end(length)
        self._position += length

    def _take(self, length: int) -> bytes:
        self._check_end(length)
        start = self._position - self._block_start
        if start < 0 or start + length > len(self._block):
            self._block_start = self._position
            self._block = self._read_at(self._position, max(length, _BLOCK_BYTES))
            start = 0
            if len(self._block) < length:
                raise self._cut_short(length)
        self._position += length
        return self._block[start : start + length]

    def _check_end(self, length: int) -> None:
        if self._position + length > self._size:
            raise self._cut_short(length)
        if self._position + length > MAX_HEADER_BYTES:
            raise self._invalid(f"has a header of more than {MAX_HEADER_BYTES:,} bytes")

    def _cut_short(self, length: int) -> RequestError:
        needed = self._position + length
        return self._invalid(
            f"is cut short within its header: it has {self._size:,} bytes, the header needs at least {needed:,}"
        )

    def _invalid(self, what: str) -> RequestError:
        return RequestError("model_file_invalid", f"{self._name} {what}; copy or download it again.")


def _padded(offset: int, alignment: int) -> int:
    return (offset + alignment - 1) // alignment * alignment
