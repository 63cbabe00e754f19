"""Requests that crash runners: one whose runner crashed twice is refused for ten minutes, before it takes a third.

A request is known by what it asks, not by its id: whoever sends it again, with the same words and settings, sends the
same one. One that comes to its end is forgotten.
"""

from __future__ import annotations

import hashlib
from typing import Final, TypeAlias

from skulk.clock import Clock
from skulk.errors import RequestError
from skulk.gateway.run import Generation
from skulk.wire.base import encode

CRASHES: Final = 2
REMEMBERED_S: Final = 600.0
MAX_REMEMBERED: Final = 4096
Life: TypeAlias = tuple[str, int]
"""A runner and how often it was started before."""
_NONE: Final[frozenset[Life]] = frozenset()


class Crashes:
    """What this gateway has seen crash. O(1) but for one digest of the request."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seen: dict[bytes, tuple[frozenset[Life], float]] = {}

    def check(self, generation: Generation) -> None:
        """Lets a request through.

        Raises:
            RequestError: ``request_crashed_runner``.
        """
        if not self._seen:
            return
        lives, at = self._seen.get(digest_of(generation), (_NONE, 0.0))
        left_s = at + REMEMBERED_S - self._clock.now()
        if len(lives) >= CRASHES and left_s > 0:
            raise crashed(left_s)

    def note(self, generation: Generation, life: Life) -> bool:
        """A runner crashed in this life of it while it was at work for this request; True: once too often.

        The same request, asked twice and computed side by side, sees one crash and not two.
        """
        now, digest = self._clock.now(), digest_of(generation)
        lives, at = self._seen.pop(digest, (_NONE, now))
        lives = frozenset((life,)) if now - at > REMEMBERED_S else lives | {life}
        if len(self._seen) >= MAX_REMEMBERED:
            del self._seen[next(iter(self._seen))]
        self._seen[digest] = (lives, now)
        return len(lives) >= CRASHES

    def forget(self, generation: Generation) -> None:
        """It came to its end: it was not to blame."""
        if self._seen:
            self._seen.pop(digest_of(generation), None)


def crashed(left_s: float = REMEMBERED_S) -> RequestError:
    """The refusal."""
    return RequestError(
        "request_crashed_runner",
        f"{CRASHES} runners crashed while they worked at this very request; it is refused for {left_s:.0f} s more. "
        "Change it (prompt, sampling, limits), and see the runners' logs for the crash",
    )


def digest_of(generation: Generation) -> bytes:
    """What tells one request from another: all that it asks. O(prompt)."""
    asked = (generation.model_id, generation.prompt, generation.sampling, generation.limits, generation.n)
    return hashlib.blake2b(encode(asked), digest_size=16).digest()
