"""Reads `requirements.lock`: its entries, and which of them a given set of extras needs.

One lock holds everything, so that two sets of versions can never disagree. What a person who only runs Skulk needs is
found by walking the lock's own `# via` notes upwards from the requirements that `pyproject.toml` names.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

ENTRY = re.compile(r"(?P<name>[a-z0-9][a-z0-9._-]*)==(?P<version>[^\s;\\]+)")


class Entry(NamedTuple):
    """One pinned distribution of the lock: its text, hashes included, and the names of those that asked for it."""

    name: str
    version: str
    text: str
    via: frozenset[str]


def normal_name(name: str) -> str:
    """The form in which the names of distributions are compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    """The distribution that a requirement such as `coverage[toml]>=7.6` names."""
    return normal_name(re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0])


def read_lock(path: Path) -> list[Entry]:
    """The entries of a lock in its own order; one distribution may stand there once for each range of Pythons."""
    entries: list[Entry] = []
    block: list[str] = []
    for line in [*path.read_text(encoding="utf-8").splitlines(), "end"]:
        if line[:1].isspace():
            block.append(line)
            continue
        if block and (match := ENTRY.match(block[0])):
            entries.append(Entry(normal_name(match["name"]), match["version"], "\n".join(block) + "\n", _via(block)))
        block = [line]
    return entries


def _via(block: list[str]) -> frozenset[str]:
    notes = (line.strip().removeprefix("#").strip().removeprefix("via").strip() for line in block if "#" in line)
    return frozenset(normal_name(note.split(" ")[0]) for note in notes if note)


def needed(entries: list[Entry], pyproject: Path, extras: frozenset[str]) -> list[Entry]:
    """The entries that the project with these extras or groups needs, the needs of needs included."""
    content: dict[str, Any] = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    optional: dict[str, list[str]] = content["project"]["optional-dependencies"] | content["dependency-groups"]
    asked: list[str] = list(content["project"]["dependencies"])
    for extra in sorted(extras):
        asked += optional[extra]
    names = {requirement_name(requirement) for requirement in asked}
    while True:
        more = {entry.name for entry in entries if entry.via & names} - names
        if not more:
            return [entry for entry in entries if entry.name in names]
        names |= more


def select(entries: list[Entry], names: frozenset[str]) -> list[Entry]:
    """The entries with these names."""
    return [entry for entry in entries if entry.name in names]


def tested_range(pyproject: Path, name: str) -> tuple[str, str]:
    """The lower (included) and upper (excluded) bound that the project states for a distribution of its groups."""
    groups: dict[str, list[str]] = tomllib.loads(pyproject.read_text(encoding="utf-8"))["dependency-groups"]
    for requirement in (requirement for group in groups.values() for requirement in group):
        if requirement_name(requirement) == name:
            low, high = re.search(r">=([\d.]+)", requirement), re.search(r"<([\d.]+)", requirement)
            assert low and high, f"{requirement} states no range"
            return low[1], high[1]
    raise LookupError(f"no group of pyproject.toml names {name}")


def is_within(version: str, low: str, high: str) -> bool:
    """Whether the numbers of a version lie in [low, high); a local part such as `+vulkan` does not count."""
    return _numbers(low) <= _numbers(version) < _numbers(high)


def _numbers(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
