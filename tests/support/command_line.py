"""Calls of the command line: in this process for speed, in one of their own for signals and pipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from skulk.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


class Outcome(NamedTuple):
    """Exit status and what was written."""

    status: int
    out: str
    err: str


def caller(capsys: pytest.CaptureFixture[str], environ: Mapping[str, str]) -> Callable[..., Outcome]:
    """``call("ps", "--json")`` as if typed, with nothing but ``environ`` as its environment."""

    def call(*words: str, **more: str) -> Outcome:
        capsys.readouterr()
        try:
            status = main(words, {**environ, **more})
        except SystemExit as ended:
            status = int(ended.code or 0)
        written = capsys.readouterr()
        return Outcome(status, written.out, written.err)

    return call


def command(*words: str) -> list[str]:
    """The words as a command of its own process."""
    return [sys.executable, "-m", "skulk", *words]


def process_environ(home: Path, **more: Any) -> dict[str, str]:
    """The environment of such a process: ours without any ``SKULK_*``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SKULK_")}
    return {**kept, "PYTHONPATH": str(ROOT), "SKULK_HOME": str(home), **more}
