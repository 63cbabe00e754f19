"""Nodes reduced to what the mesh needs: a real nats-server, the launcher's mesh, a client for beats."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec

from skulk.bus.nats_bus import NatsBus
from skulk.bus.port import Received
from skulk.bus.subjects import NODE_BEAT
from skulk.cli.mesh import Mesh, known_at_start, routes_of
from skulk.cli.nats_settings import server_config
from skulk.clock import SystemClock
from skulk.errors import UnavailableError
from skulk.ids import new_incarnation
from skulk.settings import Settings
from skulk.supervision.nats_binary import find_nats_server
from skulk.supervision.nats_server import NatsEndpoint, NatsServer
from skulk.wire.beats import NodeBeat
from tests.support.states import beat
from tests.support.streams import cancel_and_wait

FULL_S = 20.0
BEAT_S = 0.25


class MeshNode:
    """One life of a node on loopback; `home` outlives it.

    Args:
        node_id: its name.
        home: its folder.
        peers: routes that it is told.
        seen_routes: by node id, the route by which this node sees that one, whatever it tells.
        changes: further settings.
    """

    def __init__(
        self,
        node_id: str,
        home: Path,
        peers: tuple[str, ...] = (),
        *,
        seen_routes: Mapping[str, str] | None = None,
        **changes: object,
    ) -> None:
        told: dict[str, object] = {"local": True, "nats_port": 0, "route_port": 0, "bootstrap_peers": peers, **changes}
        home.mkdir(exist_ok=True)
        self.node_id = node_id
        self.settings = Settings(home=str(home), models_dir="", **told)  # pyright: ignore[reportArgumentType]
        self.heard: dict[str, float] = {}
        self.heard_itself = asyncio.Event()
        self._incarnation = new_incarnation()
        self._seen_routes = seen_routes or {}
        self._beats: dict[str, NodeBeat] = {}
        self._stack = AsyncExitStack()

    async def start(self) -> MeshNode:
        """Starts its server, and the mesh with it."""
        clock = SystemClock()
        known, kept = known_at_start(self.settings, self.node_id)
        config = server_config(self.settings, self.node_id, self._incarnation, routes_of(known))
        server = NatsServer(find_nats_server(), Path(self.settings.home), config, kept=kept, clock=clock)
        self.server = server
        self._own(server.run(), "server")
        self.endpoint: NatsEndpoint = await server.wait_ready()
        self.mesh = Mesh(self.settings, known, config, server, clock, name="")
        self.mesh.follow(lambda: list(self._beats.values()))
        self._own(self.mesh.run(), "mesh")
        self.bus = await self.client("node")
        await self.bus.subscribe(NODE_BEAT, self._beat_heard)
        self._own(self._speak(), "beats")
        return self

    @property
    def route(self) -> str:
        return f"127.0.0.1:{self.endpoint.route_port}"

    async def client(self, name: str) -> NatsBus:
        """A client of its server, closed with the node."""
        password = self.endpoint.password or None
        bus = NatsBus(self.endpoint.client_url, cluster="test", name=name, user=password and "skulk", password=password)
        self._stack.push_async_callback(bus.close)
        await bus.connect()
        return bus

    async def stop(self) -> None:
        """Ends everything, the server by SIGKILL: what a power cut leaves."""
        await self._stack.aclose()
        self._stack = AsyncExitStack()

    async def until_joined(self, *others: str, timeout_s: float = FULL_S) -> None:
        """Waits until it has a route to exactly these nodes, and hears them."""

        def is_so() -> bool:
            return self.mesh.joined == frozenset(others) and self.heard.keys() >= set(others)

        await wait_for(is_so, timeout_s, lambda: f"{self.node_id}: {self.mesh.joined} {sorted(self.heard)}")

    async def until_hears(self, *others: str) -> None:
        """Waits until it hears these nodes."""
        await wait_for(
            lambda: self.heard.keys() >= set(others), FULL_S, lambda: f"{self.node_id}: {sorted(self.heard)}"
        )

    def forget_heard(self) -> None:
        """From now on only those count that speak again."""
        self.heard.clear()

    def _own(self, coroutine: object, name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)  # pyright: ignore[reportArgumentType]
        self._stack.push_async_callback(cancel_and_wait, task)

    def _beat_heard(self, received: Received[NodeBeat]) -> None:
        told = received.message
        if told.incarnation != self._incarnation and told.node_id == self.node_id:
            self.heard_itself.set()
        if told.node_id != self.node_id:
            self.heard[told.node_id] = self.bus.clock.now()
            seen = self._seen_routes.get(told.node_id)
            self._beats[told.node_id] = told if seen is None else msgspec.structs.replace(told, routes=(seen,))

    async def _speak(self) -> None:
        while True:
            mine = msgspec.structs.replace(beat(self.node_id), incarnation=self._incarnation, routes=self.mesh.routes)
            with contextlib.suppress(UnavailableError):  # a beat that finds no connection is none
                await self.bus.publish(NODE_BEAT, mine, node=self.node_id)
            await asyncio.sleep(BEAT_S)


async def wait_for(is_so: Callable[[], bool], timeout_s: float, tell: Callable[[], str]) -> None:
    """Waits for what only looking tells: servers of their own say nothing when a route comes up."""
    try:
        async with asyncio.timeout(timeout_s):
            while not is_so():  # noqa: ASYNC110 - there is nothing to await
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not so within {timeout_s} s: {tell()}") from None


async def until_full(*nodes: MeshNode, timeout_s: float = FULL_S) -> None:
    """Waits until each has a route to each other one, and hears it."""
    names = {node.node_id for node in nodes}
    await asyncio.gather(*(node.until_joined(*(names - {node.node_id}), timeout_s=timeout_s) for node in nodes))


@asynccontextmanager
async def ending(*nodes: MeshNode) -> AsyncGenerator[None]:
    """Stops the nodes at the end."""
    try:
        yield
    finally:
        await asyncio.gather(*(node.stop() for node in nodes))


def free_ports(count: int) -> list[int]:
    """Ports that nobody has now."""
    holders = [socket.socket() for _ in range(count)]
    try:
        for holder in holders:
            holder.bind(("127.0.0.1", 0))
        return [int(holder.getsockname()[1]) for holder in holders]
    finally:
        for holder in holders:
            holder.close()
