"""The machine's GPUs: AMD from the kernel's files, NVIDIA from ``nvidia-smi``, Apple from what the machine is."""

from __future__ import annotations

import csv
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from skulk.telemetry.children import ask
from skulk.units import MIB
from skulk.wire.beats import Accelerator

ROOT: Final = Path("/")
SMI_TIMEOUT_S: Final = 5.0
_AMD: Final = "0x1002"
_SMI_QUERY: Final = ("--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits")


async def accelerators(root: Path = ROOT, *, nvidia_smi: str | None = None) -> tuple[Accelerator, ...]:
    """The GPUs now; a source that doesn't answer within seconds is left out.

    Args:
        root: where ``/sys`` hangs; another one in tests.
        nvidia_smi: path of the program; None: looked for on PATH.
    """
    return (*amd(root), *await nvidia(nvidia_smi), *await apple())


def amd(root: Path = ROOT) -> tuple[Accelerator, ...]:
    """AMD GPUs as the kernel's amdgpu driver shows them."""
    return tuple(_amd_cards(root / "sys/class/drm"))


def _amd_cards(folder: Path) -> Iterator[Accelerator]:
    for card in sorted(folder.glob("card[0-9]*")):
        device = card / "device"
        if "-" in card.name or _text(device / "vendor") != _AMD:  # card0-HDMI-A-1 is a connector
            continue
        vram = _figure(device / "mem_info_vram_total")
        if vram == 0:
            continue
        yield Accelerator(
            vendor="amd",
            name=_text(device / "product_name") or f"AMD GPU {_text(device / 'device')}",
            vram_total_bytes=vram,
            vram_used_bytes=_figure(device / "mem_info_vram_used"),
            gtt_total_bytes=_figure(device / "mem_info_gtt_total"),
            gtt_used_bytes=_figure(device / "mem_info_gtt_used"),
        )


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _figure(path: Path) -> int:
    text = _text(path)
    return int(text) if text.isdecimal() else 0


async def nvidia(program: str | None = None) -> tuple[Accelerator, ...]:
    """NVIDIA GPUs as ``nvidia-smi`` lists them; none where it is missing or doesn't answer."""
    found = program or shutil.which("nvidia-smi")
    if found is None:
        return ()
    answer = await ask((found, *_SMI_QUERY), timeout_s=SMI_TIMEOUT_S)
    return parse_smi(answer.output.decode("utf-8", "replace"))


def parse_smi(text: str) -> tuple[Accelerator, ...]:
    """The lines ``name, total MiB, used MiB``; others (``[N/A]`` on unified boards) are left out."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines())]
    return tuple(
        Accelerator(vendor="nvidia", name=row[0], vram_total_bytes=int(row[1]) * MIB, vram_used_bytes=int(row[2]) * MIB)
        for row in rows
        if len(row) == 3 and row[1].isdecimal() and row[2].isdecimal()
    )


async def apple() -> tuple[Accelerator, ...]:
    """The GPU of Apple silicon; it shares main memory, so it has none of its own."""
    if platform.system() != "Darwin" or platform.machine() != "arm64":
        return ()
    answer = await ask(("sysctl", "-n", "machdep.cpu.brand_string"), timeout_s=SMI_TIMEOUT_S)
    return (Accelerator(vendor="apple", name=answer.output.decode("utf-8", "replace").strip() or "Apple silicon"),)
