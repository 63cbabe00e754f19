"""A gateway that runs and says nothing (stopped, stuck) is killed, so that its supervisor starts it again."""

from __future__ import annotations

import asyncio
from typing import Final

from skulk.bus.port import Bus, Received
from skulk.bus.subjects import GATEWAY_BEAT
from skulk.clock import Clock
from skulk.cluster.liveness import GATEWAY_SILENT_S
from skulk.supervision.supervisor import Supervised
from skulk.wire.beats import GatewayBeat

LOOK_EVERY_S: Final = 1.0
HUNG_S: Final = 2 * GATEWAY_SILENT_S
"""Twice the silence after which the runners have cancelled its requests anyway."""


class GatewayWatch:
    """Watches one supervised gateway by its beats; keep `run` going.

    Silence counts while the gateway serves and our own connection shows signs of life, from `restart` on.
    """

    def __init__(self, bus: Bus, clock: Clock, gateway: Supervised, gateway_id: str) -> None:
        self._bus = bus
        self._clock = clock
        self._gateway = gateway
        self._gateway_id = gateway_id
        self._heard_at = clock.now()

    def restart(self) -> None:
        """Begins to count anew: a gateway became ready, or the bus came back."""
        self._heard_at = self._clock.now()

    async def run(self) -> None:
        """Watches until cancelled."""
        subscription = await self._bus.subscribe(GATEWAY_BEAT, self._beat_heard, gateway=self._gateway_id)
        stop_watching = self._bus.on_state(lambda _state: self.restart())
        try:
            while True:
                await asyncio.sleep(LOOK_EVERY_S)
                self._look()
        finally:
            stop_watching()
            await subscription.close()

    def _beat_heard(self, _beat: Received[GatewayBeat]) -> None:
        self.restart()

    def _look(self) -> None:
        child = self._gateway.child
        if child is None or self._bus.state != "connected":
            self.restart()
        elif self._bus.heard_at - self._heard_at > HUNG_S:
            child.kill(f"no beat of it for {HUNG_S:.0f} s")
            self.restart()
