"""The gateway's process: takes its `GatewaySpec`, listens, serves, and leaves in order.

    spec ──> listen ──> bus ──> application ──> caught up ──> ready ──> (SIGTERM | parent gone | fault) ──> drain

The socket is bound first: a port in use is told before anything else is touched. Draining takes no new generations,
lets running ones go on for ``drain_timeout_s``, then ends them with an error object; a second SIGTERM skips the wait.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from aiohttp import web

from skulk.bus.nats_bus import NatsBus
from skulk.clock import Clock, SystemClock
from skulk.cluster.view import ClusterView
from skulk.errors import ServiceError, SkulkError, StartError, UnavailableError
from skulk.gateway.app import FAULTS, build_app
from skulk.gateway.http import BACKLOG, listen_on
from skulk.gateway.keys import DISPATCHER, REPLICA
from skulk.logs import configure_logging
from skulk.models.catalogue import Catalogue
from skulk.supervision.ready import announce_error, announce_ready, parent_gone, read_spec
from skulk.wire.base import decode
from skulk.wire.gateway import GatewaySpec

log = logging.getLogger("skulk.gateway")

LAST_WORDS_S: Final = 2.0
CATCH_UP_S: Final = 2.0


def main() -> int:
    """Runs one gateway until it is told to leave; returns the exit status."""
    try:
        spec = _read_spec()
        configure_logging(spec.log_format, spec.log_level, "gateway", secrets=secrets_of(spec))
        return asyncio.run(serve(spec))
    except SkulkError as error:
        announce_error(error)
        log.error("%s", error)
        return error.exit_status


def _read_spec() -> GatewaySpec:
    try:
        return decode(read_spec(), GatewaySpec)
    except ServiceError as error:
        raise StartError("config_invalid", f"the specification on stdin can't be read: {error}") from error


def secrets_of(spec: GatewaySpec) -> tuple[str, ...]:
    """What must not stand in the log."""
    return (spec.password, *(entry.partition(":")[2] for entry in spec.api_keys if not entry.startswith("@")))


async def serve(spec: GatewaySpec) -> int:
    """Serves until SIGTERM or SIGINT, the parent's end, or a fault; returns the exit status.

    Raises:
        StartError: ``port_in_use``, ``config_invalid``, ``cluster_not_reached``.
    """
    clock = SystemClock()
    asked_to_leave, in_haste = _watch_signals()
    listening = listen(spec.api_host, spec.api_port)
    try:
        async with _bus(spec, clock) as bus:
            app = build_app(spec, bus, await _catalogue(spec), clock)
            # without handler_cancellation a client that goes away would leave its generation running
            runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=LAST_WORDS_S)
            await runner.setup()
            try:
                await _catch_up(app)
                server = await listen_on(runner, listening)
                host, port = listening.getsockname()[:2]
                announce_ready({"host": host, "port": port})
                log.info("listening on %s port %d", host, port)
                await _until_leaving(app, asked_to_leave)
                server.close()
                await _drain(app, spec, in_haste)
            finally:
                await runner.cleanup()
            return 1 if app[FAULTS].happened.is_set() else 0
    finally:
        listening.close()


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        StartError: ``port_in_use``; ``config_invalid``: the address isn't this machine's, or the port not ours.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise StartError(
            "config_invalid", f"--api-host {host!r} is no address of this machine: {error.strerror}"
        ) from error
    bound = socket.socket(family, kind, number)
    bound.setblocking(False)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise StartError(
                "port_in_use",
                f"port {port} on {host} is in use by another program; choose another one with --api-port "
                "(0 picks a free one)",
            ) from error
        raise StartError(
            "config_invalid",
            f"can't listen on {host} port {port}: {error.strerror}; choose others with --api-host and --api-port",
        ) from error
    return bound


@asynccontextmanager
async def _bus(spec: GatewaySpec, clock: Clock) -> AsyncGenerator[NatsBus]:
    bus = NatsBus(
        spec.nats_url,
        cluster=spec.cluster,
        name=f"gateway {spec.node_name}",
        user=spec.user or None,
        password=spec.password or None,
        clock=clock,
    )
    await bus.connect()
    try:
        yield bus
    finally:
        await bus.close()


async def _catalogue(spec: GatewaySpec) -> Catalogue:
    """The node's catalogue, read once. The gateway never hashes a file, so it never writes ``verified_file``."""
    catalogue = Catalogue(
        Path(spec.models_dir),
        tuple(Path(folder) for folder in spec.models_path),
        verified_file=Path(spec.verified_file),
        card_dirs=tuple(Path(folder) for folder in spec.card_dirs),
        ollama_dir=Path(spec.ollama_dir) if spec.ollama_dir else None,
    )
    await asyncio.to_thread(catalogue.rescan)
    return catalogue


async def _catch_up(app: web.Application) -> None:
    """Lets nobody in before the state is known, if there is a master to tell it: an empty one would be told as true.

    Whoever connects meanwhile waits in the socket's queue.
    """
    if not await app[REPLICA].wait_until(_is_caught_up, CATCH_UP_S):
        log.info("no master told its state within %.0f s", CATCH_UP_S)


def _is_caught_up(view: ClusterView) -> bool:
    return view.master is not None and view.master.node_id in view.nodes and view.state.position >= view.master.position


def _watch_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events that the first and the second SIGTERM or SIGINT set."""
    asked, in_haste = asyncio.Event(), asyncio.Event()

    def heard() -> None:
        (in_haste if asked.is_set() else asked).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, heard)
    return asked, in_haste


async def _until_leaving(app: web.Application, asked_to_leave: asyncio.Event) -> None:
    reasons = [
        asyncio.create_task(asked_to_leave.wait(), name="asked to leave"),
        asyncio.create_task(parent_gone(), name="parent gone"),
        asyncio.create_task(app[FAULTS].happened.wait(), name="fault"),
    ]
    try:
        done, _ = await asyncio.wait(reasons, return_when=asyncio.FIRST_COMPLETED)
        log.info("leaving: %s", ", ".join(sorted(task.get_name() for task in done)))
    finally:
        for task in reasons:
            task.cancel()


async def _drain(app: web.Application, spec: GatewaySpec, in_haste: asyncio.Event) -> None:
    """Lets running answers end; those that don't get an error object."""
    dispatcher = app[DISPATCHER]
    dispatcher.drain()
    hurry = asyncio.create_task(in_haste.wait(), name="in haste")
    idle = asyncio.create_task(dispatcher.wait_idle(), name="idle")
    try:
        await asyncio.wait({hurry, idle}, timeout=spec.drain_timeout_s, return_when=asyncio.FIRST_COMPLETED)
        dispatcher.stop_all(UnavailableError("draining", "this gateway is stopping; send the request to another node"))
        await asyncio.wait({idle}, timeout=LAST_WORDS_S)
    finally:
        hurry.cancel()
        idle.cancel()
