"""Bodies beyond 512 KiB: the receiver fetches them in parts, and checks a hash (DESIGN 2)."""

from __future__ import annotations

from skulk.wire.base import Wire


class Parcel(Wire, frozen=True, kw_only=True):
    """Where a large body waits to be fetched. ``sha256``: hexadecimal, of the whole body."""

    owner: str
    parcel_id: str
    size_bytes: int
    sha256: str


class PartRequest(Wire, frozen=True, kw_only=True):
    """``length`` bytes of a parcel from ``offset``; the answer is those bytes, raw."""

    parcel_id: str
    offset: int
    length: int
