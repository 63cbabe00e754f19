"""When a step of the engine is a hang (DESIGN 6). Pure: the caller's clock.

    limit = 20 x the longest step seen, at least 30 s, and at most what ``SKULK_STEP_TIMEOUT_S`` says
    age   = since the last step ended, or since the engine was given work, whichever is later

A look that comes late says that the whole process stood still (stopped, swapped out, the machine asleep), not that the
engine did: the age begins anew.
"""

from __future__ import annotations

from typing import Final

LEAST_S: Final = 30.0
TIMES: Final = 20.0
LATE_S: Final = 2.0


class StepWatch:
    """The age of the step in progress, held against its limit. ``most_s``: the most that is borne."""

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._longest_s = 0.0
        self._since: float | None = None
        self._looked_at: float | None = None

    @property
    def limit_s(self) -> float:
        """The age beyond which a step is a hang."""
        return min(max(LEAST_S, TIMES * self._longest_s), self._most_s)

    def finished(self, now: float) -> None:
        """A step ended."""
        if self._since is not None:
            self._longest_s = max(self._longest_s, now - self._since)
        self._since = now

    def look(self, now: float, *, has_work: bool) -> float | None:
        """The age of a step that hangs, in seconds; None: none does.

        Args:
            now: monotonic seconds; looks come at least once in `LATE_S`.
            has_work: the engine was given something that it has not ended.
        """
        is_late = self._looked_at is not None and now - self._looked_at > LATE_S
        self._looked_at = now
        if not has_work:
            self._since = None
        elif self._since is None or is_late:
            self._since = now
        elif now - self._since > self.limit_s:
            return now - self._since
        return None
