"""The nats-server beside a launcher: started, pinged, reloaded, replaced on the same ports.

    NatsServer.run() ─┬─ Supervised ── the process        (its crashes: restarted by policy)
                      └─ pinger ────── PING every 0.5 s   (its silence: two misses, SIGKILL, restarted)

Files, all below ``<home>/nats/``: ``nats.conf`` (0600: it holds the passwords), ``nats.log`` (bounded).
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from skulk.clock import Clock, SystemClock
from skulk.errors import ServiceError, SkulkError, StartError
from skulk.files import write_atomic
from skulk.supervision.child import Child, ChildSpec, ExitReport, Ledger, Ready
from skulk.supervision.nats_config import (
    LOOPBACK,
    Listener,
    ListenFailure,
    NatsPorts,
    NatsServerConfig,
    listen_failure,
    ports_seen,
    ready_pattern,
    render,
    with_port,
)
from skulk.supervision.nats_ping import PingConnection, PingPolicy, PingState, on_miss, on_pong
from skulk.supervision.restarts import GiveUp, RestartPolicy
from skulk.supervision.supervisor import Crash, Supervised

NAME: Final = "nats-server"
RELOAD_TIMEOUT_S: Final = 5.0
_RELOADED: Final = r"\[INF\] Reloaded server configuration|Failed to reload server configuration: (?P<why>.*)"
_DOORS: Final[dict[Listener, tuple[str, str]]] = {
    "client": ("NATS clients", "--nats-port"),
    "route": ("routes between nodes", "--route-port"),
    "monitor": ("NATS monitoring", ""),
}


class NatsEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """Where a running server is to be found.

    Attributes:
        client_url: without credentials, which would end in logs.
        user, password: of the node's own processes.
        client_port, monitor_port, route_port: the real numbers; None: that listener is off.
    """

    client_url: str
    user: str
    password: str
    client_port: int
    monitor_port: int | None
    route_port: int | None


def _nothing(_: object) -> None:
    """The default of the callbacks."""


class NatsServer:
    """One node's nats-server.

    Whoever makes it awaits `run` in a task of its own, then `wait_ready`.

    Args:
        binary: see `skulk.supervision.nats_binary`.
        home: the node's state folder.
        config: its settings; `reload` changes them.
        on_endpoint: it serves, first or again.
        on_exit: a life ended unasked.
        ledger: where running children are written down.
        kept: ports of an earlier time, to be taken again where the settings ask for free ones.
        policy: when it starts again.
        ping: when it counts as dead.
        clock: for both.
    """

    def __init__(
        self,
        binary: Path,
        home: Path,
        config: NatsServerConfig,
        *,
        on_endpoint: Callable[[NatsEndpoint], None] = _nothing,
        on_exit: Callable[[Crash], None] = _nothing,
        ledger: Ledger | None = None,
        kept: NatsPorts | None = None,
        policy: RestartPolicy | None = None,
        ping: PingPolicy | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._binary = binary
        self._folder = home / "nats"
        self._config = config
        self._on_endpoint = on_endpoint
        self._ping = ping or PingPolicy()
        self._clock: Clock = clock or SystemClock()
        self._asked = NatsPorts()  # what the present life was told, which a reload must repeat
        self._seen = NatsPorts()  # what the present life says
        self._kept = kept or NatsPorts()  # what the next life is told
        self._written = ""
        self._endpoint: NatsEndpoint | None = None
        self._life: Child | None = None
        self._began: asyncio.Event = asyncio.Event()
        self._reloading: asyncio.Lock = asyncio.Lock()
        self._supervised = Supervised(
            NAME,
            self._spec,
            policy=policy or RestartPolicy(advice=f"Look at {self._folder / 'nats.log'}, then start the node again."),
            on_ready=self._on_ready,
            on_exit=on_exit,
            explain=self._explain,
            on_line=self._on_line,
            ledger=ledger,
            clock=self._clock,
        )

    @property
    def pid(self) -> int | None:
        """The process that serves; None between two lives."""
        return self._supervised.pid

    @property
    def endpoint(self) -> NatsEndpoint:
        """Where the last life serves or served; there has been one. A port that was taken meanwhile is another one."""
        assert self._endpoint is not None, "it has never served"
        return self._endpoint

    async def run(self) -> GiveUp | None:
        """Keep it running; call once.

        Returns:
            None after `stop`; else why it isn't started any more.
        """
        async with asyncio.TaskGroup() as tasks:
            pinger = tasks.create_task(self._ping_every_life(), name="ping nats-server")
            try:
                return await self._supervised.run()
            finally:
                pinger.cancel()

    async def wait_ready(self) -> NatsEndpoint:
        """Wait until it serves.

        Raises:
            StartError: ``port_in_use``, ``config_invalid``, ``home_not_writable``, ``child_failed``.
            ServiceError: ``disk_full``.
        """
        await self._supervised.wait_ready()
        assert self._endpoint is not None
        return self._endpoint

    async def stop(self) -> None:
        """End it in order; `run` returns."""
        await self._supervised.stop()

    async def reload(self, config: NatsServerConfig) -> None:
        """Take other routes, route credentials or limits over without a break; the listeners stay as they are.

        Between two lives it only notes them: the next one starts with them.

        Raises:
            ServiceError: ``internal``: the server refused the change, the former settings stay;
                ``deadline_exceeded``: it didn't answer; ``disk_full``.
            StartError: ``home_not_writable``.
        """
        async with self._reloading:
            assert _door_plan(config) == _door_plan(self._config), "a reload can't move the doors"
            former, self._config = self._config, config
            child = self._supervised.child
            if child is None or not self._write(self._asked):
                return
            child.signal(signal.SIGHUP)
            try:
                match = await child.line(_RELOADED, RELOAD_TIMEOUT_S)
            except StartError:
                return  # it died: the next life reads the new file
            except TimeoutError as error:
                raise ServiceError(
                    "deadline_exceeded", f"{NAME} didn't reload its configuration within {RELOAD_TIMEOUT_S:g} s."
                ) from error
            if match["why"] is not None:
                self._config = former
                self._write(self._asked)
                raise ServiceError("internal", f"{NAME} refused its new configuration: {match['why']}")

    def _spec(self) -> ChildSpec:
        self._asked, self._seen = self._kept, NatsPorts()
        self._write(self._asked)
        return ChildSpec(
            name=NAME,
            argv=(str(self._binary), "-c", str(self._folder / "nats.conf")),
            log_path=self._folder / "nats.log",
            ready=f"log_line:{ready_pattern(self._config)}",
            ready_timeout_s=15.0,
            term_s=5.0,
        )

    def _write(self, ports: NatsPorts) -> bool:
        """Whether the file had to change. An unchanged one isn't written: a restart needs no room on a full disk."""
        text = render(self._config, ports)
        if text == self._written:
            return False
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # No fsync: the file is made anew at every start of the node.
            write_atomic(self._folder / "nats.conf", text.encode(), fsync=False)
        except OSError as error:
            raise StartError(
                "home_not_writable",
                f"{self._folder} can't be written: {error.strerror or error}. "
                "Make it writable for this user, or choose another home with --home DIR.",
            ) from error
        self._written = text
        return True

    def _on_line(self, line: str) -> None:
        self._seen = ports_seen(self._seen, line)

    def _on_ready(self, child: Child, _: Ready) -> None:
        config, ports = self._config, self._seen
        assert ports.client > 0, "the line of the client port comes before readiness"
        self._kept = ports
        self._endpoint = NatsEndpoint(
            client_url=f"nats://{LOOPBACK}:{ports.client}",
            user=config.client_user,
            password=config.client_password,
            client_port=ports.client,
            monitor_port=ports.monitor or None,
            route_port=ports.route or None,
        )
        self._life = child
        self._began.set()
        self._on_endpoint(self._endpoint)

    def _explain(self, error: SkulkError, report: ExitReport | None) -> SkulkError:
        lines = () if report is None else report.last_lines
        failure = next((found for line in lines if (found := listen_failure(line)) is not None), None)
        if failure is None:
            return error
        if self._is_free_choice(failure.listener):
            # Somebody took the port while the server was down. Another one is better than none.
            self._kept = with_port(self._kept, failure.listener, 0)
            return StartError("child_failed", f"{NAME} lost its port {failure.port}: {failure.why}.")
        if self._endpoint is not None:
            return StartError("child_failed", _listen_text(failure))
        return StartError("port_in_use" if failure.is_in_use else "config_invalid", _listen_text(failure))

    def _is_free_choice(self, listener: Listener) -> bool:
        config = self._config
        wanted = {"client": config.client_port, "monitor": config.monitor_port, "route": config.route_port}
        return wanted[listener] == 0

    async def _ping_every_life(self) -> None:
        while True:
            await self._began.wait()
            self._began.clear()
            assert self._life is not None and self._endpoint is not None
            await self._ping_one_life(self._life, self._endpoint)

    async def _ping_one_life(self, child: Child, endpoint: NatsEndpoint) -> None:
        connection = PingConnection(endpoint.client_port, endpoint.user, endpoint.password)
        # One future for all waits: each look at the property would leave a callback behind.
        exited, state = child.exited, PingState()
        try:
            while not exited.done():
                asked_at = self._clock.now()
                state = await self._ask(connection, state)
                pause_s = asked_at + self._ping.interval_s - self._clock.now()
                if state.is_dead(self._ping):
                    child.kill(f"it left {state.misses} pings unanswered")
                    pause_s = self._ping.interval_s  # its end may take a moment
                await asyncio.wait((exited,), timeout=max(0.0, pause_s))
        finally:
            connection.close()

    async def _ask(self, connection: PingConnection, state: PingState) -> PingState:
        asked_at = self._clock.now()
        try:
            async with asyncio.timeout(self._ping.timeout_s):
                await connection.ping()
            return on_pong(state)
        except OSError:  # TimeoutError is one
            connection.close()
            return on_miss(self._ping, state, self._clock.now() - asked_at)


def _door_plan(config: NatsServerConfig) -> tuple[object, ...]:
    """What endpoints were promised and a running server can't change."""
    ports = (config.client_port, config.monitor_port, config.route_port)
    return (*ports, config.server_name, config.client_user, config.client_password)


def _listen_text(failure: ListenFailure) -> str:
    purpose, flag = _DOORS[failure.listener]
    way = f"choose another one with {flag} PORT ({flag} 0 picks a free one)" if flag else "choose another one"
    if not failure.is_in_use:
        return f"{NAME} can't listen on port {failure.port} ({purpose}): {failure.why}. To go on, {way}."
    return f"Port {failure.port} ({purpose}) is in use by another program. Stop that program, or {way}."
