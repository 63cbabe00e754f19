"""Calls to the store services of nodes: what the gateway knows of models beyond its own catalogue."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final, TypeVar

from aiohttp import web

from skulk.bus.port import Bus
from skulk.bus.replica import Replica
from skulk.bus.subjects import (
    STORE_ADD,
    STORE_PULL,
    STORE_REMOVE,
    STORE_RESOLVE,
    STORE_SEARCH,
    STORE_STOP,
    STORE_VERIFY,
    Endpoint,
)
from skulk.cluster.view import ClusterView, NodeView
from skulk.errors import RequestError, SkulkError
from skulk.gateway.cards import Cards, KnownModel, ready_first, state_of
from skulk.models.catalogue import Catalogue
from skulk.models.reference import is_reference
from skulk.wire.model import HeldModel, ModelCard
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

R = TypeVar("R")

HUB_WAIT_S: Final = 70.0
CALL_WAIT_S: Final = 15.0
LIST_WAIT_S: Final = 2.0
ASKED_AT_ONCE: Final = 16
HASH_WAIT_S: Final = 3_600.0
# Kept from a client that only asked whether a model is known: there is none, whatever the reason.
_HUB_SILENT: Final = ("hub_unreachable", "deadline_exceeded", "unreachable", "hub_failed", "download_failed")


class Stores:
    """The nodes' stores.

    Args:
        node_id: the gateway's own node; it is asked first.
        catalogue: of this node; looked through again when a card was added.
    """

    def __init__(self, bus: Bus, replica: Replica, node_id: str, catalogue: Catalogue, cards: Cards) -> None:
        self._bus = bus
        self._replica = replica
        self._node_id = node_id
        self._catalogue = catalogue
        self._cards = cards
        self._elsewhere: dict[HeldModel, ModelCard] = {}

    async def all(self) -> tuple[KnownModel, ...]:
        """Every model that is placed, in the catalogue of this node, or on the disk of another: ready ones first.

        Cards of other nodes are asked for once. A node that doesn't answer within `LIST_WAIT_S` leaves out its own.
        """
        known = {model.card.model_id: model for model in self._cards.all()}
        view = self._replica.view
        held = {
            one.model_id: (one, node_id)
            for node_id, node in sorted(view.nodes.items())
            for one in node.beat.models
            if one.model_id not in known
        }
        self._elsewhere = {one: self._elsewhere[one] for one, _ in held.values() if one in self._elsewhere}
        unknown = [(one, node_id) for one, node_id in held.values() if one not in self._elsewhere]
        for at in range(0, len(unknown), ASKED_AT_ONCE):
            await asyncio.gather(*(self._learn(one, node_id) for one, node_id in unknown[at : at + ASKED_AT_ONCE]))
        others = (self._elsewhere[one] for one, _ in held.values() if one in self._elsewhere)
        return ready_first(
            (*known.values(), *(KnownModel(card=card, state=state_of(view, card.model_id)) for card in others))
        )

    async def _learn(self, held: HeldModel, node_id: str) -> None:
        question = ResolveModel(name=held.model_id)
        with contextlib.suppress(SkulkError):
            card = await self._bus.request(STORE_RESOLVE, question, timeout_s=LIST_WAIT_S, node=node_id)
            self._elsewhere[held] = card

    async def known(self, model_id: str, *, param: str, may_ask_hub: bool = True) -> KnownModel:
        """A model by its id: placed, in the catalogue, on another node's disk, or else, where that may be, on the hub.

        Raises:
            RequestError: ``model_not_found`` with the call that searches; what the hub says of it.
            UnavailableError: ``hub_rate_limited``.
        """
        try:
            return self._cards.need(model_id, param=param)
        except RequestError as error:
            if error.code != "model_not_found":
                raise
            unknown = error
        if (held := await self._held_elsewhere(model_id)) is not None:
            return held
        if not may_ask_hub or not is_reference(model_id) or not self._hub_nodes():
            raise unknown
        try:
            card = await self.resolve(model_id)
        except SkulkError as error:
            if error.code in _HUB_SILENT or error.code == "model_not_found":
                detail = f"{unknown.detail} The hub was asked too: {error.detail}"
                raise RequestError("model_not_found", detail, param=param) from error
            error.param = param
            raise
        return KnownModel(card=card, state=state_of(self._replica.view, card.model_id))

    async def _held_elsewhere(self, model_id: str) -> KnownModel | None:
        """A model that lies on another node's disk, by that node's card."""
        for node_id in self.holders(model_id)[:3]:
            question = ResolveModel(name=model_id)
            with contextlib.suppress(SkulkError):
                card = await self._bus.request(STORE_RESOLVE, question, timeout_s=CALL_WAIT_S, node=node_id)
                return KnownModel(card=card, state=state_of(self._replica.view, model_id))
        return None

    async def resolve(self, name: str) -> ModelCard:
        """A card of the hub, by a node that may ask it: the own one first.

        Raises:
            SkulkError: what the last of them answered; ``model_not_found``: no node may.
        """
        return await self._ask_hub(STORE_RESOLVE, ResolveModel(name=name))

    async def search(self, query: str, limit: int) -> FoundModels:
        """What the hub finds; raises as `resolve`."""
        return await self._ask_hub(STORE_SEARCH, SearchModels(query=query, limit=limit))

    def may_ask_hub(self) -> bool:
        """Whether any node may."""
        return bool(self._hub_nodes())

    async def add(self, card: ModelCard) -> None:
        """Has the own node know a model, and knows it here at once."""
        await self._bus.request(STORE_ADD, AddModel(card=card), timeout_s=CALL_WAIT_S, node=self._node_id)
        await asyncio.to_thread(self._catalogue.rescan)

    async def pull(self, node_id: str, card: ModelCard, *, pinned: bool | None = None) -> DownloadStatus:
        """Has a node fetch a model."""
        return await self._bus.request(
            STORE_PULL, PullModel(card=card, pinned=pinned), timeout_s=CALL_WAIT_S, node=node_id
        )

    async def stop(self, node_id: str, model_id: str) -> DownloadStatus:
        """Ends a download."""
        return await self._bus.request(STORE_STOP, CancelPull(model_id=model_id), timeout_s=CALL_WAIT_S, node=node_id)

    async def remove(self, node_id: str, model_id: str) -> RemovedModel:
        """Deletes a model's files from a node."""
        return await self._bus.request(
            STORE_REMOVE, RemoveModel(model_id=model_id), timeout_s=CALL_WAIT_S, node=node_id
        )

    async def verify(self, node_id: str, model_id: str) -> VerifiedModel:
        """Hashes a model's files on a node."""
        return await self._bus.request(
            STORE_VERIFY, VerifyModel(model_id=model_id), timeout_s=HASH_WAIT_S, node=node_id
        )

    def node(self, name: str) -> str:
        """A live node by its id or its name; empty: the own one where it runs models, else the first that does.

        Raises:
            RequestError: ``node_not_found``.
        """
        nodes = self._replica.view.nodes
        if not name:
            full = sorted(node_id for node_id, node in nodes.items() if node.beat.role == "full")
            if self._node_id in full or not full:
                return self._node_id
            return full[0]
        named = [node_id for node_id, node in nodes.items() if name in (node_id, node.beat.name)]
        if len(named) != 1:
            known = ", ".join(sorted(f"{node_id} ({node.beat.name})" for node_id, node in nodes.items())[:20])
            what = "more than one node is called" if named else "no node is called"
            raise RequestError("node_not_found", f"{what} {name[:200]!r}; there are {known}.", param="node_id")
        return named[0]

    def holders(self, model_id: str) -> tuple[str, ...]:
        """The nodes that have a model's files."""
        view = self._replica.view
        return tuple(sorted(node_id for node_id, node in view.nodes.items() if _holds(node, model_id)))

    def statuses(self, model_id: str) -> dict[str, DownloadStatus]:
        """What nodes say of a model's download, by node id."""
        return {
            node_id: status
            for node_id, node in sorted(self._replica.view.nodes.items())
            for status in node.beat.downloads
            if status.model_id == model_id
        }

    @property
    def view(self) -> ClusterView:
        return self._replica.view

    def _hub_nodes(self) -> list[str]:
        nodes = [node_id for node_id, node in self._replica.view.nodes.items() if node.beat.hub]
        return sorted(nodes, key=lambda node_id: (node_id != self._node_id, node_id))[:3]

    async def _ask_hub(self, endpoint: Endpoint[Any, R], message: Any) -> R:
        failure: SkulkError = RequestError(
            "model_not_found", "no node of this cluster may ask the hub; put the files into a folder of a node."
        )
        for node_id in self._hub_nodes():
            try:
                return await self._bus.request(endpoint, message, timeout_s=HUB_WAIT_S, node=node_id)
            except SkulkError as error:
                failure = error
                if error.code not in _HUB_SILENT:
                    break
        raise failure


STORES: Final = web.AppKey("stores", Stores)


def _holds(node: NodeView, model_id: str) -> bool:
    return any(held.model_id == model_id for held in node.beat.models)
