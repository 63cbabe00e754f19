"""The short form of `make fuzz`: whatever a file holds, a header or a refusal comes out, within bounds."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from skulk.errors import RequestError
from skulk.models.config_json import card_from_config, is_vision_config, read_config, read_index
from tests.support.hostile_gguf import Script, check, file_of, scripts, seeds


@settings(deadline=None, max_examples=100)
@given(script=scripts(), claimed_bytes=st.sampled_from([0, 0, 2**20, 2**40]))
def test_no_file_breaks_the_reader(script: Script, claimed_bytes: int) -> None:
    check(script, claimed_bytes)


def test_the_scripts_reach_sound_files_and_broken_ones() -> None:
    assert check((1, [], 0))
    assert not check((1, [(1, 16, 18)], 0)), "a count of 2**64 - 1 must be refused"
    assert file_of((0, [], 40)) == seeds()[0][:40]


NAMES = [
    "model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "vision_config",
    "text_config", "quantization", "bits", "architectures", "weight_map", "metadata", "total_size", "head_dim",
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


@contextlib.contextmanager
def refused_or_not() -> Generator[None]:
    """Lets the one refusal pass that is meant for broken files."""
    refusal: RequestError | None = None
    try:
        yield
    except RequestError as error:
        refusal = error
    assert refusal is None or refusal.code == "model_file_invalid"


@settings(deadline=None, max_examples=60)
@given(value=JSON | st.dictionaries(st.sampled_from(NAMES), JSON, max_size=8), raw=st.binary(max_size=20))
def test_no_configuration_breaks_its_readers(value: object, raw: bytes) -> None:
    for body in (msgspec.json.encode(value), raw):
        is_vision_config(body)
        with refused_or_not():
            card = card_from_config(read_config(body, "c"), model_id="org/m", files=())
            assert card.kv_bytes_per_token >= 0 and card.layers > 0
        with refused_or_not():
            assert all(name.endswith(".safetensors") and "/" not in name for name in read_index(body, "i").files)
