"""A node's store service as a script: what a gateway asks about weights."""

from __future__ import annotations

from typing import Any

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
from skulk.errors import SkulkError
from skulk.wire.model import ModelCard
from skulk.wire.store import DownloadStatus, FoundModel, FoundModels, RemovedModel, VerifiedModel
from tests.support.http import MODEL, NODE
from tests.support.states import card

HUB_MODEL = "org/far-GGUF:Q8_0"
FAR = msgspec.structs.replace(card(HUB_MODEL), repo="org/far-GGUF", revision="c0ffee")


class FakeStore:
    """A node's store service. ``refusal``: what the hub says."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.refusal: SkulkError | None = None
        self.problem = ""

    async def start(self, bus: Bus) -> None:
        handlers = {
            STORE_RESOLVE: self._resolve,
            STORE_SEARCH: self._search,
            STORE_ADD: self._add,
            STORE_PULL: self._pull,
            STORE_STOP: self._stop,
            STORE_REMOVE: self._remove,
            STORE_VERIFY: self._verify,
        }
        self.service = await bus.serve("store", handlers, node=NODE)

    def _note(self, call: Call[Any]) -> None:
        self.asked.append(call.message)
        if self.refusal is not None:
            raise self.refusal

    async def _resolve(self, call: Call[Any]) -> ModelCard:
        self._note(call)
        return FAR

    async def _search(self, call: Call[Any]) -> FoundModels:
        self._note(call)
        return FoundModels(found=(FoundModel(repo="org/far-GGUF", downloads=5), FoundModel(repo=MODEL)))

    async def _add(self, call: Call[Any]) -> ModelCard:
        self._note(call)
        return call.message.card

    async def _pull(self, call: Call[Any]) -> DownloadStatus:
        self._note(call)
        return DownloadStatus(model_id=call.message.card.model_id, phase="waiting", total_bytes=100)

    async def _stop(self, call: Call[Any]) -> DownloadStatus:
        self._note(call)
        return DownloadStatus(model_id=call.message.model_id, phase="cancelled")

    async def _remove(self, call: Call[Any]) -> RemovedModel:
        self._note(call)
        return RemovedModel(model_id=call.message.model_id, freed_bytes=7)

    async def _verify(self, call: Call[Any]) -> VerifiedModel:
        self._note(call)
        return VerifiedModel(model_id=call.message.model_id, problem=self.problem, is_pinned=True)
