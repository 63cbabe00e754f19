"""How fast this node draws tokens, for placements: one figure for each backend and doubling of size, the newest.

runner's status (decode_tps) ──> note ──> <home>/speeds.json ──> beat ──> skulk.placement.speeds
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import msgspec

from skulk.errors import SkulkError
from skulk.files import write_atomic
from skulk.wire.beats import MeasuredSpeed

log = logging.getLogger("skulk.node")

FILE: Final = "speeds.json"
MOST: Final = 16
SAVE_EVERY_S: Final = 60.0


class _Content(msgspec.Struct, frozen=True, kw_only=True):
    speeds: tuple[MeasuredSpeed, ...] = ()


class SpeedBook:
    """The figures, in memory and on disk.

    Args:
        home: the node's folder.
    """

    def __init__(self, home: Path) -> None:
        self._path = home / FILE
        self._known = {_place_of(one): one for one in _read(self._path)[-MOST:]}
        self._is_dirty = False
        self._saved_at: float | None = None

    @property
    def told(self) -> tuple[MeasuredSpeed, ...]:
        """What the beat carries, the newest last."""
        return tuple(self._known.values())

    def note(self, speed: MeasuredSpeed) -> None:
        """Takes in what a runner has measured."""
        place = _place_of(speed)
        if speed.decode_tps <= 0.0 or speed.weights_bytes <= 0 or self._known.get(place) == speed:
            return
        self._known.pop(place, None)
        self._known[place] = speed
        if len(self._known) > MOST:
            del self._known[next(iter(self._known))]
        self._is_dirty = True

    def save(self, now: float) -> None:
        """Writes what is new, at most once a minute; ``now``: seconds of any clock that goes on."""
        if not self._is_dirty or (self._saved_at is not None and now - self._saved_at < SAVE_EVERY_S):
            return
        self._saved_at, self._is_dirty = now, False
        try:
            write_atomic(self._path, msgspec.json.encode(_Content(speeds=self.told)), fsync=False)
        except (OSError, SkulkError) as error:
            log.warning("what was measured of this node's speed can't be kept in %s: %s", self._path, error)


def _place_of(speed: MeasuredSpeed) -> tuple[str, int]:
    return speed.backend, speed.weights_bytes.bit_length()


def _read(path: Path) -> tuple[MeasuredSpeed, ...]:
    """The file's content; nothing where it is missing or broken."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Content).speeds
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.DecodeError) as error:
        log.warning("%s can't be read (%s): speeds are measured anew", path, error)
        return ()
