"""What a slow reader is behind with: nothing lost, nothing out of order, and no more than its text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from skulk.bus.joining import KEPT, KEPT_BEHIND, Pending
from skulk.wire.generation import Chunk, StreamEnd

CHOICES = 3


def chunk(seq: int, choice: int = 0, text: str = "", *, is_last: bool = False, finishes: bool = False) -> Chunk:
    return Chunk(
        request_id="r",
        attempt=1,
        seq=seq,
        runner_id="i-1",
        choice=choice,
        text=text,
        tokens=(seq,),
        finish_reason="stop" if finishes else None,
        end=StreamEnd(reason="stop") if is_last else None,
    )


@given(
    st.lists(st.tuples(st.integers(0, CHOICES - 1), st.text(max_size=4)), min_size=1, max_size=300),
    st.sets(st.integers(0, 300)),
    st.sets(st.integers(0, 300)),
)
def test_however_late_the_reader_is_it_reads_the_same(
    sent: list[tuple[int, str]], taken_after: set[int], turns: set[int]
) -> None:
    pending = Pending()
    read: list[Chunk] = []
    for seq, (choice, text) in enumerate(sent):
        pending.is_behind ^= seq in turns
        pending.add(chunk(seq, choice, text, is_last=seq == len(sent) - 1))
        if seq in taken_after:
            read += pending.take()
    read += pending.take()
    for choice in range(CHOICES):
        own = [one for one in read if one.choice == choice]
        assert "".join(one.text for one in own) == "".join(text for at, text in sent if at == choice)
        assert [token for one in own for token in one.tokens] == [
            seq for seq, (at, _) in enumerate(sent) if at == choice
        ]
    assert [one.end is not None for one in read] == [False] * (len(read) - 1) + [True]
    assert not pending
    assert pending.size_bytes == 0


def test_who_reads_in_time_sees_every_token_and_who_does_not_sees_one_delta_a_choice() -> None:
    pending = Pending()
    for seq in range(KEPT):
        pending.add(chunk(seq, text="x"))
    assert len(pending.take()) == KEPT
    pending.is_behind = True
    for seq in range(50_000):
        pending.add(chunk(seq, choice=seq % 2, text="y", finishes=seq >= 49_998))
    assert pending.size_bytes < 50_000 * 6 + KEPT_BEHIND * 100
    read = pending.take()
    assert len(read) == KEPT_BEHIND + 2
    assert [one.finish_reason for one in read[-2:]] == ["stop", "stop"]
