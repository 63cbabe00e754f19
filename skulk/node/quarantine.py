"""Backends that this node doesn't offer because they failed the test after a load (`skulk.engines.canary`).

    backend_faulty of a runner ──> add ──> <home>/quarantine.json ──> tags without it, a reason in nodeHealth

Ways out: another build of the engine (it is reinstalled), 24 hours, or `skulk doctor --forgive BACKEND`, which also
forgets what the backend recited before. The file is looked at again whenever it changes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from skulk.errors import SkulkError
from skulk.files import write_atomic
from skulk.telemetry.backends import Advertised
from skulk.wire.beats import HealthReason

log = logging.getLogger("skulk.node")

FILE: Final = "quarantine.json"
CANARY_DIR: Final = "canary"
EXPIRES_S: Final = 86_400.0


class Quarantined(msgspec.Struct, frozen=True, kw_only=True):
    """One backend. ``build``: the engine's then; ``at``: seconds since the epoch."""

    backend: str
    build: str
    reason: str
    at: float


class _Content(msgspec.Struct, frozen=True, kw_only=True):
    backends: tuple[Quarantined, ...] = ()


class Quarantine:
    """The file, and what holds of it.

    Args:
        home: the node's folder.
    """

    def __init__(self, home: Path) -> None:
        self._path = home / FILE
        self._look: tuple[int, int] | None = None
        self._known: tuple[Quarantined, ...] = ()

    def add(self, backend: str, build: str, reason: str, at: float) -> None:
        """Quarantines a backend, also where the disk doesn't take it down."""
        others = tuple(one for one in self.all() if one.backend != backend)
        self._known = (*others, Quarantined(backend=backend, build=build, reason=reason, at=at))
        log.error("%s is quarantined: %s", backend, reason)
        try:
            write_atomic(self._path, msgspec.json.encode(_Content(backends=self._known)))
            self._look = _look(self._path)
        except (OSError, SkulkError) as error:
            log.warning("the quarantine can't be kept in %s: %s", self._path, error)

    def all(self) -> tuple[Quarantined, ...]:
        """What the file says now; cheap where it is unchanged."""
        look = _look(self._path)
        if look != self._look:
            self._look = look
            self._known = read(self._path)
        return self._known

    def holding(self, build: str, wall: float) -> tuple[Quarantined, ...]:
        """What holds for this build at this time."""
        return tuple(one for one in self.all() if one.build == build and 0 <= wall - one.at < EXPIRES_S)


def read(path: Path) -> tuple[Quarantined, ...]:
    """The file's content; nothing where it is missing or broken."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Content).backends
    except FileNotFoundError:
        return ()
    except (OSError, msgspec.DecodeError) as error:
        log.warning("%s can't be read (%s): nothing is quarantined", path, error)
        return ()


def forgive(home: Path, backend: str) -> bool:
    """Takes a backend out, and forgets what it recited; whether it was in. Raises `OSError`, `SkulkError`."""
    held = read(home / FILE)
    rest = tuple(one for one in held if one.backend != backend)
    if len(rest) == len(held):
        return False
    for path in (home / CANARY_DIR).glob("*.json"):
        if _backend_of(path) in (backend, ""):
            path.unlink(missing_ok=True)
    write_atomic(home / FILE, msgspec.json.encode(_Content(backends=rest)))
    return True


class _Record(msgspec.Struct, frozen=True):
    """Of `skulk.runner.canary.RecordFile`, what matters here."""

    backend: str = ""


def _backend_of(path: Path) -> str:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Record).backend
    except (OSError, msgspec.DecodeError):
        return ""


def _look(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ino


def without(advertised: Advertised, held: Iterable[Quarantined]) -> Advertised:
    """What is offered without the quarantined backends, and why; the bare engine goes with its last backend. Pure."""
    reasons = {one.backend: one for one in held if one.backend in advertised.tags}
    if not reasons:
        return advertised
    concrete = [tag for tag in advertised.tags if "-" in tag and tag not in reasons]
    engines = {tag.partition("-")[0] for tag in concrete}
    kept = tuple(tag for tag in advertised.tags if tag in concrete or ("-" not in tag and tag in engines))
    return Advertised(kept, (*advertised.warnings, *(_reason(one) for one in reasons.values())))


def _reason(one: Quarantined) -> HealthReason:
    return HealthReason(
        level="error",
        code="backend_quarantined",
        message=f"{one.backend} is not offered: {one.reason}",
        remediation="Check the driver and reinstall llama-cpp-python (another build is tried at once); to try this one "
        f"again before 24 hours are over: skulk doctor --forgive {one.backend}",
    )
