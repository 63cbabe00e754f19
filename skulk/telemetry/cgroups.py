"""Memory limits of the control groups that this process lives in (Linux containers and services), versions 1 and 2.

Every group up to the root may set a limit; the tightest one counts. Page cache of files is given back under pressure
and so isn't used memory; shared memory (tmpfs) is counted as cache by the kernel but can't be given back.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final, NamedTuple

ROOT: Final = Path("/")


class GroupMemory(NamedTuple):
    """One group's limit and what is used of it, in bytes."""

    limit_bytes: int
    used_bytes: int

    @property
    def available_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


class _Names(NamedTuple):
    limit: str
    usage: str
    cache: str
    shared: str


_V2: Final = _Names("memory.max", "memory.current", "file", "shmem")
_V1: Final = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache", "total_shmem")


def memory_limits(root: Path = ROOT) -> tuple[GroupMemory, ...]:
    """The limits that hold for this process; empty outside of limited groups.

    Args:
        root: where ``/proc`` and ``/sys`` hang; another one in tests.
    """
    found = (_read(folder, names) for folder, names in _groups(root))
    return tuple(group for group in found if group is not None)


def _groups(root: Path) -> Iterator[tuple[Path, _Names]]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", _V1
        else:
            continue
        inner = PurePosixPath(path.lstrip("/"))
        for part in (inner, *inner.parents):
            yield base / part, names


def _read(folder: Path, names: _Names) -> GroupMemory | None:
    limit, usage = _number(folder / names.limit), _number(folder / names.usage)
    if limit is None or usage is None:
        return None
    stat = _stat(folder / "memory.stat")
    cache = max(0, stat.get(names.cache, 0) - stat.get(names.shared, 0))
    return GroupMemory(limit, max(0, usage - cache))


def _number(path: Path) -> int | None:
    """The figure in a file; None where there is none, as for ``max``."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _stat(path: Path) -> dict[str, int]:
    try:
        pairs = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
