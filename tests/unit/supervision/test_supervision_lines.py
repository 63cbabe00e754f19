"""Cutting output into lines, and keeping them in a bounded file."""

from __future__ import annotations

import errno
import os
import stat
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.supervision.lines import CUT_MARK, LineSplitter
from skulk.supervision.log_file import RotatedLog


def split_all(parts: list[bytes], limit: int = 100) -> list[bytes]:
    splitter = LineSplitter(limit)
    return [line for part in parts for line in splitter.feed(part)] + splitter.flush()


@given(text=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=10))
def test_where_the_parts_are_cut_does_not_matter(text: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[start:end] for start, end in pairwise(edges)]
    assert split_all(parts) == split_all([text])


@given(text=st.binary(max_size=300))
def test_short_lines_come_out_as_they_went_in(text: bytes) -> None:
    lines = text.split(b"\n")
    want = [line.removesuffix(b"\r") for line in lines]
    assert split_all([text], limit=1_000) == (want if lines[-1] else want[:-1])


@given(parts=st.lists(st.binary(max_size=50), max_size=20), limit=st.integers(1, 20))
def test_no_line_is_longer_than_the_limit_and_its_mark(parts: list[bytes], limit: int) -> None:
    assert all(len(line) <= limit + len(CUT_MARK) for line in split_all(parts, limit))


def test_a_cut_line_says_so_and_the_next_one_is_whole() -> None:
    assert split_all([b"abcdef", b"gh\nok\n"], limit=4) == [b"abcd [cut]", b"ok"]


def test_an_unfinished_line_is_not_lost_and_an_empty_one_not_invented() -> None:
    assert split_all([b"a\n\nb"]) == [b"a", b"", b"b"]
    assert split_all([b"a\r\n"]) == [b"a"]


@given(sizes=st.lists(st.integers(0, 40), max_size=60), limit=st.integers(100, 400))
def test_log_and_its_predecessor_stay_within_their_room(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "child.log"
    log, lines = RotatedLog(path, limit), [b"x" * size for size in sizes]
    for line in lines:
        log.write(line)
    log.close()
    older = path.with_name("child.log.1")
    kept = b"".join(file.read_bytes() for file in (older, path) if file.exists())
    assert len(kept) <= limit
    written = b"".join(line + b"\n" for line in lines)
    assert written.endswith(kept) and (kept or not lines)


def test_a_log_goes_on_where_the_last_process_ended(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "child.log"
    for word in (b"one", b"two", b"three"):
        log = RotatedLog(path, 16)
        log.write(word)
        log.close()
    assert path.read_bytes() == b"three\n"
    assert path.with_name("child.log.1").read_bytes() == b"one\ntwo\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_log_on_a_full_disk_counts_what_it_loses_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, real_write = RotatedLog(tmp_path / "child.log", 1_000), os.write

    def full(file: int, body: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log.write(b"before")
    monkeypatch.setattr(os, "write", full)
    log.write(b"lost")
    monkeypatch.setattr(os, "write", real_write)
    log.write(b"after")
    log.close()
    assert (tmp_path / "child.log").read_bytes() == b"before\nafter\n"
    assert log.dropped == 1
