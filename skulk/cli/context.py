"""What every command is given, and how it says things."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from skulk.settings import Settings
from skulk.settings_load import LoadedSettings

Row = TypeVar("Row", bound=msgspec.Struct)


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """One call of a command.

    Attributes:
        arguments: as argparse read them.
        loaded: the settings with their sources.
        environ: the environment, for child processes.
        is_json: ``--json`` was given.
    """

    arguments: argparse.Namespace
    loaded: LoadedSettings
    environ: Mapping[str, str]
    is_json: bool = False

    @property
    def settings(self) -> Settings:
        return self.loaded.settings


class Column(msgspec.Struct, Generic[Row], frozen=True):
    """One column of a table: its title and how a row fills it."""

    title: str
    cell: Callable[[Row], str]


def render_table(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> str:
    """Left-aligned columns, two spaces apart, under their titles; no space at the ends of lines."""
    cells = [[column.title for column in columns]]
    cells += [[printable(column.cell(row)) or "-" for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in cells
    )


def print_rows(context: Context, columns: Sequence[Column[Row]], rows: Sequence[Row], *, empty: str) -> None:
    """The rows as a table, or with ``--json`` as an array of objects; where there is none, ``empty`` on stderr."""
    if context.is_json:
        print_json([msgspec.to_builtins(row) for row in rows])
    elif rows:
        sys.stdout.write(render_table(columns, rows))
    else:
        note(empty)


def print_json(value: Any) -> None:
    """A value as indented JSON."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def note(sentence: str) -> None:
    """A line beside the answer, on stderr."""
    sys.stderr.write(f"skulk: {printable(sentence)}\n")
    sys.stderr.flush()


def printable(text: str) -> str:
    """Text that can't drive a terminal or break a table: control characters become ``?``."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def printable_stream(text: str) -> str:
    """As `printable`, for running text: line ends, tabs and joiners stay."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t\u200d\u200c\xa0\u3000" else "?" for char in text)
