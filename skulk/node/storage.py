"""The last known cluster state on disk, so that a restart of the whole cluster brings its placements back."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any, Final

import msgspec

from skulk.cluster.fold import state_hash
from skulk.errors import SkulkError, StartError
from skulk.files import write_atomic
from skulk.wire.state import ClusterState

log = logging.getLogger("skulk.node")

RETRY_S: Final = 10.0
TOUCH_S: Final = 3_600.0
"""While a master is heard the file is written at least so often: its date tells when that was."""


def load_state(home: Path, cluster: str) -> ClusterState | None:
    """The state of the last run; None where there is none, or none of this cluster.

    A damaged file is set aside under another name, never overwritten: it may be all that is left.

    Raises:
        StartError: ``home_not_writable``: it is there and can't be read, or not be set aside.
    """
    path = home / "state.json"
    try:
        body = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        state = ClusterState.opened(msgspec.json.decode(body, type=dict[str, Any]))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        aside = path.with_suffix(".damaged.json")
        try:
            path.replace(aside)
        except OSError as failure:
            raise _unusable(path, failure) from failure
        log.warning(
            "%s can't be read (%s); it is set aside as %s and the node starts with no placements", path, error, aside
        )
        return None
    if state.cluster != cluster:
        log.warning("%s belongs to the cluster %r, not %r; it is not used", path, state.cluster, cluster)
        return None
    return state


def state_date(home: Path) -> float | None:
    """When a master was last heard, within the hour, seconds since the epoch; None where there is no state."""
    try:
        return (home / "state.json").stat().st_mtime
    except OSError:
        return None


def _unusable(path: Path, error: OSError) -> StartError:
    return StartError(
        "home_not_writable",
        f"{path}, which holds this node's placements, can't be used: {error.strerror or error}. "
        "Make it readable and writable for this user, or choose another home with --home DIR.",
    )


class StateFile:
    """Writes the newest state, at most one write at a time, in a thread; older ones that wait are skipped."""

    def __init__(self, home: Path) -> None:
        self._path = home / "state.json"
        self._newest: ClusterState | None = None
        self._written = ""
        self._touch = False
        self._changed = asyncio.Event()
        self._writing = asyncio.Lock()

    def offer(self, state: ClusterState) -> None:
        """Keeps this state in mind to be written."""
        if state is not self._newest:
            self._newest = state
            self._changed.set()

    def touch(self) -> None:
        """Has the newest state written again, so that its date is of today."""
        self._touch = True
        self._changed.set()

    async def run(self) -> None:
        """Writes what is offered until cancelled; what could not be written is tried again."""
        is_written = True
        while True:
            try:
                async with asyncio.timeout(None if is_written else RETRY_S):
                    await self._changed.wait()
            except TimeoutError:
                log.debug("the state of the cluster is written once more")
            self._changed.clear()
            is_written = await self.flush()

    async def flush(self) -> bool:
        """Writes the newest state now if it isn't on disk, and says whether it is.

        A disk that is full or read-only is reported, and the node goes on.
        """
        async with self._writing:
            state = self._newest
            if state is None or ((digest := state_hash(state)) == self._written and not self._touch):
                return True
            self._touch = False
            write = asyncio.ensure_future(asyncio.to_thread(write_atomic, self._path, msgspec.json.encode(state)))
            try:
                await asyncio.shield(write)
            except asyncio.CancelledError:
                # a thread can't be cancelled: a later write must not be overtaken by this one
                await asyncio.wait({write})
                write.exception()
                raise
            except (SkulkError, OSError) as error:
                log.warning("the state of the cluster is not on disk: %s", error)
                return False
            self._written = digest
            return True
