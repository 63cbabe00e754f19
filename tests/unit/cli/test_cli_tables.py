"""Tables, and texts that can't drive a terminal."""

from __future__ import annotations

import msgspec
import pytest

from skulk.cli.context import Column, printable, printable_stream, render_table


class Row(msgspec.Struct):
    name: str
    size: int


COLUMNS = (Column[Row]("NAME", lambda row: row.name), Column[Row]("SIZE", lambda row: str(row.size or "")))


def test_columns_are_as_wide_as_they_must_be_and_no_line_ends_in_space():
    assert render_table(COLUMNS, [Row("a", 1), Row("longer", 22222)]) == "NAME    SIZE\na       1\nlonger  22222\n"


def test_what_is_not_there_is_a_dash():
    assert render_table(COLUMNS, [Row("", 0)]) == "NAME  SIZE\n-     -\n"


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "a\x9bb", "a\u202eb", "\udc80"])
def test_no_control_character_passes(text: str):
    assert printable(text).isprintable()
    assert len(printable(text)) == len(text)


def test_running_text_keeps_its_lines_but_drives_no_terminal():
    assert printable_stream("a\n\tb\x1b]0;x\x07\r é 👩\u200d🚀") == "a\n\tb?]0;x?? é 👩\u200d🚀"
