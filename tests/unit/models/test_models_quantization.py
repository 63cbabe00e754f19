"""Quantizations: parsed from names as tokens, ordered as the spec says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.models.ggml_types import FILE_TYPES
from skulk.models.quantization import FileName, normal, parse_file_name, preferred, rank


@pytest.mark.parametrize(
    ("name", "base", "quantization", "part", "parts"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct", "Q4_1", 1, 1),
        ("Qwen3-8B-Q4_K_M.gguf", "Qwen3-8B", "Q4_K_M", 1, 1),
        ("qwen2.5-7b-instruct-q8_0-00002-of-00003.gguf", "qwen2.5-7b-instruct", "Q8_0", 2, 3),
        ("gemma-3-27b-it-UD-Q4_K_XL.gguf", "gemma-3-27b-it", "Q4_K_XL", 1, 1),
        ("gpt-oss-20b-mxfp4.gguf", "gpt-oss-20b", "MXFP4", 1, 1),
        ("gpt-oss-20b-MXFP4_MOE.gguf", "gpt-oss-20b", "MXFP4", 1, 1),
        ("model-IQ2_XXS.gguf", "model", "IQ2_XXS", 1, 1),
        ("model.fp16.gguf", "model", "F16", 1, 1),
        ("model-BF16-00001-of-00002.gguf", "model", "BF16", 1, 2),
        ("TinyQ4_K_Mix.gguf", "TinyQ4_K_Mix", "", 1, 1),
        ("noQ8_0here.gguf", "noQ8_0here", "", 1, 1),
        ("Q4_0-trainer-Q8_0.gguf", "Q4_0-trainer", "Q8_0", 1, 1),
        ("Q4_0.gguf", "", "Q4_0", 1, 1),
        ("llama-7b.gguf", "llama-7b", "", 1, 1),
        ("mmproj-model-f16.gguf", "mmproj-model", "F16", 1, 1),
    ],
)
def test_names_are_taken_apart(name: str, base: str, quantization: str, part: int, parts: int) -> None:
    assert parse_file_name(name) == FileName(base=base, quantization=quantization, part=part, parts=parts)


@pytest.mark.parametrize(
    ("name", "is_projector"),
    [
        ("mmproj-F16.gguf", True),
        ("gemma.mmproj-f16.gguf", True),
        ("mmprojection-7b-Q4_0.gguf", False),
        ("x.gguf", False),
    ],
)
def test_projectors_are_known_by_their_name(name: str, is_projector: bool) -> None:
    assert parse_file_name(name).is_projector is is_projector


def test_the_order_is_the_specs() -> None:
    order = [
        "Q4_K_M", "Q4_K_S", "Q5_K_M", "Q5_K_S", "Q6_K", "Q4_0", "Q5_0", "Q8_0", "Q3_K_M", "Q2_K", "IQ4_XS", "MXFP4",
        "something new", "BF16", "F16", "F32",
    ]  # fmt: skip
    assert [*sorted(set(order), key=rank)] == order


def test_the_preferred_is_the_same_in_any_order() -> None:
    assert preferred(["F16", "Q8_0", "q4_k_s"]) == preferred(["q4_k_s", "F16", "Q8_0"]) == "q4_k_s"


@pytest.mark.parametrize("name", sorted(FILE_TYPES.values()))
def test_each_file_type_is_a_name_that_is_parsed(name: str) -> None:
    assert parse_file_name(f"model-{name.lower()}.gguf").quantization == name == normal(name)


@given(st.text(max_size=60))
def test_any_name_has_parts(name: str) -> None:
    parsed = parse_file_name(name)
    assert parsed.part >= 0 and parsed.quantization == normal(parsed.quantization)
