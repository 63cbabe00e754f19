"""The order of a stream's chunks, whatever is lost, doubled or shuffled on the way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from skulk.bus.sequence import HELD_LIMIT, StreamSequence
from skulk.wire.generation import Chunk
from tests.support.messages import chunk, stopped


def stream(count: int) -> list[Chunk]:
    """``count`` chunks, the last one terminal."""
    return [chunk(seq, f"t{seq} ", stopped() if seq == count - 1 else None) for seq in range(count)]


def test_in_order_each_is_ready_at_once() -> None:
    sequence = StreamSequence()
    chunks = stream(5)
    assert [sequence.feed(one) for one in chunks] == [[one] for one in chunks]
    assert sequence.has_ended
    assert sequence.missing_from is None


def test_a_hole_holds_what_is_behind_it() -> None:
    sequence = StreamSequence()
    first, lost, *behind = stream(5)
    assert sequence.feed(first) == [first]
    assert [sequence.feed(one) for one in behind] == [[], [], []]
    assert (sequence.next_seq, sequence.missing_from, sequence.has_ended) == (1, 1, False)
    assert sequence.feed(lost) == [lost, *behind]
    assert (sequence.missing_from, sequence.has_ended) == (None, True)


def test_a_lost_tail_shows_by_the_last_number() -> None:
    sequence = StreamSequence()
    chunks = stream(3)
    sequence.feed(chunks[0])
    assert sequence.missing_from is None
    sequence.note_last(2)
    assert sequence.missing_from == 1
    assert sequence.feed(chunks[1]) == [chunks[1]]
    assert sequence.missing_from == 2
    assert sequence.feed(chunks[2]) == [chunks[2]]
    assert sequence.missing_from is None


def test_after_the_terminal_chunk_nothing_comes() -> None:
    sequence = StreamSequence()
    for one in stream(2):
        sequence.feed(one)
    assert sequence.feed(chunk(2, "late")) == []
    sequence.note_last(7)
    assert sequence.missing_from is None


def test_chunks_behind_a_terminal_one_are_never_ready() -> None:
    """Not sent by any runner of ours; one that did would not make the stream end twice."""
    sequence = StreamSequence()
    first, last = stream(2)
    assert sequence.feed(chunk(2, "behind")) == []
    assert sequence.feed(last) == []
    assert sequence.feed(first) == [first, last]
    assert sequence.has_ended
    assert sequence.missing_from is None


def test_what_is_held_is_bounded_and_still_known_to_be_missing() -> None:
    sequence = StreamSequence()
    for seq in range(1, HELD_LIMIT + 11):
        assert sequence.feed(chunk(seq)) == []
    ready = sequence.feed(chunk(0))
    assert len(ready) == HELD_LIMIT + 1
    assert sequence.missing_from == HELD_LIMIT + 1


@st.composite
def disturbed(draw: st.DrawFn) -> tuple[list[Chunk], list[Chunk]]:
    """A stream, and what a bad network makes of it: lost, doubled, shuffled."""
    chunks = stream(draw(st.integers(1, 40)))
    copies = [one for one in chunks for _ in range(draw(st.sampled_from((1, 1, 1, 0, 2))))]
    return chunks, draw(st.permutations(copies))


@given(disturbed(), st.integers(1, 7))
def test_with_resends_every_chunk_comes_once_and_in_order(case: tuple[list[Chunk], list[Chunk]], batch: int) -> None:
    """Whatever came, asking for what is missing (in answers of a few chunks) brings exactly the stream."""
    chunks, arrived = case
    sequence = StreamSequence()
    out = [ready for one in arrived for ready in sequence.feed(one)]
    sequence.note_last(len(chunks) - 1)
    asked = 0
    while (start := sequence.missing_from) is not None:
        asked += 1
        out += [ready for one in chunks[start : start + batch] for ready in sequence.feed(one)]
        assert sequence.next_seq > start
    assert out == chunks
    assert sequence.has_ended
    assert asked <= len(chunks)
