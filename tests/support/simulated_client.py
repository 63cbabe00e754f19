"""A gateway's part in placing and deleting."""

from __future__ import annotations

import asyncio
import random

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.replica import Replica
from skulk.bus.subjects import GATEWAY_BEAT
from skulk.gateway.masters import Masters
from skulk.wire.beats import GatewayBeat
from tests.support.simulated_node import MODELS
from tests.support.virtual_time import VirtualClock


class Client:
    """It, without streams."""

    def __init__(self, hub: MemoryHub, name: str, clock: VirtualClock) -> None:
        self.name = name
        self.bus = MemoryBus(hub, cluster="test", name=name, clock=clock)
        self.incarnation = "0001"
        self.replica = Replica(self.bus, clock)
        self.masters = Masters(self.bus, self.replica, clock)
        self.task: asyncio.Task[None] | None = None

    async def run(self, dice: random.Random) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.replica.run())
            tasks.create_task(self._beat(dice))

    async def _beat(self, dice: random.Random) -> None:
        """Requests wait for a model now and then."""
        waiting: tuple[str, ...] = ()
        while True:
            if dice.random() < 0.1:
                waiting = (dice.choice(MODELS),) if dice.random() < 0.5 else ()
            beat = GatewayBeat(
                gateway_id=self.name, incarnation=self.incarnation, node_id="n0", at=0.0, waiting=waiting
            )
            if self.bus.state == "connected":
                await self.bus.publish(GATEWAY_BEAT, beat, gateway=self.name)
            await asyncio.sleep(1.0)
