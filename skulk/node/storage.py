"""The last known cluster state on disk, so that a restart of the whole cluster brings its placements back."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from skulk.cluster.fold import state_hash
from skulk.errors import SkulkError
from skulk.files import write_atomic
from skulk.wire.state import ClusterState

log = logging.getLogger("skulk.node")


def load_state(home: Path, cluster: str) -> ClusterState | None:
    """The state of the last run; None where there is none, or none of this cluster.

    A damaged file is set aside under another name, never overwritten: it may be all that is left.
    """
    path = home / "state.json"
    try:
        body = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        state = msgspec.json.decode(body, type=ClusterState)
    except msgspec.DecodeError as error:
        aside = path.with_suffix(".damaged.json")
        path.replace(aside)
        log.warning(
            "%s can't be read (%s); it is set aside as %s and the node starts with no placements", path, error, aside
        )
        return None
    if state.cluster != cluster:
        log.warning("%s belongs to the cluster %r, not %r; it is not used", path, state.cluster, cluster)
        return None
    return state


class StateFile:
    """Writes the newest state, at most one write at a time, in a thread; older ones that wait are skipped."""

    def __init__(self, home: Path) -> None:
        self._path = home / "state.json"
        self._newest: ClusterState | None = None
        self._written = ""
        self._changed = asyncio.Event()
        self._writing = asyncio.Lock()

    def offer(self, state: ClusterState) -> None:
        """Keeps this state in mind to be written."""
        if state is not self._newest:
            self._newest = state
            self._changed.set()

    async def run(self) -> None:
        """Writes what is offered until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self.flush()

    async def flush(self) -> None:
        """Writes the newest state now if it isn't on disk; a full disk is reported, and the node goes on."""
        async with self._writing:
            state = self._newest
            if state is None or (digest := state_hash(state)) == self._written:
                return
            write = asyncio.ensure_future(asyncio.to_thread(write_atomic, self._path, msgspec.json.encode(state)))
            try:
                await asyncio.shield(write)
            except asyncio.CancelledError:
                # a thread can't be cancelled: a later write must not be overtaken by this one
                await asyncio.wait({write})
                write.exception()
                raise
            except SkulkError as error:
                log.warning("the state of the cluster is not on disk: %s", error)
                return
            self._written = digest
