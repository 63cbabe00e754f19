"""The store service of a node: resolve, search, add, pull, stop, remove, verify; each a call on the bus."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec

from skulk.bus.port import Bus, Call
from skulk.bus.subjects import (
    STORE_ADD,
    STORE_PULL,
    STORE_REMOVE,
    STORE_RESOLVE,
    STORE_SEARCH,
    STORE_STOP,
    STORE_VERIFY,
)
from skulk.clock import Clock
from skulk.errors import RequestError, SkulkError
from skulk.models.catalogue import Catalogue, CatalogueEntry
from skulk.models.hints import with_hint
from skulk.models.reference import is_reference, parse_reference
from skulk.models.shelf import Shelf, remove_empty, remove_file
from skulk.models.tasks import ResolveTask, SearchTask
from skulk.node.children import Tasks
from skulk.node.downloads import Downloads
from skulk.wire.model import ModelCard
from skulk.wire.store import (
    AddModel,
    CancelPull,
    DownloadStatus,
    FoundModels,
    PullModel,
    RemovedModel,
    RemoveModel,
    ResolveModel,
    SearchModels,
    VerifiedModel,
    VerifyModel,
)

log = logging.getLogger("skulk.node")

RESOLVED_KEPT_S: Final = 60.0
MAX_RESOLVED: Final = 200
MAX_FOUND: Final = 100


class Store:
    """What a node does with models when it is asked. Keep `run` going.

    Args:
        in_use: ids of models that are placed on this node.
        on_change: awaited after files came or went.
    """

    def __init__(
        self,
        bus: Bus,
        node_id: str,
        clock: Clock,
        *,
        shelf: Shelf,
        catalogue: Catalogue,
        tasks: Tasks,
        downloads: Downloads,
        in_use: Callable[[], frozenset[str]],
        on_change: Callable[[], Awaitable[None]],
    ) -> None:
        self._bus = bus
        self._node_id = node_id
        self._clock = clock
        self._shelf = shelf
        self._catalogue = catalogue
        self._tasks = tasks
        self._downloads = downloads
        self._in_use = in_use
        self._on_change = on_change
        self._resolved: dict[str, tuple[float, ModelCard]] = {}
        self._hashing = asyncio.Lock()

    async def run(self) -> None:
        """Answers until cancelled."""
        handlers = {
            STORE_RESOLVE: self._resolve,
            STORE_SEARCH: self._search,
            STORE_ADD: self._add,
            STORE_PULL: self._pull,
            STORE_STOP: self._stop,
            STORE_REMOVE: self._remove,
            STORE_VERIFY: self._verify,
        }
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._downloads.run(), name="downloads")
            await self._downloads.started.wait()
            service = await self._bus.serve("store", handlers, node=self._node_id)
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                await service.close(drain_s=0.0)

    async def resolve(self, name: str) -> ModelCard:
        """The card of a model that this node knows, else of a name of the hub; what was resolved within the last minute
        is told again.

        Raises:
            SkulkError: what the hub says; ``model_not_found``: this node must not ask it.
        """
        try:
            return self._catalogue.find(name).card
        except RequestError as error:
            if error.code != "model_not_found" or not is_reference(name):
                raise
        reference = parse_reference(name)
        known = self._resolved.get(reference.model_id)
        if known is not None and self._clock.now() - known[0] < RESOLVED_KEPT_S:
            return known[1]
        self._check_hub(name)
        hint = self._catalogue.hint_of(reference.repo)
        task = ResolveTask(name=reference.model_id)
        if hint is not None:
            task = ResolveTask(name=reference.model_id, quantization=hint.quantization, file=hint.file)
        card = await self._tasks.ask(task, ModelCard)
        if hint is not None:
            card = with_hint(card, hint)
        if len(self._resolved) >= MAX_RESOLVED:
            self._resolved.clear()
        self._resolved[reference.model_id] = (self._clock.now(), card)
        return card

    def _check_hub(self, what: str) -> None:
        if no_hub := self._downloads.rules.no_hub:
            raise RequestError(
                "model_not_found",
                f"{what[:200]!r} is not known here, and {no_hub}; put its files into a folder.",
                param="model_id",
            )

    async def _resolve(self, call: Call[ResolveModel]) -> ModelCard:
        return await self.resolve(call.message.name)

    async def _search(self, call: Call[SearchModels]) -> FoundModels:
        asked = call.message
        if not 1 <= asked.limit <= MAX_FOUND:
            raise RequestError("invalid_request", f"limit {asked.limit} is not from 1 to {MAX_FOUND}", param="limit")
        self._check_hub(asked.query)
        return await self._tasks.ask(SearchTask(query=asked.query[:200], limit=asked.limit), FoundModels)

    async def _add(self, call: Call[AddModel]) -> ModelCard:
        card = call.message.card
        await asyncio.to_thread(self._shelf.keep, card, self._clock.wall())
        await asyncio.to_thread(self._catalogue.rescan)
        return card

    async def _pull(self, call: Call[PullModel]) -> DownloadStatus:
        return self._downloads.begin(call.message.card, pinned=call.message.pinned)

    async def _stop(self, call: Call[CancelPull]) -> DownloadStatus:
        return await self._downloads.cancel(call.message.model_id)

    async def _remove(self, call: Call[RemoveModel]) -> RemovedModel:
        model_id = call.message.model_id
        if model_id in self._in_use():
            raise RequestError(
                "model_in_use",
                f"{model_id} is placed on this node; delete its instances first ('skulk rm').",
                param="model_id",
            )
        running = self._downloads.status(model_id)
        if running is not None and running.phase in ("waiting", "fetching", "verifying"):
            await self._downloads.cancel(model_id)
        freed = await asyncio.to_thread(self._remove_files, model_id)
        await self._on_change()
        return RemovedModel(model_id=model_id, freed_bytes=freed)

    def _remove_files(self, model_id: str) -> int:
        shelved = self._shelf.find(model_id)
        if shelved is not None:
            freed = self._downloads.forget(shelved.card) + self._shelf.remove(model_id)
            self._catalogue.rescan()
            return freed
        try:
            entry = self._catalogue.find(model_id)
        except RequestError:
            asked = self._downloads.card_of(model_id)
            if asked is None:
                raise
            # Ended before the first of its files came.
            return self._downloads.forget(asked)
        freed = remove_own_files(entry, self._shelf.folder)
        self._catalogue.rescan()
        return freed

    async def _verify(self, call: Call[VerifyModel]) -> VerifiedModel:
        entry = self._catalogue.find(call.message.model_id)
        is_cancelled = threading.Event()

        def on_block(_: int) -> None:
            if is_cancelled.is_set():
                raise InterruptedError("nobody waits for it any more")

        async with self._hashing:
            try:
                verified = await asyncio.to_thread(self._hash, entry, on_block)
            finally:
                is_cancelled.set()
        if verified.problem:
            await self._on_change()
        return verified

    def _hash(self, entry: CatalogueEntry, on_block: Callable[[int], None]) -> VerifiedModel:
        card = entry.card
        is_pinned = all(file.sha256 is not None for file in card.all_files)
        self._catalogue.forget_digests(entry)
        try:
            digests = self._catalogue.verify(entry, on_block)
        except SkulkError as error:
            if error.code == "model_not_found":
                raise
            return VerifiedModel(model_id=card.model_id, problem=error.detail, is_pinned=is_pinned)
        files = tuple(
            msgspec.structs.replace(file, sha256=digest) for file, digest in zip(card.all_files, digests, strict=True)
        )
        return VerifiedModel(model_id=card.model_id, is_pinned=is_pinned, files=files)


def remove_own_files(entry: CatalogueEntry, folder: Path) -> int:
    """Removes files that lie in the node's own models folder, whoever put them there; returns the bytes freed.

    Raises:
        RequestError: ``invalid_request``: they lie elsewhere; ``model_not_found``: there are none.
    """
    name = entry.card.model_id
    if not entry.all_paths:
        raise RequestError("model_not_found", f"the files of {name} don't lie on this node.", param="model_id")
    foreign = next((path for path in entry.all_paths if not path.is_relative_to(folder)), None)
    if foreign is not None:
        raise RequestError(
            "invalid_request", f"{foreign} lies in a folder that is only read; remove it there.", param="model_id"
        )
    freed = sum(remove_file(path) for path in entry.all_paths)
    remove_empty(entry.all_paths[0].parent, folder)
    return freed
