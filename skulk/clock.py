"""Time as an argument: the shell reads a clock, pure code is told ``now``."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where the shell takes its time from."""

    def now(self) -> float:
        """Monotonic seconds; only differences mean something."""
        ...

    def wall(self) -> float:
        """Seconds since the epoch, for people and for records; may jump."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()
