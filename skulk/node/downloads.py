"""The weights that are on their way to this node's disk: each model once, some at a time, each in a child process.

| state     | entered by                              | left by                                                     |
|-----------|-----------------------------------------|-------------------------------------------------------------|
| waiting   | `begin`, `fetch`                        | a free place -> fetching; `cancel` -> cancelled             |
| fetching  | its child runs (also while it verifies) | its end -> done (gone: the files are here), failed          |
| failed    | its child said why, or died             | `begin` or `fetch` -> waiting; after an hour -> gone        |
| cancelled | `cancel`, or nobody waits any more      | as failed                                                   |

What came stays on the disk whatever the end was, and is taken up by the next attempt. What a person asked for is noted
on the shelf until it is here or cancelled, so a node that starts again goes on with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Set
from typing import Final, ParamSpec, TypeVar

import msgspec

from skulk.clock import Clock
from skulk.errors import RequestError, ServiceError, SkulkError
from skulk.models.catalogue import Catalogue
from skulk.models.fetching import Limits, Progress
from skulk.models.parts import part_key
from skulk.models.shelf import OnDisk, Shelf, evictions
from skulk.models.sources import Neighbour
from skulk.models.tasks import FetchTask
from skulk.node.children import Tasks
from skulk.wire.base import ErrorBody
from skulk.wire.model import ModelCard
from skulk.wire.store import DownloadPhase, DownloadStatus

log = logging.getLogger("skulk.node")

AT_ONCE: Final = 2
MAX_JOBS: Final = 100
FAILED_KEPT_S: Final = 3600.0
SPEED_OVER_S: Final = 5.0


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator said about downloads.

    Attributes:
        no_hub: why the hub must not be asked; empty: it may be.
        budget_bytes: the most that fetched models may take on the disk; 0: no limit.
        limits: how patient fetches are.
    """

    no_hub: str = ""
    budget_bytes: int = 0
    limits: Limits = Limits()


P = ParamSpec("P")
T = TypeVar("T")


async def _to_its_end(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """Runs work in a thread; a task that is cancelled meanwhile ends after it, for the thread can't be stopped."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments, **named))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


class _Job:
    """One model on its way. ``waiters``: runners that wait for it; ``is_asked``: a person asked for it."""

    def __init__(self, card: ModelCard, status: DownloadStatus) -> None:
        self.card = card
        self.status = status
        self.pinned: bool | None = None
        self.is_asked = False
        self.waiters = 0
        self.task: asyncio.Task[None] | None = None
        self.ended = asyncio.Event()
        self.rate = Rate()

    @property
    def is_running(self) -> bool:
        return not self.ended.is_set()


class Rate:
    """Bytes a second over the last seconds."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def add(self, now: float, done_bytes: int) -> float:
        """Takes in how far it is; the speed."""
        self._seen = [one for one in self._seen if now - one[0] <= SPEED_OVER_S][-100:]
        self._seen.append((now, done_bytes))
        (first_at, first), (last_at, last) = self._seen[0], self._seen[-1]
        return max(0.0, (last - first) / (last_at - first_at)) if last_at > first_at else 0.0


class Downloads:
    """See the module. Single event loop; keep `run` going before anything is asked.

    Args:
        tasks: runs the fetches.
        neighbours: who else has a model, asked when its fetch begins.
        in_use: ids of models that are placed on this node.
        on_change: awaited after files came or went.
    """

    def __init__(
        self,
        shelf: Shelf,
        catalogue: Catalogue,
        tasks: Tasks,
        clock: Clock,
        *,
        rules: Rules,
        neighbours: Callable[[ModelCard], tuple[Neighbour, ...]],
        in_use: Callable[[], Set[str]],
        on_change: Callable[[], Awaitable[None]],
    ) -> None:
        self.shelf: Final = shelf
        self._catalogue = catalogue
        self._tasks = tasks
        self._clock = clock
        self.rules: Final = rules
        self._neighbours = neighbours
        self._in_use = in_use
        self._on_change = on_change
        self._jobs: dict[str, _Job] = {}
        self._places = asyncio.Semaphore(AT_ONCE)
        self._room = asyncio.Lock()
        self._group: asyncio.TaskGroup | None = None
        self.started: Final = asyncio.Event()

    async def run(self) -> None:
        """Owns the downloads until cancelled; then their processes are ended."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            self.started.set()
            try:
                await self._go_on()
                await asyncio.get_running_loop().create_future()
            finally:
                self._group = None

    async def _go_on(self) -> None:
        """Begins what a person asked for before the node's last end."""
        for shelved in await _to_its_end(self.shelf.all):
            if shelved.asked:
                log.info("going on with %s", shelved.card.model_id)
                with contextlib.suppress(SkulkError):
                    self.begin(shelved.card)

    def statuses(self) -> tuple[DownloadStatus, ...]:
        """What runs, and what ended badly within the last hour; by model id."""
        now = self._clock.wall()
        old = [
            name for name, job in self._jobs.items() if not job.is_running and now - job.status.since > FAILED_KEPT_S
        ]
        for name in old:
            del self._jobs[name]
        return tuple(self._jobs[name].status for name in sorted(self._jobs))

    def status(self, model_id: str) -> DownloadStatus | None:
        """One of them."""
        job = self._jobs.get(model_id)
        return None if job is None else job.status

    def has(self, card: ModelCard) -> bool:
        """Whether exactly this model lies here, whole."""
        try:
            entry = self._catalogue.find(card.model_id)
        except RequestError:
            return False
        if not entry.is_held:
            return False
        here = {file.name: file for file in entry.card.all_files}
        for file in card.all_files:
            own = here.get(file.name)
            if file.sha256 is None and own is None:
                continue
            if (
                own is None
                or own.size_bytes != file.size_bytes
                or (own.sha256 or file.sha256) != (file.sha256 or own.sha256)
            ):
                return False
        return True

    def can_fetch(self, card: ModelCard) -> bool:
        """Whether anybody is known who may give a model: the hub, or a neighbour."""
        is_on_hub = not self.rules.no_hub and bool(card.repo) and bool(card.revision)
        return is_on_hub or bool(self._neighbours(card))

    def begin(self, card: ModelCard, *, pinned: bool | None = None) -> DownloadStatus:
        """Sees to it that a model comes; returns at once. One that failed is begun anew.

        Raises:
            RequestError: ``invalid_request``: the card names no place.
            UnavailableError, ServiceError: nothing more is taken.
        """
        job = self._job(card)
        now = self._clock.wall()
        if job is None:
            if self.shelf.find(card.model_id) is not None:
                self.shelf.keep(card, now, pinned=pinned, asked=False)
            return _whole(card, now)
        job.is_asked = True
        job.pinned = job.pinned if pinned is None else pinned
        self.shelf.keep(card, now, pinned=job.pinned, asked=True)
        return job.status

    async def fetch(self, card: ModelCard) -> None:
        """Returns when a model is here. When the wait is cancelled and nobody else wants it, the download ends.

        Raises:
            SkulkError: why it failed.
        """
        # a node that starts again has runners to bring up before everything of it runs
        await self.started.wait()
        job = self._job(card)
        if job is None:
            return
        job.waiters += 1
        try:
            await job.ended.wait()
        finally:
            job.waiters -= 1
            if job.is_running and not job.waiters and not job.is_asked:
                self._end(job)
        if job.status.error is not None:
            raise job.status.error.to_error()

    async def cancel(self, model_id: str) -> DownloadStatus:
        """Ends a download; returns when its process is gone.

        Raises:
            RequestError: ``download_not_found``.
        """
        job = self._jobs.get(model_id)
        if job is None:
            raise RequestError("download_not_found", f"{model_id[:200]} isn't being fetched here; see GET /state.")
        if job.is_running:
            self._end(job)
            await job.ended.wait()
        if self.shelf.find(model_id) is not None:
            self.shelf.keep(job.card, self._clock.wall(), asked=False)
        return job.status

    def card_of(self, model_id: str) -> ModelCard | None:
        """Of a model that was asked for lately, though none of its files may be here yet."""
        job = self._jobs.get(model_id)
        return None if job is None else job.card

    def forget(self, card: ModelCard) -> int:
        """Drops what came of a model that isn't fetched now; returns the bytes freed."""
        self._jobs.pop(card.model_id, None)
        return self.shelf.drop_parts(part_key(card.model_id, file) for file in card.all_files)

    def _job(self, card: ModelCard) -> _Job | None:
        """The running job of a model, begun now if need be; None: it is here."""
        job = self._jobs.get(card.model_id)
        if job is not None and job.is_running:
            return job
        if self.has(card):
            self._jobs.pop(card.model_id, None)
            return None
        self.shelf.place_of(card)
        if self._group is None or len(self._jobs) >= MAX_JOBS:
            raise ServiceError("download_failed", "this node takes no more downloads now; try again later.")
        status = DownloadStatus(
            model_id=card.model_id, phase="waiting", total_bytes=card.size_bytes, since=self._clock.wall()
        )
        job = self._jobs[card.model_id] = _Job(card, status)
        job.task = self._group.create_task(self._work(job), name=f"download-{card.model_id}")
        job.task.add_done_callback(lambda _: self._settle(job))
        return job

    def _settle(self, job: _Job) -> None:
        """The last word, also where a task was ended before it began."""
        if job.is_running:
            error = RequestError("download_cancelled", f"the download of {job.card.model_id} was ended.")
            self._set(job, "cancelled", error=ErrorBody.of(error))
            job.ended.set()

    def _end(self, job: _Job) -> None:
        if job.task is not None:
            job.task.cancel()

    async def _work(self, job: _Job) -> None:
        """The life of one download; whatever its end, whoever waits is told."""
        try:
            async with self._places:
                await self._fetch(job)
        except asyncio.CancelledError:
            error = RequestError("download_cancelled", f"the download of {job.card.model_id} was ended.")
            self._set(job, "cancelled", error=ErrorBody.of(error))
            if self._group is None:
                raise
        except SkulkError as error:
            log.warning("the download of %s failed: %s", job.card.model_id, error)
            self._set(job, "failed", error=ErrorBody.of(error))
        except Exception as error:  # the border: a defect around one download doesn't take the node with it
            log.exception("the download of %s failed", job.card.model_id)
            failed = ServiceError("download_failed", f"{job.card.model_id}: {error}; the node's log has more.")
            self._set(job, "failed", error=ErrorBody.of(failed))
        finally:
            job.ended.set()

    async def _fetch(self, job: _Job) -> None:
        card = job.card
        self._set(job, "fetching")
        await self._make_room(job)
        task = FetchTask(
            card=card,
            folder=str(self.shelf.place_of(card)),
            parts=str(self.shelf.parts),
            neighbours=self._neighbours(card),
            no_hub=self.rules.no_hub,
            limits=self.rules.limits,
        )
        whole = await self._tasks.fetch(task, lambda progress: self._progress(job, progress))
        await _to_its_end(self._take_in, job, whole)
        await self._on_change()
        self._set(job, "done", done_bytes=whole.size_bytes)
        self._jobs.pop(card.model_id, None)
        log.info("%s is here, %d bytes", card.model_id, whole.size_bytes)

    def _take_in(self, job: _Job, whole: ModelCard) -> None:
        """Keeps the card with all hashes, so that nothing is hashed again."""
        self.shelf.keep(whole, self._clock.wall(), pinned=job.pinned, asked=False)
        self.shelf.touch(whole.model_id, self._clock.wall())
        for file, path in zip(whole.all_files, self.shelf.files_of(whole), strict=True):
            assert file.sha256 is not None
            self._catalogue.note_verified(path, file.sha256)
        self._catalogue.rescan()

    async def _make_room(self, job: _Job) -> None:
        """Keeps the card, and evicts what the budget asks for; one at a time, so that two don't count on one room."""
        async with self._room:
            fetching = {name: other.card for name, other in self._jobs.items() if other.is_running}
            gone = await _to_its_end(self._evict, job, fetching, self._in_use() | fetching.keys())
            if gone:
                await self._on_change()

    def _evict(self, job: _Job, fetching: Mapping[str, ModelCard], in_use: Set[str]) -> tuple[str, ...]:
        card = job.card
        models = [
            OnDisk(
                model_id=one.card.model_id,
                # what is on its way has its room already
                held_bytes=max(
                    self.shelf.held_bytes(one.card), one.card.size_bytes if one.card.model_id in fetching else 0
                ),
                used_at=one.used_at,
                is_kept=one.pinned,
            )
            for one in self.shelf.all()
            if one.card.model_id != card.model_id
        ]
        going = evictions(
            models,
            needed_bytes=card.size_bytes,
            budget_bytes=self.rules.budget_bytes,
            in_use=in_use,
        )
        for model_id in going:
            log.info("%s is removed: the disk budget is needed for %s", model_id, card.model_id)
            self.shelf.remove(model_id)
        self.shelf.keep(card, self._clock.wall(), pinned=job.pinned)
        if going:
            self._catalogue.rescan()
        return going

    def _progress(self, job: _Job, progress: Progress) -> None:
        speed = job.rate.add(self._clock.now(), progress.done_bytes)
        left = progress.total_bytes - progress.done_bytes
        job.status = msgspec.structs.replace(
            job.status,
            phase="verifying" if progress.phase == "verifying" else "fetching",
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            speed=round(speed, 1),
            eta_s=round(left / speed, 1) if speed > 0 else None,
            sources=progress.sources,
        )

    def _set(
        self, job: _Job, phase: DownloadPhase, *, done_bytes: int | None = None, error: ErrorBody | None = None
    ) -> None:
        done = job.status.done_bytes if done_bytes is None else done_bytes
        job.status = msgspec.structs.replace(
            job.status, phase=phase, done_bytes=done, speed=0.0, eta_s=None, error=error, since=self._clock.wall()
        )


def _whole(card: ModelCard, now: float) -> DownloadStatus:
    return DownloadStatus(
        model_id=card.model_id, phase="done", done_bytes=card.size_bytes, total_bytes=card.size_bytes, since=now
    )
