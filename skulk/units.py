"""Bytes for people."""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
_UNITS: Final = ("KiB", "MiB", "GiB", "TiB")


def format_bytes(count: int) -> str:
    """``5583457484`` as ``5.2 GiB``; under 1 KiB in bytes."""
    size = abs(count)
    if size < KIB:
        return f"{count} B"
    step = min((size.bit_length() - 1) // 10, len(_UNITS))
    return f"{count / (1 << 10 * step):.1f} {_UNITS[step - 1]}"
