"""The contract's files as tests read them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
SUBJECTS = ROOT / "subjects"
EXAMPLES = sorted((SUBJECTS / "examples").glob("*.json"))


def toml(name: str) -> dict[str, Any]:
    return tomllib.loads((SUBJECTS / name).read_text())


def message_of(example: Path) -> str:
    """The message type that an example is of: ``Chunk`` for ``Chunk.end.json``."""
    return example.name.split(".")[0]
