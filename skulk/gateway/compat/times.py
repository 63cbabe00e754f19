"""Times as existing clients read them."""

from __future__ import annotations

from datetime import UTC, datetime


def iso_time(at: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC, with its offset."""
    return datetime.fromtimestamp(at, tz=UTC).isoformat()
