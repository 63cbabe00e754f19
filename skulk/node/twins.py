"""A home that was copied: two processes speak under one id, and the one that was started later stops (DESIGN 3)."""

from __future__ import annotations

import asyncio
from typing import Final

from skulk.errors import StartError
from skulk.wire.beats import NodeBeat

BEATS: Final = 3
APART_S: Final = 0.5
"""Beats of an earlier life that come late come in a heap, or singly; three that keep time are a living process."""


class Twins:
    """Listens for beats of the own id from another incarnation."""

    def __init__(self, node_id: str, incarnation: str, started_at: float) -> None:
        self._node_id = node_id
        self._own = (started_at, incarnation)
        self._incarnation = ""
        self._beats = 0
        self._last_at = 0.0
        self._last_heard = 0.0
        self._found: asyncio.Future[NodeBeat] = asyncio.get_running_loop().create_future()

    def heard(self, beat: NodeBeat, now: float) -> None:
        """Takes in a node's beat. ``now``: monotonic seconds."""
        other = (beat.started_at, beat.incarnation)
        if beat.node_id != self._node_id or beat.incarnation == self._own[1] or other > self._own:
            return
        if beat.incarnation != self._incarnation:
            self._incarnation, self._beats = beat.incarnation, 0
        elif beat.at == self._last_at or now - self._last_heard < APART_S:
            return
        self._beats += 1
        self._last_at, self._last_heard = beat.at, now
        if self._beats >= BEATS and not self._found.done():
            self._found.set_result(beat)

    async def stop_for_one(self) -> None:
        """Raises as soon as a living process with the same id was heard that was there before this one.

        Raises:
            StartError: ``node_id_in_use``.
        """
        twin = await self._found
        raise StartError(
            "node_id_in_use",
            f"another running node, {twin.name} ({twin.api or 'no API'}), has this node's id {self._node_id}: its home "
            "was copied. Remove identity.json from this node's home, and it becomes a node of its own.",
        )
