"""What handlers find in the application, by typed keys."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from skulk.bus.port import Bus
from skulk.bus.replica import Replica
from skulk.clock import Clock
from skulk.gateway.cards import Cards
from skulk.gateway.dispatch import Dispatcher
from skulk.gateway.masters import Masters
from skulk.gateway.metrics import Metrics
from skulk.gateway.questions import Asker
from skulk.wire.gateway import GatewaySpec

SPEC: Final = web.AppKey("spec", GatewaySpec)
BUS: Final[web.AppKey[Bus]] = web.AppKey("bus", Bus)
REPLICA: Final = web.AppKey("replica", Replica)
CLOCK: Final[web.AppKey[Clock]] = web.AppKey("clock", Clock)
CARDS: Final = web.AppKey("cards", Cards)
DISPATCHER: Final = web.AppKey("dispatcher", Dispatcher)
MASTERS: Final = web.AppKey("masters", Masters)
METRICS: Final = web.AppKey("metrics", Metrics)

REQUEST_ID: Final = web.RequestKey("request_id", str)
ASKER: Final = web.AppKey("asker", Asker)
