"""An event loop whose time is its own: it jumps to the next timer instead of waiting for it.

Whose callback it is stands in the context variable `OWNER`; the callbacks of an owner that is frozen wait, as those of
a suspended machine do, and run late when it is thawed.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from typing import Any, Final

EPOCH_S: Final = 1_700_000_000.0
OWNER: Final[contextvars.ContextVar[str]] = contextvars.ContextVar("owner", default="")


class VirtualLoop(asyncio.BaseEventLoop):
    """For code that uses timers and no sockets, threads or processes: hours pass in seconds, always alike."""

    # what BaseEventLoop keeps, for the type checker
    _ready: Any
    _scheduled: list[Any]
    _timer_cancelled_count: int
    _stopping: bool

    def __init__(self) -> None:
        super().__init__()
        self._virtual = 1_000.0
        self._frozen: dict[str, list[Any]] = {}

    def time(self) -> float:
        return self._virtual

    def freeze(self, owner: str) -> None:
        """Holds back everything that ``owner`` would do."""
        self._frozen.setdefault(owner, [])

    def thaw(self, owner: str) -> None:
        """Lets it go on, with all that came meanwhile."""
        self._ready.extend(self._frozen.pop(owner, ()))

    def is_frozen(self, owner: str) -> bool:
        return owner in self._frozen

    def _write_to_self(self) -> None:
        """Nobody sleeps who would have to be woken."""

    def _process_events(self, event_list: Any) -> None:
        del event_list

    def _run_once(self) -> None:
        self._sweep_timers()
        ready, scheduled = self._ready, self._scheduled
        if not ready and not self._stopping:
            assert scheduled, "everybody waits for something that nothing will bring"
            self._virtual = max(self._virtual, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self._virtual:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False
            ready.append(timer)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            held = self._frozen.get(handle._context.get(OWNER, "")) if self._frozen else None
            if held is None:
                handle._run()
            else:
                held.append(handle)

    def _sweep_timers(self) -> None:
        """Drops cancelled timers: all where they are many, else those that come next."""
        scheduled = self._scheduled
        if self._timer_cancelled_count > 100 and self._timer_cancelled_count * 2 > len(scheduled):
            for timer in scheduled:
                timer._scheduled = not timer._cancelled
            scheduled[:] = [timer for timer in scheduled if not timer._cancelled]
            heapq.heapify(scheduled)
            self._timer_cancelled_count = 0
        while scheduled and scheduled[0]._cancelled:
            self._timer_cancelled_count -= 1
            heapq.heappop(scheduled)._scheduled = False


class VirtualClock:
    """The clocks of such a loop.

    ``wall_offset_s``: what a test sets the wall clock forward or back. ``rate``: how fast both go; 1 is right.
    """

    def __init__(self, rate: float = 1.0) -> None:
        self.wall_offset_s = 0.0
        self.rate = rate

    def now(self) -> float:
        return asyncio.get_running_loop().time() * self.rate

    def wall(self) -> float:
        return EPOCH_S + self.now() + self.wall_offset_s

    def true_time(self, wall: float) -> float:
        """The loop's time at which this wall clock shows ``wall``."""
        return (wall - EPOCH_S - self.wall_offset_s) / self.rate
