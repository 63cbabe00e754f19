"""How much memory a process of ours takes, so that it can be held against what was reserved for it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Final

import msgspec
import psutil

from skulk.units import KIB

ROOT: Final = Path("/")
_MAX_DESCRIPTORS: Final = 4096
_CHANGE: Final = 100
"""A change of a hundredth of the resident size is one."""


class ProcessMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that one process takes.

    Attributes:
        resident_bytes: in main memory, its share of what it shares (PSS where the kernel tells it).
        file_bytes: the part of that which is mapped from files: the kernel calls it available all the same.
        device_bytes: on a GPU, or in main memory that a GPU maps; not part of ``resident_bytes``.
    """

    resident_bytes: int = 0
    file_bytes: int = 0
    device_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.resident_bytes + self.device_bytes

    def __add__(self, other: ProcessMemory) -> ProcessMemory:
        return ProcessMemory(
            resident_bytes=self.resident_bytes + other.resident_bytes,
            file_bytes=self.file_bytes + other.file_bytes,
            device_bytes=self.device_bytes + other.device_bytes,
        )


NOTHING: Final = ProcessMemory()


def process_memory(pid: int, root: Path = ROOT) -> ProcessMemory:
    """What a process takes now; zeros once it is gone. Costs some milliseconds for a process of many gigabytes."""
    folder = root / "proc" / str(pid)
    rollup = _kilobytes(folder / "smaps_rollup")
    if "Pss" in rollup:
        return ProcessMemory(
            resident_bytes=rollup["Pss"],
            file_bytes=rollup.get("Pss_File", 0),
            device_bytes=_device_bytes(folder / "fdinfo"),
        )
    try:
        return ProcessMemory(resident_bytes=psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return NOTHING


class MemoryWatch:
    """`process_memory`, asked often: the kernel walks all pages for it, so it is read again only after a change.

    54 ms of processor time were measured for a process of 3 GB, each time; its resident size alone costs a few
    microseconds and tells when it is worth it.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._seen: dict[int, tuple[int, ProcessMemory]] = {}

    def look(self, pids: Collection[int]) -> dict[int, ProcessMemory]:
        """What these processes take; others are forgotten."""
        seen: dict[int, tuple[int, ProcessMemory]] = {}
        for pid in pids:
            pages = self._resident_pages(pid)
            before = self._seen.get(pid)
            if before is None or not pages or abs(pages - before[0]) * _CHANGE > before[0]:
                before = (pages, process_memory(pid, self._root))
            elif before[1].device_bytes:
                # A GPU's memory grows without the process growing.
                device_bytes = _device_bytes(self._root / "proc" / str(pid) / "fdinfo")
                before = (before[0], msgspec.structs.replace(before[1], device_bytes=device_bytes))
            seen[pid] = before
        self._seen = seen
        return {pid: memory for pid, (_, memory) in seen.items()}

    def _resident_pages(self, pid: int) -> int:
        """0 where the kernel doesn't tell; then everything is read each time."""
        try:
            return int((self._root / "proc" / str(pid) / "statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            return 0


def _kilobytes(path: Path) -> dict[str, int]:
    """Lines such as ``Pss:   1234 kB`` as bytes by name."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    fields = [line.split() for line in lines]
    return {
        field[0].rstrip(":"): int(field[1]) * KIB
        for field in fields
        if len(field) == 3 and field[2] == "kB" and field[1].isdecimal()
    }


def _device_bytes(folder: Path) -> int:
    """What graphics drivers tell of a process, once a client (the kernel's ``drm-usage-stats``)."""
    clients: dict[str, int] = {}
    try:
        descriptors = sorted(folder.iterdir())[:_MAX_DESCRIPTORS]
    except OSError:
        return 0
    for descriptor in descriptors:
        try:
            fields = dict(line.split(":", 1) for line in descriptor.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        client = fields.get("drm-client-id")
        if client is not None:
            clients[client.strip()] = sum(_drm_bytes(fields, f"drm-memory-{pool}") for pool in ("vram", "gtt"))
    return sum(clients.values())


def _drm_bytes(fields: dict[str, str], name: str) -> int:
    """A figure such as ``1234 KiB``; without a unit it is bytes."""
    number, _, unit = fields.get(name, "0").strip().partition(" ")
    scale = {"": 1, "KiB": KIB, "MiB": KIB * KIB}.get(unit.strip())
    return int(number) * scale if scale is not None and number.isdecimal() else 0
