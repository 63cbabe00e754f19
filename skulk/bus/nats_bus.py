"""The bus over a nats-server. It owns reconnection: a lost connection is thrown away, the next one takes over.

state         means                                                       leaves when
disconnected  no server; publishing raises; attempts every 50 ms          a client has every subscription
connected     a client that answers                                       it is closed, or silent for 2.5 s
closed        the end                                                     never
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import ssl
from collections.abc import Callable
from typing import Final
from urllib.parse import urlsplit

import msgspec
import nats.errors

from skulk.bus.core import CoreBus
from skulk.bus.nats_connection import ClientOptions, Connection
from skulk.bus.parcels import PARCELS_LIMIT_BYTES
from skulk.bus.port import BusCounters, BusState, Subscription
from skulk.bus.transport import ConnectionState, Raw, Receive, disconnected
from skulk.clock import Clock, SystemClock
from skulk.errors import ServiceError, StartError, UnavailableError

RECONNECT_WAIT_S: Final = 0.05
REFUSED_WAIT_S: Final = 1.0
CONNECT_S: Final = 5.0
CLOSE_FLUSH_S: Final = 0.5
DEFAULT_MAX_PAYLOAD: Final = 1_048_576
LOG_EVERY_S: Final = 1.0

_logger = logging.getLogger(__name__)


class Address(msgspec.Struct, frozen=True):
    """A server's address. ``shown`` has no credentials in it."""

    url: str
    host: str
    port: int

    @property
    def shown(self) -> str:
        return f"{self.host}:{self.port}"


def parse_addresses(text: str) -> tuple[Address, ...]:
    """The servers that a comma list of ``nats://`` or ``tls://`` addresses names.

    Raises:
        StartError: ``config_invalid``.
    """
    addresses: list[Address] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        url = part if "://" in part else f"nats://{part}"
        try:
            parsed = urlsplit(url)
            host, port = parsed.hostname, parsed.port or 4222
        except ValueError:
            host, port, parsed = None, 0, urlsplit("")
        if host is None or parsed.scheme not in ("nats", "tls"):
            shown = part.rpartition("@")[2]
            raise StartError("config_invalid", f"{shown!r} is no address of a NATS server: write nats://host:port")
        addresses.append(Address(url, host, port))
    if not addresses:
        raise StartError("config_invalid", "no address of a NATS server was given: write nats://host:port")
    return tuple(addresses)


class _Refused(Exception):
    """The server is there and doesn't want us."""


class _Listening:
    """One subscription of ours, whatever client carries it now."""

    def __init__(self, transport: NatsTransport, subject: str, queue: str, receive: Receive) -> None:
        self.transport = transport
        self.subject = subject
        self.queue = queue
        self.receive = receive

    async def close(self) -> None:
        await self.transport.unsubscribe(self)


class NatsTransport:
    """Moves raw messages over whatever connection there is now.

    Args:
        addresses: tried in turn.
        counters: of the bus.
    """

    def __init__(
        self, addresses: tuple[Address, ...], options: ClientOptions, clock: Clock, counters: BusCounters
    ) -> None:
        self._addresses = addresses
        self._options = options
        self._clock = clock
        self._counters = counters
        self._state = ConnectionState("disconnected")
        self._connection: Connection | None = None
        self._max_payload = DEFAULT_MAX_PAYLOAD
        self._heard_at = clock.now()
        self._listening: dict[_Listening, None] = {}
        self._running: asyncio.Task[None] | None = None
        self._logged: dict[str, float] = {}
        self.failure = "not tried yet"
        self.refused = asyncio.Event()

    @property
    def state(self) -> BusState:
        return self._state.now

    @property
    def heard_at(self) -> float:
        if self._connection is not None:
            self._heard_at = self._connection.heard_at
        return self._heard_at

    @property
    def max_payload(self) -> int:
        return self._max_payload

    def on_state(self, callback: Callable[[BusState], None]) -> Callable[[], None]:
        return self._state.tell(callback)

    def start(self) -> None:
        """Begins to connect, and to reconnect, until `close`."""
        assert self._running is None, "started twice"
        self._running = asyncio.create_task(self._run(), name="hold the bus's connection")

    async def publish(self, message: Raw) -> None:
        connection = self._connection
        if connection is None:
            raise disconnected(self.failure)
        await connection.publish(message)

    async def subscribe(self, subject: str, receive: Receive, *, queue: str = "") -> Subscription:
        listening = _Listening(self, subject, queue, receive)
        self._listening[listening] = None
        if self._connection is not None:
            await self._connection.subscribe(listening, subject, queue, receive)
        return listening

    async def unsubscribe(self, listening: _Listening) -> None:
        """Ends a subscription here and at the server."""
        self._listening.pop(listening, None)
        if self._connection is not None:
            await self._connection.unsubscribe(listening)

    async def close(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running})
        self._listening.clear()
        self._state.change("closed")

    async def _run(self) -> None:
        attempt = 0
        while True:
            connection = Connection(self._options, self._clock, self._client_error)
            wait_s = RECONNECT_WAIT_S
            try:
                await self._open(connection, self._addresses[attempt % len(self._addresses)])
                await connection.lost.wait()
                self.failure = self._counters.last_error = connection.why
                self._say("lost", f"the connection to the bus is lost: {connection.why}")
            except _Refused as refused:
                self.failure = str(refused)
                self.refused.set()
                wait_s = REFUSED_WAIT_S
            except (OSError, nats.errors.Error) as error:
                self.failure = str(error) or type(error).__name__
            finally:
                self._heard_at = self.heard_at
                self._connection = None
                self._state.change("disconnected")
                await connection.bury()
            self._counters.replaced_clients += 1
            attempt += 1
            await asyncio.sleep(wait_s)

    async def _open(self, connection: Connection, address: Address) -> None:
        try:
            await connection.open(address.url, address.host, address.port)
        except TimeoutError as error:
            raise OSError(f"{address.shown} gave no answer in {self._options.connect_timeout_s:g} s") from error
        except nats.errors.Error as error:
            if "authorization" in str(error).lower():
                raise _Refused(f"{address.shown} refused our credentials") from error
            raise
        while missing := [one for one in self._listening if not connection.is_bound(one)]:
            for listening in missing:
                await connection.subscribe(listening, listening.subject, listening.queue, listening.receive)
            if connection.lost.is_set():
                raise ConnectionError(connection.why)
        self._max_payload = connection.max_payload
        self._connection = connection
        if self._counters.replaced_clients:
            self._counters.reconnects += 1
            self._say("connected", f"connected to the bus at {address.shown}")
        self._state.change("connected")

    def _client_error(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            self._counters.dropped_slow += 1
        else:
            self._counters.client_errors += 1
        text = str(error) or type(error).__name__
        self._counters.last_error = text
        self._say(type(error).__name__, f"the bus's client reports: {text}")

    def _say(self, kind: str, text: str) -> None:
        """Logs one line a second of each kind; the counters have the rest."""
        now = self._clock.now()
        if now - self._logged.get(kind, -LOG_EVERY_S) >= LOG_EVERY_S:
            self._logged[kind] = now
            _logger.warning("%s", text)


class NatsBus(CoreBus):
    """A bus over a nats-server. Call `connect` once before anything else.

    Args:
        url: ``nats://host:port`` or ``tls://host:port``; several, with commas, are tried in turn.
        cluster: second token of every subject.
        name: shown in the server's list of connections.
        connect_timeout_s: of one attempt; a server that takes longer is tried again.
        subscription_limit: messages that one subscription may have waiting before they are dropped and counted.
    """

    def __init__(
        self,
        url: str,
        *,
        cluster: str,
        name: str,
        user: str | None = None,
        password: str | None = None,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        tls_hostname: str | None = None,
        clock: Clock | None = None,
        connect_timeout_s: float = 1.0,
        subscription_limit: int = 65_536,
        parcels_limit_bytes: int = PARCELS_LIMIT_BYTES,
    ) -> None:
        ours = SystemClock() if clock is None else clock
        options = ClientOptions(
            name=name,
            user=user,
            password=password,
            token=token,
            tls=tls,
            tls_hostname=tls_hostname,
            connect_timeout_s=connect_timeout_s,
            subscription_limit=subscription_limit,
        )
        counters = BusCounters()
        self._addresses = parse_addresses(url)
        self._nats = NatsTransport(self._addresses, options, ours, counters)
        super().__init__(
            self._nats,
            cluster=cluster,
            name=name,
            clock=ours,
            counters=counters,
            new_id=lambda: secrets.token_hex(11),
            parcels_limit_bytes=parcels_limit_bytes,
        )

    async def connect(self, timeout_s: float = CONNECT_S) -> None:
        """Connects for the first time; from then on the bus holds the connection by itself.

        Raises:
            StartError: ``cluster_not_reached``: nobody answers there in time, or at once if we are refused.
        """
        connected = asyncio.Event()
        end = self.on_state(lambda state: connected.set() if state == "connected" else None)
        self._nats.start()
        waits = [
            asyncio.create_task(connected.wait(), name="wait for the bus"),
            asyncio.create_task(self._nats.refused.wait(), name="wait for a refusal"),
        ]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            end()
            for wait in waits:
                wait.cancel()
        if connected.is_set():
            return
        await self.close()
        shown = ", ".join(address.shown for address in self._addresses)
        raise StartError(
            "cluster_not_reached",
            f"the NATS server at {shown} can't be used: {self._nats.failure}; "
            "start a node with `skulk up`, or check SKULK_NATS_URL and the credentials",
        )

    async def close(self) -> None:
        """Sends what was published, then ends everything."""
        if self.state == "connected":
            try:
                await self.flush(CLOSE_FLUSH_S)
            except (UnavailableError, ServiceError):
                _logger.debug("closed a bus whose server no longer answers")
        await super().close()
