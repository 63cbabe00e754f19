"""Buses of both forms for the suite that both must pass."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.bus import BusWorld, MemoryWorld, NatsWorld
from tests.support.nats import NatsServer


@pytest.fixture(scope="session")
def nats_server() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


@pytest.fixture(params=["memory", "nats"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[BusWorld]:
    """One broker with clients of its own cluster: in memory, and a real nats-server."""
    kind: str = request.param
    made = MemoryWorld() if kind == "memory" else NatsWorld(request.getfixturevalue("nats_server"))
    async with made as world:
        yield world


@pytest.fixture(params=["memory", "nats"])
async def small_world(request: pytest.FixtureRequest) -> AsyncIterator[BusWorld]:
    """The same with a limit of 64 KiB a message."""
    if request.param == "memory":
        async with MemoryWorld(max_payload=65_536) as world:
            yield world
    else:
        with NatsServer("max_payload: 65536\n") as server:
            async with NatsWorld(server) as world:
                yield world
