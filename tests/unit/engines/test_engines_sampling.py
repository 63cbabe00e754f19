"""Sampling settled: defaults, ranges, seeds. Native samplers abort on bad numbers, so each is checked here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.engines.llama_cpp.sampling import Settled, model_defaults, seed_of, settle
from skulk.errors import RequestError
from skulk.wire.generation import Sampling


def settled(asked: Sampling, defaults: Sampling | None = None, *, choice: int = 0) -> Settled:
    return settle(asked, defaults or Sampling(), vocabulary_size=100, window=50, choice=choice, fresh_seed=lambda: 7)


def test_what_is_omitted_is_openais_default() -> None:
    result = settled(Sampling())
    assert (result.temperature, result.top_k, result.top_p, result.min_p, result.typical_p) == (1.0, 0, 1.0, 0.0, 1.0)
    assert not result.has_penalties and result.logit_bias == () and result.seed == 7


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
        {"logit_bias": {100: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: math.nan}},
        {"logit_bias": {1: 1e30}},
        {"logit_bias": dict.fromkeys(range(5000), 0.0)},
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
def test_a_seed_is_32_bits_and_never_the_one_that_means_random(seed: int, choice: int) -> None:
    result = seed_of(seed, choice)
    assert 0 <= result < 0xFFFFFFFF
    assert result == seed_of(seed, choice)


def test_choices_of_one_seed_differ() -> None:
    assert seed_of(42, 0) == 42
    assert len({settled(Sampling(seed=42), choice=choice).seed for choice in range(10)}) == 10
    assert settled(Sampling(seed=43)).seed != settled(Sampling(seed=42), choice=1).seed


def test_the_models_defaults_come_from_its_metadata(caplog: pytest.LogCaptureFixture) -> None:
    metadata = {
        "general.sampling.temp": "0.600000",
        "general.sampling.top_k": "20",
        "general.sampling.top_p": "7",
        "general.sampling.min_p": "nonsense",
        "general.sampling.penalty_last_n": "64",
    }
    assert model_defaults(metadata.get) == Sampling(temperature=0.6, top_k=20, repeat_last_n=64)
    assert caplog.text.count("is ignored") == 2
