"""Marks of prompts and the filters that runners tell of them: what two prompts have in common, without a tokenizer."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skulk.placement.prefixes import (
    BLOCK_BYTES,
    MOST_DIGESTS,
    NO_PREFIX,
    TOKEN_BYTES,
    Prefix,
    filter_of,
    held_by,
    prefix_of,
)
from skulk.wire.generation import ChatMessage, ChatPrompt, InfillPrompt, TextPrompt, TokenPrompt

SYSTEM = ChatMessage(role="system", content="You answer like a pirate. " * 100)
QUESTION = ChatMessage(role="user", content="Where is the treasure? " * 20)
ANSWER = ChatMessage(role="assistant", content="Under the third palm tree. " * 10)
LONGEST = 683


def digests(prefix: Prefix) -> tuple[int, ...]:
    return tuple(mark.digest for mark in prefix.marks)


def shared(first: Prefix, second: Prefix) -> int:
    """Bytes that two prompts have in common by their marks."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first.marks, second.marks, strict=False))
    return max((mark.size_bytes for mark, _ in pairs), default=0)


def test_marks_stand_at_blocks_and_then_four_to_each_doubling() -> None:
    blocks = [mark.size_bytes // BLOCK_BYTES for mark in prefix_of(TextPrompt(text="x" * 64 * BLOCK_BYTES)).marks]
    assert blocks == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64]


def test_a_prompt_shorter_than_a_block_has_no_mark() -> None:
    assert prefix_of(TextPrompt(text="hello")) == Prefix(2, ())


def test_the_next_turn_of_a_conversation_begins_like_the_last_one() -> None:
    first = prefix_of(ChatPrompt(messages=(SYSTEM, QUESTION)))
    second = prefix_of(ChatPrompt(messages=(SYSTEM, QUESTION, ANSWER, QUESTION)))
    assert digests(second)[: len(first.marks)] == digests(first)
    assert held_by(filter_of(digests(first))).share_of(second) > 0.6


def test_other_tools_are_another_beginning() -> None:
    plain = prefix_of(ChatPrompt(messages=(SYSTEM,)))
    tools = prefix_of(ChatPrompt(messages=(SYSTEM,), variables={"tools": ["dig"]}))
    assert shared(plain, tools) == 0


def test_ids_and_gaps_have_marks_too() -> None:
    ids = tuple(range(1000))
    assert prefix_of(TokenPrompt(tokens=ids)).tokens == 1000
    assert shared(prefix_of(TokenPrompt(tokens=ids)), prefix_of(TokenPrompt(tokens=(*ids[:600], 7)))) == 8 * BLOCK_BYTES
    assert prefix_of(InfillPrompt(prefix="a" * 300, suffix="b")).marks


@given(st.binary(max_size=4000), st.binary(max_size=4000), st.binary(max_size=4000))
@settings(max_examples=100)
def test_marks_tell_four_fifths_of_what_is_common(beginning: bytes, one: bytes, other: bytes) -> None:
    texts = [(beginning + rest).decode("latin-1") for rest in (one, other)]
    marks = [prefix_of(TextPrompt(text=text)) for text in texts]
    encoded = [text.encode() for text in texts]
    common = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*encoded, strict=False))))
    found = shared(*marks)
    assert found <= common
    assert found >= 0.8 * (common - BLOCK_BYTES)


@given(st.integers(0, 600), st.integers(0, 2**32))
@settings(max_examples=50)
def test_a_filter_holds_what_it_was_given_and_is_bounded(count: int, salt: int) -> None:
    given_digests = [digests(prefix_of(TextPrompt(text=f"{salt} {number} " + "x" * 300)))[0] for number in range(count)]
    told = filter_of(given_digests)
    assert len(told) <= LONGEST
    held = held_by(told)
    assert all(digest in held for digest in given_digests[:MOST_DIGESTS])


def test_few_strangers_are_taken_for_known() -> None:
    def of(kind: str, number: int) -> int:
        return digests(prefix_of(TextPrompt(text=f"{kind} {number} " + "x" * 300)))[0]

    held = held_by(filter_of(of("known", number) for number in range(MOST_DIGESTS)))
    assert sum(of("strange", number) in held for number in range(2000)) < 60


def test_a_share_needs_every_mark_from_the_first_on() -> None:
    prefix = prefix_of(TextPrompt(text="".join(map(str, range(2000)))))
    assert held_by(filter_of(digests(prefix))).share_of(prefix) == prefix.marks[-1].size_bytes / (
        prefix.tokens * TOKEN_BYTES
    )
    assert held_by(filter_of(digests(prefix)[1:])).share_of(prefix) == 0.0
    assert held_by(filter_of(digests(prefix))).share_of(NO_PREFIX) == 0.0


@pytest.mark.parametrize("told", ["", "no base64!", "QUJD", "A" * 4000, "é"])
def test_a_filter_that_cant_be_read_holds_nothing(told: str) -> None:
    assert held_by(told).share_of(prefix_of(TextPrompt(text="x" * 1000))) == 0.0
