"""Sampling settled: defaults, ranges, seeds. Bad numbers reach no sampler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.engines.llama_cpp.sampling import METADATA_KEYS, Settled, SettledDry, key_of, model_defaults, settle
from skulk.errors import RequestError
from skulk.wire.generation import Sampling


def settled(asked: Sampling, defaults: Sampling | None = None, *, choice: int = 0) -> Settled:
    return settle(asked, defaults or Sampling(), vocabulary_size=100, window=50, choice=choice, fresh_seed=lambda: 7)


def test_what_is_omitted_is_openais_default() -> None:
    result = settled(Sampling())
    assert (result.temperature, result.top_k, result.top_p, result.min_p, result.typical_p) == (1.0, 0, 1.0, 0.0, 1.0)
    assert not result.has_penalties and result.logit_bias == () and result.key == key_of(7, 0)
    assert (result.mirostat, result.dry, result.has_xtc, result.is_greedy) == (0, None, False, False)
    assert result.top_n_sigma < 0


def test_the_models_own_comes_before_openais_and_after_the_asked() -> None:
    models = Sampling(temperature=0.6, top_k=20, top_p=0.95)
    result = settled(Sampling(top_p=0.5), models)
    assert (result.temperature, result.top_k, result.top_p) == (0.6, 20, 0.5)
    assert settled(Sampling(temperature=0.0), models).temperature == 0.0


@pytest.mark.parametrize(
    ("asked", "look_back", "has_penalties"),
    [
        (Sampling(repeat_penalty=1.1), 50, True),
        (Sampling(repeat_penalty=1.1, repeat_last_n=8), 8, True),
        (Sampling(repeat_penalty=1.1, repeat_last_n=0), 0, False),
        (Sampling(presence_penalty=0.5), 50, True),
        (Sampling(frequency_penalty=0.5, repeat_last_n=-1), 50, True),
        (Sampling(repeat_last_n=10), 10, False),
    ],
)
def test_how_far_penalties_look_back(asked: Sampling, look_back: int, has_penalties: bool) -> None:
    result = settled(asked)
    assert (result.look_back, result.has_penalties) == (look_back, has_penalties)


def test_a_repeat_penalty_looks_back_64_in_a_longer_window() -> None:
    wide = settle(Sampling(repeat_penalty=1.2), Sampling(), vocabulary_size=100, window=1000, choice=0)
    assert wide.look_back == 64


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 1.5},
        {"top_p": -1.0},
        {"min_p": 2.0},
        {"typical_p": -0.5},
        {"top_k": -2},
        {"top_k": 2**31},
        {"repeat_penalty": 0.0},
        {"repeat_last_n": -5},
        {"presence_penalty": 1e300},
        {"frequency_penalty": -math.inf},
        {"top_n_sigma": -1.5},
        {"xtc_probability": 1.01},
        {"xtc_probability": math.nan},
        {"xtc_threshold": -0.1},
        {"mirostat": 3},
        {"mirostat": -1},
        {"mirostat_tau": math.inf},
        {"mirostat_tau": -1.0},
        {"mirostat_eta": 1.5},
        {"dry_multiplier": -0.5},
        {"dry_multiplier": 1e30},
        {"dry_base": 0.5},
        {"dry_base": math.nan},
        {"dry_allowed_length": -1},
        {"dry_allowed_length": 2**31},
        {"dry_penalty_last_n": -2},
        {"dry_penalty_last_n": 2**31},
        {"dry_sequence_breakers": ()},
        {"dry_sequence_breakers": ("",)},
        {"dry_sequence_breakers": ("é" * 21,)},
        {"dry_sequence_breakers": ("x",) * 17},
        {"logit_bias": {100: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: 1e30}},
        {"logit_bias": dict.fromkeys(range(5000), 0.0)},
        {"grammar": "#" * 65_537},
    ],
)
def test_values_out_of_range_name_their_field(wrong: Mapping[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        settled(Sampling(**wrong))
    [field] = wrong
    assert caught.value.code == "invalid_request" and caught.value.param == field and field in caught.value.detail


@pytest.mark.parametrize(("asked", "top_k"), [(0, 0), (-1, 0), (5, 5), (10_000, 100)])
def test_top_k(asked: int, top_k: int) -> None:
    assert settled(Sampling(top_k=asked)).top_k == top_k


def test_biases_are_in_the_order_of_tokens() -> None:
    assert settled(Sampling(logit_bias={5: -100.0, 2: 1.0})).logit_bias == ((2, 1.0), (5, -100.0))


@given(st.integers(-(2**70), 2**70), st.integers(0, 20))
def test_a_key_is_64_bits(seed: int, choice: int) -> None:
    assert 0 <= key_of(seed, choice) < 2**64


def test_every_seed_and_choice_has_a_key_of_its_own() -> None:
    keys = {settled(Sampling(seed=seed), choice=choice).key for seed in (0, 1, 42, -1, 2**32) for choice in range(10)}
    assert len(keys) == 50
    assert settled(Sampling(seed=42)).key == settled(Sampling(seed=42)).key


def test_an_omitted_seed_is_a_fresh_one() -> None:
    def drawn() -> int:
        return settle(Sampling(), Sampling(), vocabulary_size=10, window=10, choice=0).key

    assert drawn() != drawn()


def test_a_temperature_that_is_next_to_nothing_is_greedy() -> None:
    assert settled(Sampling(temperature=1e-9)).is_greedy
    assert not settled(Sampling(temperature=1e-3)).is_greedy


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (Sampling(dry_base=2.0), None),
        (Sampling(dry_multiplier=0.8, dry_penalty_last_n=0), None),
        (
            Sampling(dry_multiplier=0.8),
            SettledDry(multiplier=0.8, base=1.75, allowed=2, look_back=50, breakers=("\n", ":", '"', "*")),
        ),
        (
            Sampling(
                dry_multiplier=1.0,
                dry_base=2.0,
                dry_allowed_length=5,
                dry_penalty_last_n=7,
                dry_sequence_breakers=("x", "yz"),
            ),
            SettledDry(multiplier=1.0, base=2.0, allowed=5, look_back=7, breakers=("x", "yz")),
        ),
        (
            Sampling(dry_multiplier=1.0, dry_penalty_last_n=-1, dry_sequence_breakers=("x",)),
            SettledDry(multiplier=1.0, base=1.75, allowed=2, look_back=50, breakers=("x",)),
        ),
    ],
)
def test_dry_is_off_or_whole(asked: Sampling, expected: SettledDry | None) -> None:
    assert settled(asked).dry == expected


def test_xtc_is_off_above_half() -> None:
    assert settled(Sampling(xtc_probability=0.5)).has_xtc
    assert not settled(Sampling(xtc_probability=0.5, xtc_threshold=0.6)).has_xtc
    assert not settled(Sampling(xtc_threshold=0.1)).has_xtc


def test_the_models_defaults_come_from_its_metadata(caplog: pytest.LogCaptureFixture) -> None:
    metadata = {
        "general.sampling.temp": "0.600000",
        "general.sampling.top_k": "20",
        "general.sampling.top_p": "7",
        "general.sampling.min_p": "nonsense",
        "general.sampling.penalty_last_n": "64",
        "general.sampling.mirostat": "2",
        "general.sampling.xtc_threshold": "0.2",
    }
    expected = Sampling(temperature=0.6, top_k=20, repeat_last_n=64, mirostat=2, xtc_threshold=0.2)
    assert model_defaults(metadata.get) == expected
    assert caplog.text.count("is ignored") == 2


def test_every_key_of_a_file_is_read(caplog: pytest.LogCaptureFixture) -> None:
    found = model_defaults(dict.fromkeys(METADATA_KEYS, "1").get)
    assert all(getattr(found, field) == 1 for field in METADATA_KEYS.values())
    assert not caplog.text
    model_defaults({"general.sampling.sequence": "top_k;temperature"}.get)
    assert "general.sampling.sequence is not followed" in caplog.text
