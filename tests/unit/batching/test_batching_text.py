"""Token logs, bytes to text, stop strings: the same whatever the cuts."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.batching.stops import scan
from skulk.batching.text import decode_bytes, flush_bytes
from skulk.batching.tokens import BLOCK, TokenLog

CUTS = st.lists(st.integers(0, 60), max_size=12)


def cut(whole: str | bytes, cuts: list[int]) -> list[str | bytes]:
    places = sorted({0, len(whole), *(place for place in cuts if place < len(whole))})
    return [whole[start:stop] for start, stop in pairwise(places)]


def decode_parts(parts: list[bytes]) -> str:
    text, held = "", b""
    for part in parts:
        new, held = decode_bytes(held, part)
        assert len(held) <= 3
        text += new
    return text + flush_bytes(held)


@pytest.mark.parametrize("text", ["plain", "é", "日本語", "👩‍👩‍👧 ok", "a\u0000b", "\ufffd"])
def test_a_text_cut_at_every_byte_is_whole_again(text: str) -> None:
    encoded = text.encode()
    for place in range(len(encoded) + 1):
        assert decode_parts([encoded[:place], encoded[place:]]) == text
    assert decode_parts([bytes([byte]) for byte in encoded]) == text


@given(st.binary(max_size=60), CUTS)
def test_any_bytes_in_any_cut_decode_as_the_whole_does(data: bytes, cuts: list[int]) -> None:
    assert decode_parts(cut(data, cuts)) == data.decode("utf-8", "replace")  # type: ignore[arg-type]


@given(st.text(max_size=30))
def test_no_character_waits_longer_than_its_last_byte(text: str) -> None:
    done, held = "", b""
    for character in text:
        encoded = character.encode("utf-8", "surrogatepass").decode("utf-8", "replace").encode()
        for byte in encoded[:-1]:
            new, held = decode_bytes(held, bytes([byte]))
            assert new == ""
        new, held = decode_bytes(held, encoded[-1:])
        assert held == b""
        done += new
    assert done == text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def naive(stops: tuple[str, ...], text: str) -> tuple[str, bool]:
    """What the first complete stop string leaves of the whole text, character by character."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def scan_parts(stops: tuple[str, ...], parts: list[str]) -> tuple[str, bool]:
    text, held = "", ""
    for part in parts:
        new, held, is_stopped = scan(stops, held, part)
        text += new
        if is_stopped:
            return text, True
    return text + held, False


@given(
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=4).map(tuple),
    st.text("abc", max_size=60),
    CUTS,
)
def test_stop_strings_equal_the_naive_search_in_any_cut(stops: tuple[str, ...], text: str, cuts: list[int]) -> None:
    assert scan_parts(stops, cut(text, cuts)) == naive(stops, text)  # type: ignore[arg-type]


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3).map(tuple), st.text("abx", max_size=40))
def test_only_what_may_become_a_stop_string_is_held(stops: tuple[str, ...], text: str) -> None:
    held = ""
    for character in text:
        _, held, is_stopped = scan(stops, held, character)
        if is_stopped:
            return
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_of_two_stops_that_end_together_the_longer_counts() -> None:
    assert scan(("bc", "abc"), "", "xabcx") == ("x", "", True)


def test_a_stop_that_is_complete_first_wins_over_one_that_began_first() -> None:
    assert scan_parts(("abcd", "bc"), ["a", "b", "c", "d"]) == ("a", True)


def test_without_stops_nothing_is_held() -> None:
    assert scan((), "", "text") == ("text", "", False)


@given(st.integers(0, 3 * BLOCK), st.lists(st.integers(0, 40) | st.integers(0, 2 * BLOCK), max_size=9), st.data())
def test_a_token_log_is_a_list(start: int, more: list[int], data: st.DataObject) -> None:
    ids = list(range(start + sum(more)))
    log = TokenLog.of(ids[:start])
    for count in more:
        log = log.extended(tuple(ids[log.count : log.count + count]))
    assert log == TokenLog.of(ids)
    assert len(log) == len(ids)
    assert all(len(block) == BLOCK for block in log.blocks)
    first = data.draw(st.integers(0, len(ids)))
    last = data.draw(st.integers(first, len(ids)))
    assert log.slice(first, last) == tuple(ids[first:last])
