"""Which models the gateway knows: what is placed anywhere, then what its own node's catalogue has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from skulk.bus.replica import Replica
from skulk.cluster.view import ClusterView, instances_of, phase_of
from skulk.errors import RequestError
from skulk.models.catalogue import Catalogue
from skulk.wire.model import ModelCard

ModelState = Literal["ready", "loading", "downloaded", "available"]
STATES: Final[tuple[ModelState, ...]] = ("ready", "loading", "downloaded", "available")


class KnownModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model and how near its next answer is; ``problem``: why its file here can't be served, else empty."""

    card: ModelCard
    state: ModelState
    problem: str = ""


class Cards:
    """The models that requests may name.

    Args:
        replica: for what is placed and what other nodes hold.
        catalogue: of this node.
    """

    def __init__(self, replica: Replica, catalogue: Catalogue) -> None:
        self._replica = replica
        self._catalogue = catalogue

    def all(self) -> tuple[KnownModel, ...]:
        """Every known model: ready ones first, then by id."""
        view = self._replica.view
        found = {entry.card.model_id: _known(view, entry.card, entry.problem) for entry in self._catalogue.entries()}
        for instance in view.state.instances.values():
            card = instance.request.card
            if card.model_id not in found:
                found[card.model_id] = _known(view, card, None)
        return ready_first(found.values())

    def need(self, model_id: str, *, param: str = "model") -> KnownModel:
        """A model by its id; placed ones come first, whatever lies on this node.

        Raises:
            RequestError: ``model_not_found``, with the call that searches; ``model_file_invalid``.
        """
        view = self._replica.view
        placed = instances_of(view, model_id)
        if placed:
            return _known(view, placed[0].request.card, None)
        try:
            entry = self._catalogue.find(model_id)
        except RequestError as error:
            raise RequestError(error.code, error.detail, param=param) from error
        return _known(view, entry.card, entry.problem)


def ready_first(models: Iterable[KnownModel]) -> tuple[KnownModel, ...]:
    """By state, then by id."""
    return tuple(sorted(models, key=lambda model: (STATES.index(model.state), model.card.model_id)))


def _known(view: ClusterView, card: ModelCard, problem: str | None) -> KnownModel:
    return KnownModel(card=card, state=state_of(view, card.model_id), problem=problem or "")


def state_of(view: ClusterView, model_id: str) -> ModelState:
    """How near the next answer of a model is."""
    phases = {phase_of(view, instance) for instance in instances_of(view, model_id)}
    if "ready" in phases:
        return "ready"
    if phases & {"placing", "loading"}:
        return "loading"
    held = any(model.model_id == model_id for node in view.nodes.values() for model in node.beat.models)
    return "downloaded" if held else "available"
