"""Server-sent events in any pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.cli.sse import LIMIT_BYTES, SseParser

STREAM = (
    ': command_id 7\n\ndata: {"a":"é"}\n\n: keep-alive\n\n'
    "event: x\r\ndata: one\r\ndata:  two\r\n\r\nid: 3\n\ndata: [DONE]\n\n"
)
EVENTS = ['{"a":"é"}', "one\n two", "[DONE]"]


@given(st.lists(st.integers(0, len(STREAM.encode())), max_size=12))
def test_the_events_are_the_same_however_they_are_cut(cuts: list[int]):
    body, parser = STREAM.encode(), SseParser()
    edges = [0, *sorted(cuts), len(body)]
    events = [event for start, end in pairwise(edges) for event in parser.feed(body[start:end])]
    assert events == EVENTS


def test_an_event_without_its_end_is_not_told():
    parser = SseParser()
    assert parser.feed(b"data: half\n") == []
    assert parser.feed(b"\n") == ["half"]


def test_bytes_that_are_no_utf8_do_not_end_the_stream():
    assert SseParser().feed(b"data: \xff\n\n") == ["\ufffd"]


def test_an_event_without_bound_is_refused():
    parser = SseParser()
    with pytest.raises(ValueError, match="over 16777216 bytes"):
        for _ in range(LIMIT_BYTES // 2**20 + 1):
            parser.feed(b"data: " + b"x" * 2**20)
