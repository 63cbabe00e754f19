"""Cards: what is computed from a header, and what a TOML card may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from skulk.errors import RequestError
from skulk.models.card import GGUF_BACKENDS, CardFile, card_from_gguf, read_card
from skulk.models.gguf import GgufHeader, read_header
from skulk.wire.model import ModelCard, ModelFile
from tests.support.gguf import TENSORS, U64, Tensor, gguf_bytes, llama_metadata


def header_of(metadata: dict[str, Any], tensors: tuple[Tensor, ...] = TENSORS) -> GgufHeader:
    body = gguf_bytes(metadata, tensors)
    return read_header(lambda offset, length: body[offset : offset + length], len(body), "m.gguf")


def card_of(*headers: GgufHeader, name: str = "m.Q8_0.gguf") -> ModelCard:
    files = [ModelFile(name=name, size_bytes=1000)] * len(headers)
    return card_from_gguf(headers, model_id="org/m", files=files, source="here")


def test_a_card_of_a_plain_header() -> None:
    card = card_of(header_of(llama_metadata()))
    assert card == ModelCard(
        model_id="org/m",
        name="Tiny Llama",
        family="llama",
        backends=("llama_cpp-vulkan", "llama_cpp-rocm", "llama_cpp-cuda", "llama_cpp-cpu"),
        files=(ModelFile(name="m.Q8_0.gguf", size_bytes=1000),),
        quantization="Q8_0",
        context_length=2048,
        weights_bytes=64 * 100 // 32 * 20 + 64 * 4,
        kv_bytes_per_token=4 * 2 * (8 + 8) * 2,
        layers=4,
        embedding_length=64,
        vocabulary_size=100,
        license="mit",
        source="here",
    )


@pytest.mark.parametrize(
    ("changes", "every_token", "window"),
    [
        ({}, 4 * 64, 0),
        ({"sliding_window": 512}, 4 * 64, 0),  # which layers is not known: all keep everything
        ({"sliding_window": 512, "sliding_window_pattern": 2}, 4 * 64, 2 * 64),
        ({"sliding_window": 512, "sliding_window_pattern": 1}, 4 * 64, 0),
        ({"sliding_window": 512, "sliding_window_pattern": -3}, 4 * 64, 0),
        ({"sliding_window": 512, "sliding_window_pattern": [1, 1, 1, 0]}, 4 * 64, 3 * 64),
        ({"sliding_window": 512, "sliding_window_pattern": [1, 1]}, 4 * 64, 0),
        ({"sliding_window_pattern": 2}, 4 * 64, 0),
        ({"sliding_window": 512, "sliding_window_pattern": 2, "key_length_swa": 4}, 2 * 64 + 2 * 48, 2 * 48),
    ],
)
def test_layers_with_a_window_are_told_apart(changes: dict[str, Any], every_token: int, window: int) -> None:
    own = {f"llama__attention__{key}": value for key, value in changes.items()}
    card = card_of(header_of(llama_metadata(**own)))
    assert card.kv_bytes_per_token == every_token
    assert card.window_kv_bytes_per_token == window
    assert card.window == (512 if window else 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0),
        ({"feed_forward_length": 256}, 3 * 256 + 4 * 64),
        ({"feed_forward_length": [128, 256, 256, 128]}, 3 * 256 + 4 * 64),
        ({"expert_used_count": 8, "expert_feed_forward_length": 32}, 6 * 8 * 32 + 4 * 64),
        ({"expert_used_count": 8, "expert_feed_forward_length": 8}, 2 * 8 * (64 + 8)),
        ({"expert_used_count": 2, "feed_forward_length": 256}, 6 * 512 + 4 * 64),
        ({"ssm__inner_size": 128}, 4 * 64 + 3 * 128),
    ],
)
def test_activations_of_one_row(changes: dict[str, Any], expected: int) -> None:
    own = {f"llama__{key}": value for key, value in changes.items()}
    assert card_of(header_of(llama_metadata(**own))).activations == expected


def test_the_file_type_names_the_quantization_where_the_name_does_not() -> None:
    assert card_of(header_of(llama_metadata()), name="model.gguf").quantization == "Q4_1"
    assert card_of(header_of(llama_metadata(general__file_type=999)), name="model.gguf").quantization == ""


def test_weights_of_all_parts_count() -> None:
    second = header_of({"split.no": 1}, (Tensor("blk.0", (32, 10), 8),))
    first = header_of(llama_metadata())
    assert card_of(first, second).weights_bytes == first.weights_bytes + 10 * 34


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 4 * 2 * 16 * 2),
        ({"llama__attention__head_count_kv": None}, 4 * 8 * 16 * 2),
        ({"llama__attention__head_count_kv": [2, 0, 4, 0]}, 6 * 16 * 2),
        ({"llama__attention__head_count": [8, 8, 16, 16]}, 4 * 2 * (4 + 4) * 2),
        ({"llama__attention__key_length": 128}, 4 * 2 * (128 + 8) * 2),
        ({"llama__attention__key_length": 128, "llama__attention__value_length": 64}, 4 * 2 * 192 * 2),
        ({"llama__full_attention_interval": 4}, 1 * 2 * 16 * 2),
        ({"llama__attention__head_count": None, "llama__attention__head_count_kv": None}, 0),
    ],
)
def test_kv_bytes_per_token(changes: dict[str, Any], expected: int) -> None:
    assert card_of(header_of(llama_metadata(**changes))).kv_bytes_per_token == expected


def test_recurrent_state_counts_only_the_recurrent_layers() -> None:
    ssm = {"llama__ssm__inner_size": 64, "llama__ssm__state_size": 16, "llama__ssm__conv_kernel": 4}
    per_layer = (3 * 64 + 16 * 64) * 4
    everywhere = card_of(header_of(llama_metadata(**ssm)))
    assert everywhere.recurrent_bytes == 4 * per_layer
    hybrid = card_of(header_of(llama_metadata(**ssm, llama__attention__head_count_kv=[0, 0, 0, 2])))
    assert hybrid.recurrent_bytes == 3 * per_layer
    interval = card_of(header_of(llama_metadata(**ssm, llama__full_attention_interval=4)))
    assert interval.recurrent_bytes == 3 * per_layer
    assert "recurrent" in hybrid.tags


def test_tags_tell_what_needs_care() -> None:
    card = card_of(header_of(llama_metadata(tokenizer__chat_template=None, llama__attention__sliding_window=512)))
    assert card.tags == ("no-chat-template", "sliding-window-512")


def test_the_vocabulary_is_counted_where_its_size_is_not_said() -> None:
    header = header_of(llama_metadata(llama__vocab_size=None) | {"tokenizer.ggml.tokens": ["x"] * 300})
    assert card_of(header).vocabulary_size == 300


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general__architecture": None}, "architecture"),
        ({"general__architecture": "clip"}, "projector"),
        ({"general__architecture": "t5encoder"}, "encoder"),
        ({"llama__block_count": None}, "layers and context length"),
        ({"llama__context_length": 0}, "layers and context length"),
        ({"llama__attention__head_count_kv": U64(2**64 - 1)}, "impossible sizes"),
        ({"llama__context_length": U64(2**63)}, "impossible sizes"),
    ],
)
def test_headers_that_make_no_card(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        card_of(header_of(llama_metadata(**changes)))
    assert caught.value.code == "model_file_invalid"


@pytest.mark.parametrize(
    "changes",
    [
        {"general.architecture": "bert", "bert.block_count": 6, "bert.context_length": 512},
        {"llama.pooling_type": 1},
    ],
)
def test_a_model_that_answers_with_vectors_is_known_as_one(changes: dict[str, Any]) -> None:
    card = card_of(header_of(llama_metadata() | changes))
    assert (card.tasks, card.capabilities) == (("TextEmbedding",), ("embedding",))


def test_a_model_that_answers_with_text_is_none_of_them() -> None:
    card = card_of(header_of(llama_metadata() | {"llama.pooling_type": 0}))
    assert (card.tasks, card.capabilities) == (("TextGeneration",), ("text",))


CARD = """
model_id = "org/m"
name = "M"
family = "llama"
backends = ["fake-cpu"]
context_length = 100
weights_bytes = 10
kv_bytes_per_token = 2

[[files]]
name = "m.json"
size_bytes = 3
"""


def test_a_toml_card(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(CARD)
    read = read_card(path)
    assert isinstance(read, CardFile)
    card = read.to_card()
    assert (card.model_id, card.backends, card.context_length) == ("org/m", ("fake-cpu",), 100)
    assert card.files == (ModelFile(name="m.json", size_bytes=3),)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model_id = [", "not valid"),
        ("colour = 'red'\n" + CARD, "colour"),
        (CARD.replace('name = "M"', ""), "name"),
        (CARD.replace("context_length = 100", "context_length = 0"), "context_length"),
        (CARD.replace('["fake-cpu"]', "[]"), "backend"),
        (CARD.replace("m.json", "../../etc/passwd"), "leaves its folder"),
        (CARD.replace("m.json", "/etc/passwd"), "leaves its folder"),
        (CARD + "#" * 300_000, "at most"),
    ],
)
def test_bad_cards_get_a_sentence(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "m.toml"
    path.write_text(text)
    with pytest.raises(RequestError, match=says) as caught:
        read_card(path)
    assert str(path) in caught.value.detail


def test_a_card_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="can't be read"):
        read_card(tmp_path / "none.toml")


def test_the_backends_are_ranked_as_the_spec_says() -> None:
    assert [backend.partition("-")[2] for backend in GGUF_BACKENDS] == ["vulkan", "rocm", "cuda", "cpu"]
