"""Penalties against their definitions, and what they remember against being told everything anew."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.engines.llama_cpp.breakers import BreakerIndex, Breakers
from skulk.engines.llama_cpp.penalties import Biases, Dry, Penalties

VOCABULARY = 12
ROW = np.linspace(-3, 3, VOCABULARY).astype(np.float32)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=40)
FEW_TOKENS = st.lists(st.integers(0, 3), max_size=40)


def edited(edit: Biases | Penalties | Dry) -> np.ndarray:
    row = ROW.copy()
    edit.apply(row)
    return row


def test_biases_are_added_and_ban() -> None:
    row = edited(Biases([(0, 2.5), (3, -np.inf), (11, -100.0)]))
    assert (row[0], row[3], row[11]) == (ROW[0] + np.float32(2.5), -np.inf, ROW[11] - np.float32(100))
    assert np.array_equal(np.delete(row, [0, 3, 11]), np.delete(ROW, [0, 3, 11]))


def penalised(tokens: Sequence[int], look_back: int, repeat: float, frequency: float, presence: float) -> np.ndarray:
    row = ROW.astype(np.float64)
    recent = tokens[-look_back:]
    for token, count in Counter(recent).items():
        row[token] = row[token] * repeat if row[token] <= 0 else row[token] / repeat
        row[token] -= count * frequency + presence
    return row


@given(TOKENS, TOKENS, st.integers(1, 50), st.sampled_from([(1.3, 0.0, 0.0), (1.0, 0.5, -0.25), (0.5, -0.1, 2.0)]))
def test_penalties_regard_the_window_of_history_and_answer(
    history: list[int], answer: list[int], look_back: int, values: tuple[float, float, float]
) -> None:
    repeat, frequency, presence = values
    penalties = Penalties(history, look_back=look_back, repeat=repeat, frequency=frequency, presence=presence)
    for token in answer:
        penalties.accept(token)
    expected = penalised([*history, *answer], look_back, repeat, frequency, presence)
    np.testing.assert_allclose(edited(penalties), expected, rtol=1e-5, atol=1e-5)


def test_many_different_tokens_are_remembered() -> None:
    """More than any first guess of the arrays' size."""
    row = np.zeros(1000, dtype=np.float32)
    penalties = Penalties((), look_back=1000, repeat=1.0, frequency=1.0, presence=0.0)
    for token in range(0, 1000, 2):
        penalties.accept(token)
    penalties.apply(row)
    assert row.tolist() == [-1.0, 0.0] * 500


def breakers_of(tails: dict[int, set[tuple[int, ...]]]) -> Breakers:
    return Breakers(tails, VOCABULARY)


def repetitions(tokens: Sequence[int], breakers: dict[int, set[tuple[int, ...]]], allowed: int) -> dict[int, int]:
    """By token that would go on with a repetition: how long the longest is; straight from the description."""
    limit = len(tokens)
    for place in range(len(tokens) - 1, -1, -1):
        rest = list(tokens[place + 1 :])
        matching = [tail for tail in breakers.get(tokens[place], ()) if rest[: len(tail)] == list(tail)]
        if matching:
            limit = len(rest) - max(map(len, matching))
            break
    if limit < allowed or len(tokens) <= allowed:
        return {}
    found: dict[int, int] = {}
    for end in range(len(tokens) - 1):
        length = 0
        while length <= end and tokens[end - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        length = min(length, limit)
        token = tokens[end + 1]
        if length >= allowed and () not in breakers.get(token, ()):
            found[token] = max(found.get(token, 0), length)
    return found


@given(
    FEW_TOKENS,
    FEW_TOKENS,
    st.integers(1, 50),
    st.integers(0, 4),
    st.sampled_from([{}, {3: {()}}, {2: {(3,)}}, {0: {(), (1, 1)}, 2: {(0, 0), (1,)}}]),
)
def test_dry_charges_what_makes_a_repetition_longer(
    history: list[int], answer: list[int], look_back: int, allowed: int, tails: dict[int, set[tuple[int, ...]]]
) -> None:
    dry = Dry(history, look_back=look_back, multiplier=0.5, base=1.25, allowed=allowed, breakers=breakers_of(tails))
    for token in answer:
        dry.accept(token)
    expected = ROW.astype(np.float64)
    for token, length in repetitions([*history, *answer][-look_back:], tails, allowed).items():
        expected[token] -= 0.5 * 1.25 ** (length - allowed)
    np.testing.assert_allclose(edited(dry), expected, rtol=1e-5, atol=1e-5)


def test_the_longest_repetition_never_overflows() -> None:
    """`a a a …`: the exponent is cut where a float32 ends, and the multiplier may still make it infinite."""
    dry = Dry([1] * 400, look_back=400, multiplier=100.0, base=100.0, allowed=2, breakers=breakers_of({}))
    row = edited(dry)
    assert row[1] < -1e30 and not np.isnan(row).any()


PIECES = [b"a", b"ab", b"b", b"xab", b"\n", b" :", b"ba", b"", b"\xc3", b"\xa9", b"q\xc3", b"abc"]


def tokenise(body: bytes) -> tuple[int, ...]:
    """Byte by byte, where the vocabulary has the byte."""
    return tuple(PIECES.index(body[at : at + 1]) for at in range(len(body)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"\n", {4: {()}}),
        (b":", {5: {()}}),
        (b"ab", {1: {()}, 3: {()}, 11: {()}, 0: {(2,)}, 6: {(2,)}}),
        ("é".encode(), {8: {(9,)}, 10: {(9,)}}),
        (b"zz", {}),
    ],
)
def test_breakers_are_found_within_and_across_pieces(text: bytes, expected: dict[int, set[tuple[int, ...]]]) -> None:
    found = BreakerIndex(PIECES, tokenise).find([text])
    assert {token: set(tails) for token, tails in found._tails.items()} == expected


def test_a_text_across_the_border_of_two_pieces_is_no_breaker_by_itself() -> None:
    """The pieces stand side by side in the index: `a` `ab` holds `aa`, and no token does."""
    found = BreakerIndex(PIECES, tokenise).find([b"aa"])
    assert not any(() in tails for tails in found._tails.values())


def test_the_last_breaker_ends_the_search() -> None:
    breakers = breakers_of({4: {()}, 1: {(2, 3), (2,)}})
    assert breakers.distance(np.array([0, 4, 0, 0], dtype=np.int32)) == 2
    assert breakers.distance(np.array([0, 0, 5], dtype=np.int32)) == 3
    assert breakers.distance(np.array([4, 1, 2, 3, 0], dtype=np.int32)) == 1
    assert breakers.distance(np.array([4, 1, 2, 5, 0], dtype=np.int32)) == 2
    assert breakers.distance(np.array([4, 0, 1], dtype=np.int32)) == 2, "the tail isn't there yet"
