"""The gateway put together: what handlers use, who they let in, and the tasks that run beside them.

build_app ── keys ── middlewares: errors > doors ── routes
               └──── cleanup_ctx: replica, inbox, beats, catalogue; each task has its owner here
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

from aiohttp import web

from skulk.bus.port import Bus
from skulk.bus.replica import Replica
from skulk.bus.streams import Inbox
from skulk.bus.subjects import GATEWAY_BEAT
from skulk.clock import Clock
from skulk.cluster.liveness import GATEWAY_BEAT_S
from skulk.cluster.view import closed_as_told
from skulk.errors import UnavailableError
from skulk.gateway.cards import Cards
from skulk.gateway.dispatch import Dispatcher
from skulk.gateway.doors import DOORS, Doors, doors_middleware, read_keys
from skulk.gateway.errors import error_middleware, name_request
from skulk.gateway.instances import placeable
from skulk.gateway.keys import ASKER, BUS, CARDS, CLOCK, DISPATCHER, MASTERS, METRICS, REPLICA, SPEC
from skulk.gateway.loading import Loads
from skulk.gateway.masters import Masters
from skulk.gateway.metrics import Metrics
from skulk.gateway.questions import Asker
from skulk.gateway.routes import add_routes
from skulk.gateway.stores import STORES, Stores
from skulk.models.catalogue import Catalogue
from skulk.wire.beats import GatewayBeat
from skulk.wire.gateway import GatewaySpec
from skulk.wire.model import ModelCard

log = logging.getLogger("skulk.gateway")

RESCAN_S: Final = 30.0


class Faults:
    """Tells when a task beside the handlers ended that never should: then this process must end too."""

    def __init__(self) -> None:
        self.happened = asyncio.Event()

    @asynccontextmanager
    async def beside(self, work: Coroutine[Any, Any, None], name: str) -> AsyncGenerator[None]:
        """Runs ``work`` as long as the block lasts."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        try:
            yield
        finally:
            task.remove_done_callback(self._ended)
            task.cancel()
            await asyncio.wait({task})

    def _ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        log.critical("the task %s ended; this gateway can't go on", task.get_name(), exc_info=error)
        self.happened.set()


FAULTS: Final = web.AppKey("faults", Faults)
INBOX: Final = web.AppKey("inbox", Inbox)
CATALOGUE: Final = web.AppKey("catalogue", Catalogue)


def build_app(spec: GatewaySpec, bus: Bus, catalogue: Catalogue, clock: Clock) -> web.Application:
    """The application over a connected bus. Its own tasks begin with its start-up and end with its clean-up.

    Raises:
        StartError: ``config_invalid``: the API keys.
    """
    keys = read_keys(spec.api_keys)
    app = web.Application(
        middlewares=[error_middleware, doors_middleware],
        client_max_size=spec.max_body_bytes,
    )
    # its node's word, for a gateway has no routes of its own
    replica = Replica(bus, clock, closed=lambda: closed_as_told(replica.view, spec.node_id))
    inbox = Inbox(bus, spec.gateway_id, clock)
    app[SPEC] = spec
    app[BUS] = bus
    app[CLOCK] = clock
    app[REPLICA] = replica
    app[INBOX] = inbox
    app[CATALOGUE] = catalogue
    app[CARDS] = cards = Cards(replica, catalogue)
    app[STORES] = stores = Stores(bus, replica, spec.node_id, catalogue, cards)
    app[MASTERS] = masters = Masters(bus, replica, clock, spec.node_id)

    async def card_of(model_id: str) -> ModelCard:
        return placeable(await stores.known(model_id, param="model", may_ask_hub=spec.auto_place == "any"))

    loads = Loads(masters, replica, spec.auto_place, card_of)
    app[DISPATCHER] = Dispatcher(bus, replica, inbox, clock, spec, loads)
    app[ASKER] = Asker(bus, replica, clock, load_wait_s=spec.load_wait_s, place=loads.place)
    app[METRICS] = Metrics()
    app[DOORS] = Doors((spec.node_name, socket.gethostname()), spec.allowed_hosts, keys)
    app[FAULTS] = Faults()
    app.on_response_prepare.append(name_request)
    app.cleanup_ctx.extend([_follow, _collect, _dispatch, _beat, _rescan])
    add_routes(app)
    return app


async def _follow(app: web.Application) -> AsyncIterator[None]:
    replica = app[REPLICA]
    await replica.start()
    async with app[FAULTS].beside(replica.run(), "replica"):
        yield
    await replica.close()


async def _collect(app: web.Application) -> AsyncIterator[None]:
    inbox = app[INBOX]
    await inbox.start()
    async with app[FAULTS].beside(inbox.run(), "inbox"):
        yield
    await inbox.close()


async def _dispatch(app: web.Application) -> AsyncIterator[None]:
    yield
    await app[DISPATCHER].close()
    await app[ASKER].close()


async def _beat(app: web.Application) -> AsyncIterator[None]:
    async with app[FAULTS].beside(_send_beats(app), "gateway-beat"):
        yield


async def _rescan(app: web.Application) -> AsyncIterator[None]:
    async with app[FAULTS].beside(_look_for_models(app[CATALOGUE]), "catalogue"):
        yield


async def _send_beats(app: web.Application) -> None:
    spec, bus = app[SPEC], app[BUS]
    while True:
        beat = GatewayBeat(
            gateway_id=spec.gateway_id,
            incarnation=spec.incarnation,
            node_id=spec.node_id,
            at=app[CLOCK].wall(),
            open_streams=app[DISPATCHER].open_runs,
            waiting=app[DISPATCHER].waited_models,
        )
        try:
            await bus.publish(GATEWAY_BEAT, beat, gateway=spec.gateway_id)
        except UnavailableError as error:
            log.debug("no beat sent: %s", error)
        await asyncio.sleep(GATEWAY_BEAT_S)


async def _look_for_models(catalogue: Catalogue) -> None:
    """Takes up files that came or went; headers are read in a thread."""
    while True:
        await asyncio.sleep(RESCAN_S)
        await asyncio.to_thread(catalogue.rescan)
