"""The launcher: one process that watches over nats-server, gateway and runners, and hosts node and master.

home lock ──> nats-server ──> bus ──> replica ──> node, master ──> gateway ──> `place` models ──> node.json
   └─────────────────────────── stopped in the opposite order ───────────────────────────────────────┘
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from skulk import __version__
from skulk.bus.events_stream import STREAM, ensure_events_stream
from skulk.bus.nats_bus import NatsBus, parse_addresses
from skulk.bus.permissions import check_permissions, probe_permissions
from skulk.bus.replica import Replica
from skulk.bus.subjects import MASTER_PLACE
from skulk.cli.ensuring import ensure_now, keep_ensuring
from skulk.cli.gateway_watch import GatewayWatch
from skulk.cli.leaving import leave
from skulk.cli.mesh import Mesh, known_at_start, routes_of
from skulk.cli.nats_settings import server_config
from skulk.cli.node_file import NodeFile, remove_node_file, write_node_file
from skulk.cli.weights import CARDS_FOLDER, VERIFIED_FILE, card_of, catalogue_of, folders_of, reachable_host
from skulk.clock import Clock, SystemClock
from skulk.errors import SkulkError, StartError, error_of, first_of
from skulk.gateway.masters import Masters
from skulk.ids import new_id, new_incarnation
from skulk.master.master import Master
from skulk.master.upkeep import Rules
from skulk.models.catalogue import Catalogue
from skulk.node.checkout import RUNNING_COMMIT
from skulk.node.hosting import Hosting
from skulk.node.identity import NodeIdentity, load_identity
from skulk.node.measuring import MachineMeter
from skulk.node.node import Node, NodeRoles
from skulk.node.processes import BusAddress, LocalMachine
from skulk.node.quarantine import Quarantine
from skulk.node.speeds import SpeedBook
from skulk.node.storage import StateFile, load_state, state_date
from skulk.node.storehouse import Storehouse
from skulk.settings import Settings
from skulk.supervision.child import Child, ChildSpec, Ready
from skulk.supervision.home import ChildLedger, HomeLock, reap_leftovers
from skulk.supervision.nats_binary import usable_nats_server
from skulk.supervision.nats_server import NatsEndpoint, NatsServer
from skulk.supervision.restarts import GiveUp
from skulk.supervision.supervisor import Supervised
from skulk.wire.base import encode
from skulk.wire.beats import EngineFacts
from skulk.wire.commands import PlacementReply, PlaceModel
from skulk.wire.gateway import GatewaySpec
from skulk.wire.placement import PlacementRequest

log = logging.getLogger("skulk.launcher")

MASTER_WAIT_S: Final = 10.0
PLACE_TIMEOUT_S: Final = 40.0
ELECTION_PATIENCE_S: Final = 1.5
GATEWAY_DRAIN_S: Final = 5.0
EVENTS_LOOK_S: Final = 60.0


class Running:
    """A started node, for whoever started it."""

    def __init__(self, settings: Settings, identity: NodeIdentity) -> None:
        self.home = Path(settings.home)
        self.node_id = identity.node_id
        self.api_url = ""
        self.nats_url = ""
        self.nats_options = ""
        self.placed: tuple[PlacementReply, ...] = ()
        self.is_restarting = False
        self._ended: asyncio.Future[SkulkError | None] = asyncio.get_running_loop().create_future()

    @property
    def nats_sub_line(self) -> str:
        """What to type to see everything that crosses the bus."""
        return f"nats {self.nats_options} sub 'skulk.>'"

    @property
    def has_failed(self) -> bool:
        """Whether the node can't go on."""
        return self._ended.done() and self._ended.result() is not None

    def stop(self) -> None:
        """Has `wait` return; may come twice."""
        if not self._ended.done():
            self._ended.set_result(None)

    def restart(self) -> None:
        """Has `wait` return, and whoever started the node start it again."""
        self.is_restarting = True
        self.stop()

    def fail(self, error: SkulkError) -> None:
        """Has `wait` raise: the node can't go on."""
        if not self._ended.done():
            self._ended.set_result(error)

    async def wait(self) -> None:
        """Returns when the node was asked to stop.

        Raises:
            SkulkError: the node can't go on.
        """
        error = await asyncio.shield(self._ended)
        if error is not None:
            raise error


@asynccontextmanager
async def launch(settings: Settings) -> AsyncGenerator[Running]:
    """Starts a node, and stops all of it at the end, however that comes.

    Raises:
        StartError: ``home_in_use``, ``port_in_use``, ``nats_server_missing``, ``config_invalid``, …: one sentence each.
        RequestError: ``model_not_found``, for a model to place that neither this node nor the hub knows.
    """
    clock = SystemClock()
    home = Path(settings.home)
    async with AsyncExitStack() as stack:
        stack.enter_context(HomeLock(home))
        await asyncio.to_thread(reap_leftovers, home)
        identity = load_identity(home)
        running = Running(settings, identity)
        catalogue = await asyncio.to_thread(catalogue_of, settings)
        cards = [await card_of(settings, catalogue, model_id) for model_id in settings.place]
        launcher = _Launcher(settings, clock, identity, catalogue, running, stack)
        await launcher.start()
        await launcher.place([PlacementRequest(card=card) for card in cards])
        yield running


def shown_url(url: str) -> str:
    """A bus's addresses without credentials."""
    urls = (urlsplit(address.url) for address in parse_addresses(url))
    return ",".join(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}" for parts in urls)


def nats_options(address: BusAddress) -> str:
    """How the ``nats`` command reaches the bus: secrets by the name of the variable that holds them."""
    if "@" in address.url:
        return '-s "$SKULK_NATS_URL"'
    password = f' --user {address.user} --password "$SKULK_CLUSTER_TOKEN"' if address.password else ""
    return f"-s {shown_url(address.url)}{password}"


async def _keep_events(bus: NatsBus) -> None:
    """Sees to the stream of events, now and again: an operator may remove it, JetStream may come later."""
    told: str | None = None
    while True:
        problem = await ensure_events_stream(bus)
        if problem != told:
            told = problem
            if problem:
                log.warning("%s", problem)
            else:
                log.info("the events are kept in the stream %s", STREAM)
        await asyncio.sleep(EVENTS_LOOK_S)


def _reason_of(name: str, error: BaseException) -> SkulkError:
    """What the end of a part tells a person: its own word where it ended in order, else that the log has more."""
    inner = first_of(error)
    if isinstance(inner, SkulkError):
        return inner
    log.error("%s failed", name, exc_info=error)
    return StartError("child_failed", f"{name} failed: {error}; the log has more")


class _Launcher:
    """The steps of one start; what each of them must undo is pushed on the stack."""

    def __init__(
        self,
        settings: Settings,
        clock: Clock,
        identity: NodeIdentity,
        catalogue: Catalogue,
        running: Running,
        stack: AsyncExitStack,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._identity = identity
        self._catalogue = catalogue
        self._running = running
        self._stack = stack
        self._home = Path(settings.home)
        self._ledger = ChildLedger(self._home)
        self._gateway_id = f"gw-{identity.node_id}"
        self._endpoint: NatsEndpoint | None = None
        self._mesh: Mesh | None = None
        self._may_meet_others = True
        self._api: str | None = None
        self._api_port = settings.api_port
        self._files: str | None = None
        self._files_port = settings.files_port

    async def start(self) -> None:
        """Everything up to a gateway that answers, and the file that tells other commands where."""
        address = await self._start_bus()
        self._running.nats_url = shown_url(address.url)
        self._running.nats_options = nats_options(address)
        bus = await self._connect(address)
        if self._settings.nats_url:
            await self._check_existing(bus)
        mesh = self._mesh
        replica = Replica(
            bus,
            self._clock,
            load_state(self._home, bus.cluster),
            keeps=True,
            closed=dict if mesh is None else lambda: mesh.closed,
        )
        await replica.start()
        self._stack.push_async_callback(replica.close)
        self._bus, self._replica = bus, replica
        await self._start_roles(address)
        is_led = await replica.wait_until(lambda view: view.master is not None, MASTER_WAIT_S)
        if not is_led and self._master.unreachable:
            log.warning(
                "the master %s is heard by others, not by this node; it serves without", self._master.unreachable
            )
        elif not is_led:
            raise StartError(
                "child_failed", f"no master was elected within {MASTER_WAIT_S:.0f} s; see {self._home}/logs"
            )
        if self._settings.api:
            await self._start_gateway(address)
        self._write_node_file()
        self._stack.push_async_callback(self._leave)

    async def _leave(self) -> None:
        if not self._running.has_failed:
            await leave(self._identity, self._replica, self._master, self._masters())

    def _masters(self) -> Masters:
        return Masters(self._bus, self._replica, self._clock, self._identity.node_id)

    async def place(self, requests: Sequence[PlacementRequest]) -> None:
        """Sees to it that each model has at least one instance; later, where no master can be asked now."""
        self._running.placed, left = await ensure_now(self._ensure, requests)
        if left:
            self._spawn("place", keep_ensuring(self._ensure, left))

    async def _ensure(self, request: PlacementRequest) -> PlacementReply:
        command = PlaceModel(command_id=new_id(), request=request, ensure=True)
        return await self._masters().ask(MASTER_PLACE, command, timeout_s=PLACE_TIMEOUT_S)

    async def _start_bus(self) -> BusAddress:
        """The own nats-server, or the existing deployment that ``SKULK_NATS_URL`` names."""
        settings = self._settings
        if settings.nats_url:
            return BusAddress(url=settings.nats_url)
        binary = await asyncio.to_thread(usable_nats_server, settings.nats_server)
        known, kept = known_at_start(settings, self._identity.node_id)
        self._may_meet_others = not settings.local or bool(settings.bootstrap_peers or known.neighbours)
        config = server_config(settings, self._identity.node_id, self._identity.incarnation, routes_of(known))
        server = NatsServer(binary, self._home, config, ledger=self._ledger, kept=kept, clock=self._clock)
        self._keep("nats-server", server.run(), server.stop)
        self._endpoint = endpoint = await server.wait_ready()
        self._mesh = mesh = Mesh(settings, known, config, server, self._clock, name=self._identity.name)
        self._spawn("mesh", mesh.run())
        password = endpoint.password
        return BusAddress(url=endpoint.client_url, user=endpoint.user if password else "", password=password)

    async def _connect(self, address: BusAddress) -> NatsBus:
        bus = NatsBus(
            address.url,
            cluster=self._settings.cluster,
            name=f"node-{self._identity.node_id}",
            user=address.user or None,
            password=address.password or None,
            clock=self._clock,
        )
        self._stack.push_async_callback(bus.close)
        await bus.connect()
        return bus

    async def _check_existing(self, bus: NatsBus) -> None:
        """Of a bus that isn't ours: may we do all that a node does, and are the events kept there?"""
        url, cluster = self._settings.nats_url, self._settings.cluster
        check_permissions(await probe_permissions(url, cluster), cluster)
        if self._settings.events_stream:
            self._spawn("events-stream", _keep_events(bus))

    async def _start_roles(self, address: BusAddress) -> None:
        settings, identity, bus, replica = self._settings, self._identity, self._bus, self._replica
        meter = MachineMeter(
            self._clock,
            self._catalogue,
            models_dir=Path(settings.models_dir),
            declared=settings.backends,
            limit_bytes=settings.memory_limit_bytes,
            quarantine=Quarantine(Path(settings.home)),
            engine=EngineFacts(ubatch=settings.ubatch, kv_type=settings.kv_type),
        )
        await meter.start()
        self._storehouse = house = Storehouse(
            settings, identity.node_id, bus, replica, self._clock, self._catalogue, meter, self._ledger
        )
        await self._start_files(house)
        machine = LocalMachine(
            settings,
            identity.node_id,
            address,
            self._catalogue,
            meter,
            self._ledger,
            house.downloads,
        )
        state_file = StateFile(self._home)
        master = Master(
            bus,
            replica,
            self._clock,
            node_id=identity.node_id,
            incarnation=identity.incarnation,
            patience_s=ELECTION_PATIENCE_S if self._may_meet_others else 0.0,
            rules=Rules(
                replace_after_s=settings.replace_after_s,
                default_parallel=settings.parallel,
                idle_ttl_s=settings.idle_ttl_s,
            ),
            persist=state_file.flush,
        )
        node = Node(
            bus,
            replica,
            self._clock,
            identity,
            meter=meter,
            hosting=Hosting(bus, self._clock, identity.node_id, machine),
            state_file=state_file,
            authority=lambda: master.state,
            roles=self._roles,
            unreachable=lambda: master.unreachable,
            restart=self._running.restart,
            master_heard_at=state_date(self._home),
            speeds=SpeedBook(self._home),
        )
        self._master = master
        if self._mesh is not None:
            self._mesh.follow(lambda: [node.beat for node in replica.view.nodes.values()])
        self._spawn("store", house.store.run())
        self._spawn("replica", replica.run())
        self._spawn("master", master.run())
        self._spawn("node", node.run())
        self._spawn("meter", meter.run())

    def _roles(self) -> NodeRoles:
        routes = () if self._mesh is None else self._mesh.routes
        house = self._storehouse
        return NodeRoles(
            version=__version__,
            commit=RUNNING_COMMIT,
            role=self._settings.participation,
            routes=routes,
            api=self._api,
            files=self._files,
            hub=house.may_use_hub,
            downloads=house.downloads.statuses(),
        )

    async def _start_files(self, house: Storehouse) -> None:
        """Serves weights to neighbours, where there can be some."""
        settings = self._settings
        if settings.local:
            return
        folders = folders_of(settings)
        files = Supervised(
            "files",
            lambda: house.files_child(self._files_port, folders),
            on_ready=self._files_ready,
            ledger=self._ledger,
        )
        self._keep("files", files.run(), files.stop)
        await files.wait_ready()

    def _files_ready(self, child: Child, ready: Ready) -> None:
        del child
        self._files_port = int(str(ready.fields["port"]))
        self._files = f"{reachable_host(str(ready.fields['host']))}:{self._files_port}"

    async def _start_gateway(self, address: BusAddress) -> None:
        gateway = Supervised(
            "gateway", lambda: self._gateway_child(address), on_ready=self._gateway_ready, ledger=self._ledger
        )
        self._keep("gateway", gateway.run(), gateway.stop)
        await gateway.wait_ready()
        self._spawn("gateway-watch", GatewayWatch(self._bus, self._clock, gateway, self._gateway_id).run())

    def _gateway_ready(self, child: Child, ready: Ready) -> None:
        del child
        # a free port that was picked is kept over restarts: clients know it by now
        self._api_port = int(str(ready.fields["port"]))
        host = str(ready.fields["host"])
        host = f"[{host}]" if ":" in host else host
        reachable = "127.0.0.1" if host in {"0.0.0.0", "[::]"} else host  # noqa: S104 - compared, not bound
        self._running.api_url = f"http://{reachable}:{self._api_port}"
        self._api = f"{host}:{self._api_port}"

    def _gateway_child(self, address: BusAddress) -> ChildSpec:
        settings = self._settings
        spec = GatewaySpec(
            gateway_id=self._gateway_id,
            incarnation=new_incarnation(),
            node_id=self._identity.node_id,
            node_name=self._identity.name,
            version=__version__,
            cluster=settings.cluster,
            nats_url=address.url,
            user=address.user,
            password=address.password,
            api_host="127.0.0.1" if settings.local else settings.api_host,
            api_port=self._api_port,
            models_dir=settings.models_dir,
            models_path=tuple(map(str, folders_of(settings).models_path)),
            ollama_dir=str(folders_of(settings).ollama_dir or ""),
            verified_file=str(self._home / VERIFIED_FILE),
            card_dirs=(str(self._home / CARDS_FOLDER),),
            offline=settings.offline,
            max_body_bytes=settings.max_body_bytes,
            load_wait_s=settings.load_wait_s,
            auto_place=settings.auto_place,
            failover=settings.failover,
            request_timeout_s=settings.request_timeout_s,
            api_keys=settings.api_keys,
            allowed_hosts=settings.allowed_hosts,
            drain_timeout_s=GATEWAY_DRAIN_S,
            log_format=settings.log_format,
            log_level=settings.log_level,
        )
        return ChildSpec(
            name="gateway",
            argv=(sys.executable, "-m", "skulk", "_gateway"),
            stdin=encode(spec),
            log_path=self._home / "logs" / "gateway.log",
            drain_s=GATEWAY_DRAIN_S + 1.0,
        )

    def _keep(self, name: str, run: Coroutine[Any, Any, GiveUp | None], stop: Callable[[], Awaitable[None]]) -> None:
        """Runs a supervised child until the end; one that is given up ends the node."""

        async def keep() -> None:
            give_up = await run
            if give_up is not None:
                self._running.fail(error_of(give_up.code, give_up.detail))

        self._spawn(name, keep())
        self._stack.push_async_callback(stop)

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """A task that ends with the launcher; one that fails ends the launcher."""

        async def guarded() -> None:
            try:
                await work
            except Exception as error:  # noqa: BLE001 - the border: whatever it is, it ends the node and is told
                self._running.fail(_reason_of(name, error))

        task = asyncio.create_task(guarded(), name=name)

        async def end() -> None:
            task.cancel()
            await asyncio.wait({task})

        self._stack.push_async_callback(end)

    def _write_node_file(self) -> None:
        endpoint = self._endpoint
        write_node_file(
            self._home,
            NodeFile(
                node_id=self._identity.node_id,
                pid=os.getpid(),
                version=__version__,
                cluster=self._settings.cluster,
                started_at=self._clock.wall(),
                api_url=self._running.api_url,
                api_port=self._api_port if self._settings.api else 0,
                nats_url=self._running.nats_url,
                nats_port=0 if endpoint is None else endpoint.client_port,
                route_port=0 if endpoint is None else endpoint.route_port or 0,
                files_port=self._files_port if self._files else 0,
            ),
        )
        self._stack.callback(remove_node_file, self._home)
