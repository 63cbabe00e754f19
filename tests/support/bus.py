"""Buses for tests: one suite, two forms. `BusWorld` makes clients of one broker, whichever it is."""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, Generic, Self, TypeVar

from skulk.bus.core import CoreBus
from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.nats_bus import NatsBus
from skulk.bus.port import Bus, BusState
from tests.support.nats import NatsServer

M = TypeVar("M")

WAIT_S = 20.0
_numbers = itertools.count(1)


class ManualClock:
    """Time that moves when the test says so."""

    def __init__(self, now: float = 1_000.0) -> None:
        self.time = now

    def now(self) -> float:
        return self.time

    def wall(self) -> float:
        return 1_700_000_000.0 + self.time


class Collector(Generic[M]):
    """A handler that keeps what it is given, and can be waited for."""

    def __init__(self) -> None:
        self.items: list[M] = []
        self._more = asyncio.Event()

    def __call__(self, item: M) -> None:
        self.items.append(item)
        self._more.set()

    async def wait(self, count: int, timeout_s: float = WAIT_S) -> list[M]:
        """The items, as soon as there are ``count``."""
        async with asyncio.timeout(timeout_s):
            while len(self.items) < count:
                self._more.clear()
                await self._more.wait()
        return self.items


async def reached(bus: Bus, state: BusState, timeout_s: float = WAIT_S) -> None:
    """Waits until the bus is in this state."""
    there = asyncio.Event()
    end = bus.on_state(lambda now: there.set() if now == state else None)
    try:
        if bus.state != state:
            async with asyncio.timeout(timeout_s):
                await there.wait()
    finally:
        end()


async def until(is_so: Callable[[], bool], changed: asyncio.Event, timeout_s: float = WAIT_S) -> None:
    """Waits for a condition that only changes when ``changed`` is set."""
    async with asyncio.timeout(timeout_s):
        while not is_so():
            changed.clear()
            await changed.wait()


class BusWorld(ABC):
    """One broker and the clients that a test makes of it, closed at the end."""

    kind = ""

    def __init__(self) -> None:
        self.cluster = f"test{next(_numbers)}"
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def bus(self, name: str, **options: Any) -> CoreBus:
        """A connected client."""
        bus = await self.make(name, **options)
        self._stack.push_async_callback(bus.close)
        return bus

    @abstractmethod
    async def make(self, name: str, **options: Any) -> CoreBus: ...


class MemoryWorld(BusWorld):
    kind = "memory"

    def __init__(self, *, max_payload: int = 1_048_576) -> None:
        super().__init__()
        self.hub = MemoryHub(max_payload=max_payload)

    async def make(self, name: str, **options: Any) -> MemoryBus:
        return MemoryBus(self.hub, cluster=self.cluster, name=name, **options)


class NatsWorld(BusWorld):
    kind = "nats"

    def __init__(self, server: NatsServer) -> None:
        super().__init__()
        self.server = server

    async def make(self, name: str, **options: Any) -> NatsBus:
        bus = NatsBus(self.server.url, cluster=self.cluster, name=name, **options)
        await bus.connect()
        return bus
