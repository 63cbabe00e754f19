"""The header reader: what it reads, and that nothing a file can hold makes it crash, hang or grow."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skulk.errors import RequestError
from skulk.models.gguf import (
    MAX_KEPT_BYTES,
    MAX_KEPT_ITEMS,
    GgufHeader,
    LongArray,
    read_header,
)
from tests.support.gguf import TENSORS, U64, Tensor, gguf_bytes, llama_metadata, pair, text, typed


def read(body: bytes, size: int | None = None) -> GgufHeader:
    return read_header(
        lambda offset, length: body[offset : offset + length], len(body) if size is None else size, "m.gguf"
    )


def read_or_refused(body: bytes) -> GgufHeader | None:
    """Any other exception than a refusal is a failure of the test."""
    try:
        return read(body)
    except RequestError:
        return None


def refusal(body: bytes, size: int | None = None) -> str:
    with pytest.raises(RequestError) as caught:
        read(body, size)
    assert caught.value.code == "model_file_invalid"
    assert caught.value.detail.startswith("m.gguf ")
    assert "again" in caught.value.detail
    return caught.value.detail


def raw(pairs: bytes, pair_count: int = 1, tensors: bytes = b"", tensor_count: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, pair_count) + pairs + tensors


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


GOOD = gguf_bytes(llama_metadata(), TENSORS)


@pytest.mark.parametrize("version", [2, 3])
def test_reads_metadata_and_tensors(version: int) -> None:
    metadata = llama_metadata() | {
        "a.flag": True,
        "a.float": 0.5,
        "a.negative": -3,
        "a.big": U64(2**40),
        "a.list": [1, 2],
    }
    header = read(gguf_bytes(metadata, TENSORS, version=version))
    assert header.version == version
    assert header.metadata == {**metadata, "a.list": (1, 2)}
    assert [(t.name, t.shape, t.type_name) for t in header.tensors] == [
        ("token_embd.weight", (64, 100), "Q4_1"),
        ("output_norm.weight", (64,), "F32"),
    ]
    assert header.weights_bytes == 64 * 100 // 32 * 20 + 64 * 4


def test_a_whole_file_has_at_least_what_its_header_describes() -> None:
    header = read(GOOD)
    assert header.data_offset % 32 == 0
    assert header.described_bytes == header.data_offset + sum(-(-t.size_bytes // 32) * 32 for t in header.tensors)


def test_long_arrays_are_walked_over_and_what_follows_is_read() -> None:
    metadata = {
        "t.tokens": [f"token {n}" for n in range(5000)],
        "t.scores": [0.0] * (MAX_KEPT_ITEMS + 1),
        "t.types": [1] * MAX_KEPT_ITEMS,
        "t.end": "here",
    }
    header = read(gguf_bytes(metadata))
    assert header.metadata["t.tokens"] == LongArray(count=5000)
    assert header.metadata["t.scores"] == LongArray(count=MAX_KEPT_ITEMS + 1)
    assert header.metadata["t.types"] == (1,) * MAX_KEPT_ITEMS
    assert header.metadata["t.end"] == "here"


def test_get_gives_a_value_of_the_asked_kind_only() -> None:
    header = read(gguf_bytes({"a": 7, "b": True, "c": "x", "d": 0.5}))
    assert header.get("a", int, 0) == 7
    assert header.get("a", float, 0.0) == 7.0
    assert header.get("b", int, -1) == -1
    assert header.get("c", int, -1) == -1
    assert header.get("absent", str, "none") == "none"


@pytest.mark.parametrize("cut", [0, 3, 4, 8, 23, 24, 40, 200])
def test_a_header_cut_short_says_so(cut: int) -> None:
    said = refusal(GOOD[:cut])
    assert "cut short" in said or "not a GGUF" in said


def test_data_cut_short_names_both_sizes() -> None:
    header = read(GOOD)
    said = refusal(GOOD[: header.described_bytes - 1])
    assert f"describes {header.described_bytes:,} bytes, the file has {header.described_bytes - 1:,}" in said


def test_trailing_bytes_are_no_harm() -> None:
    assert read(GOOD + b"\0" * 100).weights_bytes == read(GOOD).weights_bytes


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not a GGUF"),
        (b"PK\3\4 something else", "not a GGUF"),
        (b"GGUF" + struct.pack("<I", 1) + b"\0" * 16, "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + b"\0" * 16, "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0), "claims 4,611,686,018,427,387,904 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**62), "metadata pairs"),
        (raw(pair("a", 1) * 2, 2), "names 'a' twice"),
        (raw(text("a") + struct.pack("<I", 77) + b"\0" * 64), "type 77"),
        (raw(text("a") + struct.pack("<IIQ", 9, 77, 1) + b"\0" * 64), "array of the type 77"),
        (raw(text("a") + struct.pack("<IIQ", 9, 4, 2**60) + b"\0" * 64), "items of an array"),
        (raw(struct.pack("<Q", 2**63) + b"a"), "text of 9,223,372,036,854,775,808 bytes"),
        (raw(text("a") + struct.pack("<IQ", 8, 2**40)), "text of 1,099,511,627,776 bytes"),
        (raw(pair("general.alignment", 48)), "alignment 48"),
        (raw(pair("general.alignment", 0)), "alignment 0"),
        (raw(pair("general.alignment", "32")), "alignment '32'"),
        (raw(b"", 0, tensor("t", (32,), 99, 0), 1), "type 99"),
        (raw(b"", 0, tensor("t", (32,), 4, 0), 1), "type 4"),
        (raw(b"", 0, tensor("t", (33,), 8, 0), 1), "shape (33,)"),
        (raw(b"", 0, tensor("t", (0,), 0, 0), 1), "shape (0,)"),
        (raw(b"", 0, tensor("t", (2**40, 2**40), 0, 0), 1), "impossible"),
        (raw(b"", 0, tensor("t", (1,) * 5, 0, 0), 1), "5 dimensions"),
        (raw(b"", 0, tensor("t", (), 0, 0), 1), "0 dimensions"),
        (raw(b"", 0, tensor("t", (8,), 0, 32), 1), "at 32 instead of 0"),
        (raw(b"", 0, tensor("t", (8,), 0, 0) + tensor("t", (8,), 0, 32), 2), "tensor 't' twice"),
        (raw(b"", 0, tensor("t", (8,), 0, 0) + tensor("u", (8,), 0, 0), 2), "at 0 instead of 32"),
        (raw(b"", 0, tensor("t", (2**40,), 0, 0), 1), "cut short"),
    ],
)
def test_hostile_headers_get_a_sentence(body: bytes, says: str) -> None:
    assert says in refusal(body)


def test_nesting_has_a_limit() -> None:
    body = text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10 + struct.pack("<IQ", 4, 0)
    assert "deep" in refusal(raw(body))


def test_many_texts_are_not_kept_without_bound() -> None:
    one = 3 * 1024 * 1024
    pairs = b"".join(text(f"k{n}") + struct.pack("<IQ", 8, one) + b"x" * one for n in range(6))
    assert f"more than {MAX_KEPT_BYTES:,}" in refusal(raw(pairs, 6))


def test_huge_claims_allocate_little() -> None:
    claims = raw(text("a") + struct.pack("<IIQ", 9, 4, 4 * 1024 * 1024), 2)
    tracemalloc.start()
    try:
        refusal(claims, size=2**50)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * 1024 * 1024


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=8)),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, len(GOOD)),
)
def test_mutated_headers_are_read_or_refused(mutations: list[tuple[int, bytes]], cut: int) -> None:
    body = bytearray(GOOD)
    for position, change in mutations:
        body[position : position + len(change)] = change
    for candidate in (bytes(body), bytes(body[:cut])):
        header = read_or_refused(candidate)
        if header is not None:
            assert header.described_bytes <= len(candidate)
            assert all(tensor.offset % 8 == 0 for tensor in header.tensors)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_noise_after_the_magic_is_read_or_refused(noise: bytes) -> None:
    header = read_or_refused(b"GGUF" + struct.pack("<I", 3) + noise)
    assert header is None or header.described_bytes <= len(noise) + 8


_values = st.one_of(
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.integers(-(2**31), -1),
    st.text(max_size=40),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=20),
    st.lists(st.text(max_size=10), min_size=1, max_size=20),
)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.text(max_size=20).filter(lambda key: key != "general.alignment"), _values, max_size=12),
    st.lists(st.integers(1, 40), max_size=6),
)
def test_what_is_written_is_read(metadata: dict[str, object], widths: list[int]) -> None:
    tensors = [Tensor(f"t{index}", (32, width), 8) for index, width in enumerate(widths)]
    header = read(gguf_bytes(metadata, tensors))
    assert header.metadata == {key: tuple(v) if isinstance(v, list) else v for key, v in metadata.items()}
    assert header.weights_bytes == sum(tensor.size_bytes for tensor in tensors)


def test_typed_writes_what_the_format_says() -> None:
    """The writer itself, on one example by hand."""
    assert typed("ab") == bytes.fromhex("08000000 0200000000000000 6162")
