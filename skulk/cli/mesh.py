"""The mesh of nats-servers: peers become routes of the own server, and a person is told who isn't joined and why.

    mDNS, beats, <home>/peers.json, SKULK_BOOTSTRAP_PEERS ──> discovery.peers (pure) ──> routes ──reload──> nats-server
    its monitor: who is joined ─────every second──────────────────┘   ↑    └──> <home>/mesh.json, one log line a change
    routes that aren't joined: asked why ─────────────────────────────┘

A route appears within a second of its peer being heard. The reload drops no client (`skulk.supervision.nats_server`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from skulk import __version__
from skulk.cli.mesh_file import remove_mesh_file, write_mesh_file
from skulk.clock import Clock
from skulk.cluster.liveness import closed_since
from skulk.discovery.addresses import is_loopback_route, local_addresses, route_text
from skulk.discovery.adverts import Advert, fitting, proof_key, refusal_of, with_proof
from skulk.discovery.mdns import Mdns
from skulk.discovery.peers import (
    Known,
    Refused,
    Standing,
    due,
    standings,
    stuck,
    with_answer,
    with_heard,
    with_plan,
    with_refused,
    without_old,
    without_seen,
)
from skulk.discovery.probe import Caller, ask_route, node_of_server
from skulk.discovery.store import Remembered, load_peers, save_peers
from skulk.errors import SkulkError
from skulk.settings import Settings
from skulk.supervision.nats_config import LOOPBACK, NatsPorts, NatsServerConfig
from skulk.supervision.nats_monitor import joined_servers
from skulk.supervision.nats_server import NatsServer
from skulk.wire.base import PROTOCOL
from skulk.wire.beats import NodeBeat

log = logging.getLogger("skulk.mesh")

TICK_S: Final = 1.0
PROBE_TICK_S: Final = 0.5
PROBES: Final = 16
ANEW_S: Final = 5.0
LOOK_S: Final = 5.0


def known_at_start(settings: Settings, node_id: str) -> tuple[Known, NatsPorts]:
    """What a node knows before its server runs, with its routes chosen; and the ports to take again."""
    remembered = load_peers(Path(settings.home), settings.cluster)
    known = Known(
        node_id=node_id,
        local=settings.local,
        has_token=bool(settings.cluster_token),
        bootstrap=tuple(route for route in settings.bootstrap_peers if not settings.local or is_loopback_route(route)),
        neighbours={one.node_id: one for one in remembered.peers if one.node_id != node_id},
    )
    return with_plan(known, {}), NatsPorts(route=remembered.route_port)


def routes_of(known: Known) -> tuple[str, ...]:
    """The routes for the server's configuration."""
    return tuple(sorted(set(known.chosen.values())))


def own_routes(settings: Settings, port: int, addresses: Callable[[], tuple[str, ...]]) -> tuple[str, ...]:
    """By which routes others reach this node now; may be none."""
    if settings.route_advertise:
        host, _, given = settings.route_advertise.rpartition(":")
        return (settings.route_advertise,) if host and given.isdecimal() else (f"{settings.route_advertise}:{port}",)
    hosts = (LOOPBACK,) if settings.local else addresses()
    return tuple(route_text(host, port) for host in hosts)


class Mesh:
    """Keeps one node's server joined to the others. Keep `run` going.

    Args:
        settings: what the node was told.
        known: as from `known_at_start`.
        config: what the server runs with; `run` changes its routes.
        server: the own one, which serves.
        name: of this host, for people.
        addresses: by which others reach this machine.
    """

    def __init__(
        self,
        settings: Settings,
        known: Known,
        config: NatsServerConfig,
        server: NatsServer,
        clock: Clock,
        *,
        name: str,
        addresses: Callable[[], tuple[str, ...]] = local_addresses,
    ) -> None:
        self._settings = settings
        self._home = Path(settings.home)
        self._known = known
        self._config = config
        self._server = server
        self._clock = clock
        self._name = name
        self._addresses = addresses
        self._beats: Callable[[], Iterable[NodeBeat]] = tuple
        self._caller = Caller(
            cluster=config.cluster_name,
            user=config.route_user,
            password=config.route_password,
            tls=None if config.tls is None else (config.tls.cert_file, config.tls.key_file, config.tls.ca_file),
        )
        self._key = b""
        self._changed = asyncio.Event()
        self._told: dict[str, Standing] = {}
        self._saved: Remembered | None = None
        self._dialled_anew: dict[str, float] = {}
        self.routes = own_routes(settings, self._port, addresses)
        self._dialled: dict[str, str] = {}
        self.joined: frozenset[str] = frozenset()
        self.closed: Mapping[str, float] = {}

    @property
    def _port(self) -> int:
        port = self._server.endpoint.route_port
        assert port is not None, "a mesh needs a listener for routes"
        return port

    def follow(self, beats: Callable[[], Iterable[NodeBeat]]) -> None:
        """From now on looks every second at who is heard, and by which routes."""
        self._beats = beats

    def heard(self, node_id: str, routes: tuple[str, ...], now: float, name: str = "") -> None:
        """Takes in a node's routes; ``now`` in seconds since the epoch."""
        self._set(with_heard(self._known, node_id, routes, now, name))

    def standings(self) -> tuple[Standing, ...]:
        """How it stands with each peer now."""
        return standings(self._known, self.joined, self._clock.now())

    async def run(self) -> None:
        """Keeps the routes up until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_joined(), name="mesh-routes")
                tasks.create_task(self._keep_asking(), name="mesh-probe")
                tasks.create_task(self._keep_addresses(), name="mesh-addresses")
                if self._settings.mdns and not self._settings.local:
                    token, cluster = self._settings.cluster_token, self._settings.cluster
                    self._key = await asyncio.to_thread(proof_key, token, cluster)
                    mdns = Mdns(self._advert, self._advert_heard, self._goodbye, addresses=self._addresses)
                    tasks.create_task(mdns.run(), name="mesh-mdns")
        finally:
            remove_mesh_file(self._home)

    # Words of others

    def _advert(self, addresses: tuple[str, ...]) -> Advert:
        told = Advert(
            cluster=self._settings.cluster,
            node_id=self._known.node_id,
            version=__version__,
            protocol=PROTOCOL,
            port=self._port,
            addresses=addresses,
            name=self._name,
        )
        return with_proof(fitting(told), self._key)

    def _advert_heard(self, advert: Advert) -> None:
        if advert.node_id == self._known.node_id:
            return
        refusal = refusal_of(advert, cluster=self._settings.cluster, protocol=PROTOCOL, key=self._key)
        if refusal is None:
            self.heard(advert.node_id, advert.routes, self._clock.wall(), advert.name)
        else:
            refused = Refused(refusal=refusal, routes=advert.routes, name=advert.name)
            self._set(with_refused(self._known, advert.node_id, refused))

    def _goodbye(self, node_id: str) -> None:
        self._set(without_seen(self._known, node_id))

    def _set(self, known: Known) -> None:
        if known is not self._known:
            self._known = known
            self._changed.set()

    # Loops

    async def _keep_addresses(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            self.routes = own_routes(self._settings, self._port, self._addresses)

    async def _keep_asking(self) -> None:
        while True:
            routes = due(self._known, self.joined, self._clock.now())[:PROBES]
            async with asyncio.TaskGroup() as tasks:
                for route in routes:
                    tasks.create_task(self._ask(route), name=f"probe {route}")
            await asyncio.sleep(PROBE_TICK_S)

    async def _ask(self, route: str) -> None:
        answer = await ask_route(route, self._caller, self._clock.now())
        self._set(with_answer(self._known, route, answer))

    async def _keep_joined(self) -> None:
        while True:
            self._changed.clear()
            for beat in self._beats():
                self.heard(beat.node_id, beat.routes, self._clock.wall(), beat.name)
            if await self._look():
                self._set(with_plan(without_old(self._known, self._clock.wall()), self._dialled))
                await self._apply()
                self._tell()
                await self._save()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._changed.wait()

    async def _look(self) -> bool:
        """Sees who is joined; False while the own server doesn't say: it is being replaced."""
        try:
            servers = await joined_servers(self._server.endpoint.monitor_port or 0)
        except OSError:
            self.closed = {}
            return False
        self._dialled = {node_of_server(name): route for name, route in servers.items()}
        self.closed = closed_since(self.closed, self.joined, self._dialled.keys(), self._clock.now())
        self.joined = frozenset(self._dialled)
        return True

    async def _apply(self) -> None:
        """Brings the server's routes to what was chosen; dials anew where a good route isn't taken up."""
        now = self._clock.now()
        anew = {
            peer
            for peer in stuck(self._known, self.joined, now)
            if now - self._dialled_anew.get(peer, -ANEW_S) >= ANEW_S
        }
        if anew:
            log.info("dialled anew: %s", ", ".join(sorted(anew)))
            self._dialled_anew = {
                peer: now for peer in self._known.chosen if peer in anew or peer in self._dialled_anew
            }
            without = {route for peer, route in self._known.chosen.items() if peer in anew}
            await self._reload(tuple(route for route in routes_of(self._known) if route not in without))
        await self._reload(routes_of(self._known))

    async def _reload(self, routes: tuple[str, ...]) -> None:
        if routes == self._config.routes:
            return
        config = msgspec.structs.replace(self._config, routes=routes)
        try:
            await self._server.reload(config)
        except SkulkError as error:
            log.warning("the routes stay as they were: %s", error.detail)
            return
        self._config = config

    # What a person and the next start are told

    def _tell(self) -> None:
        found = {one.peer: one for one in self.standings()}
        for peer, one in found.items():
            before = self._told.get(peer)
            if before is None or (before.state, before.problem) != (one.state, one.problem):
                _log_change(before, one)
        if found != self._told:
            self._told = found
            write_mesh_file(self._home, tuple(found.values()))

    async def _save(self) -> None:
        peers = tuple(self._known.neighbours[node_id] for node_id in sorted(self._known.neighbours))
        remembered = Remembered(cluster=self._settings.cluster, route_port=self._port, peers=peers)
        if remembered != self._saved:
            self._saved = remembered
            # it waits for the disk, and a beat must not
            await asyncio.to_thread(save_peers, self._home, remembered)


def _log_change(before: Standing | None, now: Standing) -> None:
    called = f"{now.peer} ({now.name})" if now.name else now.peer
    match now.state:
        case "joined":
            log.info("joined with %s%s", called, f" at {now.route}" if now.route else "")
        case "apart":
            log.warning("%s is not joined: %s", called, now.detail)
        case "trying":
            if before is not None and before.state == "joined":
                log.warning("the route to %s is lost", called)
