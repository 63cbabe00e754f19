"""Bytes for people."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB


def format_bytes(count: int) -> str:
    """``5583457484`` as ``5.2 GiB``; under 1 KiB in bytes."""
    size = float(abs(count))
    sign = "-" if count < 0 else ""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < KIB:
            return f"{sign}{size:.0f} B" if unit == "B" else f"{sign}{size:.1f} {unit}"
        size /= KIB
    return f"{sign}{size:.1f} TiB"
