"""Models placed because somebody asked for an answer: `SKULK_AUTO_PLACE`.

    off       nothing is placed: 404, with the call to make
    cached    what lies on some node's disk
    any       also what a node may fetch from the hub

One placement a model at a time, whoever asks; the master makes one of those that several gateways ask for (ADR 11).
The placement goes on when the client who began it goes away: others may wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Literal

from skulk.bus.replica import Replica
from skulk.bus.subjects import MASTER_PLACE
from skulk.cluster.view import instances_of
from skulk.errors import SkulkError
from skulk.gateway.masters import Masters
from skulk.gateway.waiting import not_placed
from skulk.ids import new_id
from skulk.wire.commands import PlaceModel
from skulk.wire.model import ModelCard
from skulk.wire.placement import PlacementRequest

AutoPlace = Literal["cached", "any", "off"]
# The instance stays where its node has not answered yet: whoever waits for it waits on.
_PASSING: Final = ("deadline_exceeded",)


class Loads:
    """Owns the placements that this gateway has asked for.

    Args:
        card_of: finds the card of a model that requests may name; raises ``model_not_found``.
    """

    def __init__(
        self,
        masters: Masters,
        replica: Replica,
        auto_place: AutoPlace,
        card_of: Callable[[str], Awaitable[ModelCard]],
    ) -> None:
        self._masters = masters
        self._replica = replica
        self._auto_place = auto_place
        self._card_of = card_of
        self._placing: dict[str, asyncio.Task[None]] = {}

    async def place(self, model_id: str) -> None:
        """Returns when the model has an instance, ready or not.

        Raises:
            RequestError: ``model_not_placed``: it may not be placed on demand; ``unplaceable``: it fits nowhere.
            SkulkError: what the master answered.
        """
        if self._auto_place == "off":
            raise not_placed(model_id)
        task = self._placing.get(model_id)
        if task is None:
            task = self._placing[model_id] = asyncio.create_task(self._place(model_id), name=f"place {model_id}")
            task.add_done_callback(lambda done: self._placed(model_id, done))
        await asyncio.shield(task)

    async def close(self) -> None:
        """Asks no more; what the master has begun goes on."""
        tasks = tuple(self._placing.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _placed(self, model_id: str, done: asyncio.Task[None]) -> None:
        del self._placing[model_id]
        # nobody may be left who would take the failure
        if not done.cancelled():
            done.exception()

    async def _place(self, model_id: str) -> None:
        card = await self._card_of(model_id)
        if not self._may_place(card):
            raise not_placed(model_id)
        command = PlaceModel(command_id=new_id(), request=PlacementRequest(card=card), ensure=True, on_demand=True)
        try:
            reply = await self._masters.ask(MASTER_PLACE, command)
        except SkulkError as error:
            if error.code not in _PASSING or not instances_of(self._replica.view, model_id):
                raise
            return
        await self._masters.seen(reply.position, f"the instance {reply.instance_id} is placed")

    def _may_place(self, card: ModelCard) -> bool:
        nodes = tuple(self._replica.view.nodes.values())
        if any(held.model_id == card.model_id for node in nodes for held in node.beat.models):
            return True
        return self._auto_place == "any" and bool(card.repo) and any(node.beat.hub for node in nodes)
