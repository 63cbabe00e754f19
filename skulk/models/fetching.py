"""Fetches the files of one model, whole and verified, from neighbours first and then from the hub. Blocks; has threads.

    each file, some at once:
        neighbours that have it ──┐
        the hub ──────────────────┴─> workers claim runs of chunks ──> hash of the whole ──> its name
                                          │  failure: give the run back, wait, go on        │ wrong: once more, then
                                          └─ no progress 8 times: the source is given up    └ from others, then fail

There is no limit on the whole, only on each silence and on attempts without progress.
"""

from __future__ import annotations

import logging
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Final

import msgspec

from skulk.errors import RequestError, ServiceError, SkulkError, UnavailableError
from skulk.models.parts import CHUNK_BYTES, PartFile, file_digest, part_key
from skulk.models.sources import HubSource, NeighbourSource, Source
from skulk.units import MIB, format_bytes
from skulk.wire.model import ModelCard, ModelFile

log = logging.getLogger("skulk.models")

FILES_AT_ONCE: Final = 3
ATTEMPTS: Final = 8
MAX_WAIT_S: Final = 30.0
DISK_MARGIN: Final = 256 * MIB


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How patient to be; tests are less so.

    Attributes:
        wait_s: before the second attempt; doubled up to 30 s.
        disk_margin_bytes: what must be left on the disk.
    """

    chunk_bytes: int = CHUNK_BYTES
    attempts: int = ATTEMPTS
    wait_s: float = 1.0
    disk_margin_bytes: int = DISK_MARGIN


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far it is, bytes.

    Attributes:
        sources: who gave something so far.
        phase: what is being done.
        moving_s: from the first request for bytes until the last ones came.
    """

    done_bytes: int
    total_bytes: int
    sources: tuple[str, ...] = ()
    phase: str = "fetching"
    moving_s: float = 0.0


class Fetch:
    """One model on its way.

    Args:
        card: what to fetch; its pins are what the files must be.
        folder: where the files belong, under the names of the card.
        parts: where unfinished ones lie.
        neighbours: who may have them.
        hub: the hub; None: it must not be asked, and ``no_hub`` says why.
    """

    def __init__(
        self,
        card: ModelCard,
        folder: Path,
        parts: Path,
        *,
        neighbours: Sequence[NeighbourSource] = (),
        hub: HubSource | None = None,
        no_hub: str = "",
        limits: Limits | None = None,
    ) -> None:
        self._card = card
        self._folder = folder
        self._parts = parts
        self._neighbours = neighbours
        self._hub = hub
        self._no_hub = no_hub
        self._limits = limits or Limits()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._open: dict[str, PartFile] = {}
        self._ready_bytes = 0
        self._used: set[str] = set()
        self._hashing = 0
        self._moving_since = self._moved_at = 0.0

    def progress(self) -> Progress:
        """How far it is; any thread."""
        with self._lock:
            done = self._ready_bytes + sum(part.done_bytes for part in self._open.values())
            phase = "verifying" if self._hashing and self._hashing == len(self._open) else "fetching"
            return Progress(
                done_bytes=done,
                total_bytes=self._card.size_bytes,
                sources=tuple(sorted(self._used)),
                phase=phase,
                moving_s=max(0.0, self._moved_at - self._moving_since),
            )

    def run(self) -> tuple[ModelFile, ...]:
        """Fetches everything that isn't there; returns the files of the card with the sha256 of each.

        Raises:
            SkulkError: ``disk_full`` with both numbers; ``download_failed``; ``hub_unreachable``; what the hub said.
        """
        try:
            return self._run()
        finally:
            for neighbour in self._neighbours:
                neighbour.close()

    def _run(self) -> tuple[ModelFile, ...]:
        listings = self._listings()
        files = [self._pinned(file, listings) for file in self._card.all_files]
        self._check_room(files)
        with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="file") as pool:
            tasks = [pool.submit(self._fetch, file, listings) for file in files]
            done, left = wait(tasks, return_when=FIRST_EXCEPTION)
            if any(task.exception() is not None for task in done):
                self._end(left)
        failures = [error for task in tasks if not task.cancelled() and (error := task.exception()) is not None]
        if failures:
            # what the others were ended with is no reason
            raise next((error for error in failures if getattr(error, "code", "") != "download_cancelled"), failures[0])
        return tuple(task.result() for task in tasks)

    def _end(self, tasks: Iterable[Future[ModelFile]]) -> None:
        """One file failed: the others end at their next block."""
        self._stop.set()
        for task in tasks:
            task.cancel()
        with self._lock:
            for part in self._open.values():
                part.abandon()

    def _listings(self) -> dict[str, dict[str, ModelFile]]:
        """What each neighbour has of the model, by its name."""
        found: dict[str, dict[str, ModelFile]] = {}
        for neighbour in self._neighbours:
            try:
                found[neighbour.name] = neighbour.listing()
            except SkulkError as error:
                log.warning("no weights from %s: %s", neighbour.name, error)
        return found

    def _pinned(self, file: ModelFile, listings: dict[str, dict[str, ModelFile]]) -> ModelFile:
        """The file with a hash: its own, else the one that a neighbour tells of the same name and size."""
        if file.sha256 is not None:
            return file
        told = (listing.get(file.name) for listing in listings.values())
        same = next((one for one in told if one is not None and one.size_bytes == file.size_bytes), None)
        return file if same is None else msgspec.structs.replace(file, sha256=same.sha256)

    def _check_room(self, files: Sequence[ModelFile]) -> None:
        missing = 0
        for file in files:
            if (self._folder / file.name).is_file():
                continue
            with self._part_of(file) as part:
                missing += file.size_bytes - part.done_bytes
        free = shutil.disk_usage(self._parts).free if missing else 0
        needed = missing + self._limits.disk_margin_bytes
        if missing and free < needed:
            raise ServiceError(
                "disk_full",
                f"{self._card.model_id} needs {format_bytes(needed)} more on the disk of {self._folder}, "
                f"{format_bytes(free)} are free; free some space ('skulk remove MODEL'), or set SKULK_MODELS_DIR.",
            )

    def _part_of(self, file: ModelFile) -> PartFile:
        key = part_key(self._card.model_id, file)
        return PartFile(self._parts, key, file.size_bytes, chunk_bytes=self._limits.chunk_bytes)

    def _fetch(self, file: ModelFile, listings: dict[str, dict[str, ModelFile]]) -> ModelFile:
        """One file to its end; the same with its sha256."""
        with self._part_of(file) as part:
            target = self._folder / file.name
            with self._lock:
                self._open[file.name] = part
            try:
                digest = self._own_digest(file, target, part) or self._fetch_verified(file, part, target, listings)
            finally:
                with self._lock:
                    del self._open[file.name]
            with self._lock:
                self._ready_bytes += file.size_bytes
        return msgspec.structs.replace(file, sha256=digest)

    def _own_digest(self, file: ModelFile, target: Path, part: PartFile) -> str | None:
        """The hash of a file that is here already and is what it should be; then its parts are of no use."""
        if not target.is_file() or target.stat().st_size != file.size_bytes:
            return None
        digest = file_digest(target, "sha256")
        if file.sha256 is not None and digest != file.sha256.lower():
            return None
        if file.sha256 is None and file.git_oid is not None and file_digest(target, "git") != file.git_oid:
            return None
        part.discard()
        return digest

    def _fetch_verified(
        self, file: ModelFile, part: PartFile, target: Path, listings: dict[str, dict[str, ModelFile]]
    ) -> str:
        neighbours = [one for one in self._neighbours if _has(listings.get(one.name), file)]
        wrong = ""
        for sources in self._turns(neighbours):
            if not part.is_whole:
                self._fill(file, part, sources)
            digest, wrong = self._verify(file, part)
            if not wrong:
                part.finish(target)
                return digest
            log.warning("%s: %s; it is fetched anew", file.name, wrong)
            part.clear()
        raise ServiceError("download_failed", f"{file.name} of {self._card.model_id} {wrong}; nothing of it is kept.")

    def _turns(self, neighbours: list[NeighbourSource]) -> list[list[Source]]:
        """Whom to ask, twice: after a wrong hash, others where there are some."""
        hub: list[Source] = [] if self._hub is None else [self._hub]
        if not neighbours and not hub:
            raise UnavailableError(
                "unreachable",
                f"no node of the cluster gives {self._card.model_id}, and {self._no_hub or 'no hub is known for it'}.",
                retry_after_s=30,
            )
        return [[*neighbours, *hub], hub or [*neighbours]]

    def _fill(self, file: ModelFile, part: PartFile, sources: Sequence[Source]) -> None:
        """Fetches all missing chunks: from all neighbours together, and from the hub what they don't give."""
        near = [source for source in sources if isinstance(source, NeighbourSource)]
        far = [source for source in sources if not isinstance(source, NeighbourSource)]
        failure: SkulkError | None = None
        self._moving_since = self._moving_since or time.monotonic()
        for group in (near, far):
            alive = list(group)
            while alive and not part.is_whole and not self._stop.is_set():
                lost = self._work(file, part, alive)
                alive = [source for source in alive if source not in lost]
                failure = next(iter(lost.values()), failure)
        self._moved_at = time.monotonic()
        if self._stop.is_set() and not part.is_whole:
            raise RequestError("download_cancelled", f"the download of {self._card.model_id} was ended.")
        if not part.is_whole:
            assert failure is not None
            raise failure

    def _work(self, file: ModelFile, part: PartFile, sources: Sequence[Source]) -> dict[Source, SkulkError]:
        """Lets every source work until nothing is left to claim; returns those that were given up, and why."""
        lost: dict[Source, SkulkError] = {}

        def work(source: Source) -> None:
            try:
                self._work_with(file, part, source, lambda: source in lost)
            except SkulkError as error:
                lost[source] = error

        with ThreadPoolExecutor(thread_name_prefix="chunks", max_workers=64) as pool:
            runs_left = max(1, part.count)
            tasks = [pool.submit(work, source) for source in sources for _ in range(min(source.connections, runs_left))]
        for task in tasks:
            task.result()
        return lost

    def _work_with(self, file: ModelFile, part: PartFile, source: Source, is_lost: Callable[[], bool]) -> None:
        failures = 0
        while not self._stop.is_set() and not is_lost():
            run = part.claim(source.run_chunks)
            if run is None:
                return
            before = part.done_bytes
            try:
                source.fetch(file, part, run)
                with self._lock:
                    self._used.add(source.name)
                failures = 0
            except SkulkError as error:
                if not error.retryable:
                    raise
                failures = 1 if part.done_bytes > before else failures + 1
                log.warning("%s: attempt %d: %s", file.name, failures, error)
                if failures >= self._limits.attempts:
                    raise
                part.release(run)
                self._stop.wait(self._pause_s(failures, error))
            finally:
                part.release(run)

    def _pause_s(self, failures: int, error: SkulkError) -> float:
        """Doubled each time, with some chance in it; at least what the other side asks for."""
        backing_off = min(self._limits.wait_s * 2 ** (failures - 1), MAX_WAIT_S) * random.uniform(0.75, 1.25)
        asked = error.retry_after_s if error.code == "hub_rate_limited" else None
        return max(backing_off, asked or 0.0)

    def _verify(self, file: ModelFile, part: PartFile) -> tuple[str, str]:
        """The sha256 of the whole, and what is wrong with it, empty where nothing is."""
        with self._lock:
            self._hashing += 1
        try:
            digest = part.digest("sha256")
            if file.sha256 is not None and digest != file.sha256.lower():
                return digest, f"came with the sha256 {digest} instead of {file.sha256}"
            if file.sha256 is None and file.git_oid is not None and (oid := part.digest("git")) != file.git_oid:
                return digest, f"came with the git id {oid} instead of {file.git_oid}"
            return digest, ""
        finally:
            with self._lock:
                self._hashing -= 1


def _has(listing: dict[str, ModelFile] | None, file: ModelFile) -> bool:
    """Whether a neighbour has exactly this file."""
    own = None if listing is None else listing.get(file.name)
    return own is not None and own.size_bytes == file.size_bytes and own.sha256 == file.sha256 is not None
