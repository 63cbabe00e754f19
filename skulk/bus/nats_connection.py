"""One life of one nats-py client: from a socket that we opened to a socket that we close for good.

nats-py reconnects by itself, and we don't let it: it hangs on silent loss, sends late what was buffered meanwhile, and
stays closed for good after some errors. A `Connection` is used until it is lost, then thrown away; `nats_bus` makes the
next one. What its client does behind our back, and what stands against it here:

    its read loop dies of a pong that comes after a flush gave up     none is given up: `_watch` pings for ever
    flush() sends its PING before what is still pending               we flush by a message to our own inbox (`core`)
    pending publishes grow without bound while the socket is stuck    `publish` waits at 1 MiB, 2 s at most
    closing drains the socket, for ever if the peer is stuck          the socket is aborted first, then takes anything
    its read loop dies of anything unforeseen, and flush() then    the end of its loops is the end of the connection
    returns at once as if it had been answered
    malformed headers of anybody's message end the read loop          such a message comes without its headers
    INFO between CONNECT and PONG leaves it "connecting" for ever     a client not connected after connect() is lost
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any, Final, cast
from urllib.parse import ParseResult

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as ClientSubscription
from nats.aio.transport import TcpTransport

from skulk.bus.transport import NO_HEADERS, Raw, Receive, disconnected
from skulk.clock import Clock
from skulk.units import KIB, MIB

TICK_S: Final = 0.25
PING_S: Final = 0.5
SILENT_S: Final = 2.5
UNANSWERED_S: Final = 10.0
LATE_TICK_S: Final = 1.0
BURY_S: Final = 2.0
PENDING_BYTES: Final = 1 * MIB
RELIEF_S: Final = 2.0
READ_BYTES: Final = 256 * KIB
NEVER_S: Final = 1_000_000

_NO_LINGER: Final = struct.pack("ii", 1, 0)


class ClientOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach a server and who we are there.

    Attributes:
        name: shown in the server's list of connections.
        tls: for ``tls://`` and for servers that demand it.
        subscription_limit: messages that one subscription may have waiting; more are dropped and counted.
        subscription_bytes: the same in bytes.
    """

    name: str
    user: str | None = None
    password: str | None = None
    token: str | None = None
    tls: ssl.SSLContext | None = None
    tls_hostname: str | None = None
    connect_timeout_s: float = 1.0
    subscription_limit: int = 65_536
    subscription_bytes: int = 64 * MIB


class Socket(TcpTransport):
    """nats-py's TCP transport, but opened by us, never waited for at its end, and knowing when it last heard."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        clock: Clock,
        on_end: Callable[[str], None],
    ) -> None:
        super().__init__()
        self._bare_io_reader = self._io_reader = reader
        self._bare_io_writer = self._io_writer = writer
        self._clock = clock
        self._on_end = on_end
        self.heard_at = clock.now()
        self.drained = asyncio.Event()
        self.is_aborted = False

    def __bool__(self) -> bool:
        return True

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        """Nothing to do: it is open."""

    async def read(self, buffer_size: int) -> bytes:
        try:
            received: bytes = await super().read(max(buffer_size, READ_BYTES))
        except OSError as error:
            self._on_end(str(error) or type(error).__name__)
            raise
        if not received:
            self._on_end("the server closed the connection")
        self.heard_at = self._clock.now()
        return received

    def write(self, payload: bytes) -> None:
        if not self.is_aborted:
            super().write(payload)

    def writelines(self, payload: list[bytes]) -> None:
        if not self.is_aborted:
            super().writelines(payload)

    async def drain(self) -> None:
        try:
            await super().drain()
        except OSError as error:
            if not self.is_aborted:
                self._on_end(str(error) or type(error).__name__)
                raise
        finally:
            self.drained.set()

    async def wait_closed(self) -> None:
        """Not waited for: an aborted socket is gone."""

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        """Ends it now and throws away what it hasn't sent, in the kernel too: nothing comes out late."""
        if self.is_aborted:
            return
        self.is_aborted = True
        self.drained.set()
        writer = self._io_writer
        assert writer is not None
        connected = writer.get_extra_info("socket")
        if connected is not None and connected.fileno() >= 0:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        writer.transport.abort()


class _Client(Client):
    """nats-py's client, but deaf to malformed headers: one message of anybody's mustn't cost all others."""

    async def _process_headers(self, headers: bytes) -> dict[str, str] | None:
        try:
            return await super()._process_headers(headers)
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # of its slicing and decoding
            await self._error_cb(ValueError(f"a message with malformed headers: {error}"))
            return None


class Connection:
    """A connected client until it is `lost`.

    Args:
        on_error: told of each error that nats-py reports.
    """

    def __init__(self, options: ClientOptions, clock: Clock, on_error: Callable[[Exception], None]) -> None:
        self._options = options
        self._clock = clock
        self._on_error = on_error
        self._client = _Client()
        self._socket: Socket | None = None
        self._has_begun = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._bound: dict[object, ClientSubscription] = {}
        self.lost = asyncio.Event()
        self.why = ""

    @property
    def max_payload(self) -> int:
        return self._client.max_payload

    @property
    def heard_at(self) -> float:
        assert self._socket is not None, "not open"
        return self._socket.heard_at

    def is_bound(self, key: object) -> bool:
        """Whether this client has the subscription that ``key`` stands for."""
        return key in self._bound

    async def open(self, url: str, host: str, port: int) -> None:
        """Connects, within the time-out of the options.

        Raises:
            OSError: nobody there, or no answer in time (`TimeoutError`).
            nats.errors.Error: the server refused us.
        """
        options = self._options
        async with asyncio.timeout(options.connect_timeout_s):
            reader, writer = await asyncio.open_connection(host, port, limit=READ_BYTES)
            self._socket = Socket(reader, writer, self._clock, self._lose)
            self._client._transport = self._socket  # pyright: ignore[reportPrivateUsage]
            self._has_begun = True
            await self._client.connect(
                servers=[url],
                name=options.name,
                user=options.user,
                password=options.password,
                token=options.token,
                tls=options.tls,
                tls_hostname=options.tls_hostname,
                connect_timeout=NEVER_S,
                allow_reconnect=False,
                dont_randomize=True,
                ping_interval=NEVER_S,
                pending_size=0,
                skip_subject_validation=True,
                error_cb=self._client_error,
                closed_cb=self._client_closed,
                disconnected_cb=self._client_closed,
            )
        if not self._client.is_connected:
            raise ConnectionError("the server sent something else than the end of the handshake")
        self._follow_loops()
        self._own(self._watch(), "watch the bus's connection")

    def _follow_loops(self) -> None:
        """Without its loops a client looks connected and hears nothing."""
        client = self._client
        reading = cast("asyncio.Task[Any]", client._reading_task)  # pyright: ignore[reportPrivateUsage]
        flushing = cast("asyncio.Task[Any]", client._flusher_task)  # pyright: ignore[reportPrivateUsage]
        for loop in (reading, flushing):
            loop.add_done_callback(self._loop_ended)

    def _loop_ended(self, loop: asyncio.Task[Any]) -> None:
        self._lose(f"the client stopped working: {loop.get_name()} ended")

    async def publish(self, message: Raw) -> None:
        """Hands a message to the client.

        Raises:
            UnavailableError: ``bus_disconnected``.
        """
        if self._client.pending_data_size > PENDING_BYTES:
            await self._relieve()
        if self.lost.is_set():
            raise disconnected(self.why)
        headers = dict(message.headers) if message.headers else None
        try:
            await self._client.publish(message.subject, message.body, reply=message.reply, headers=headers)
        except (nats.errors.Error, OSError) as error:
            raise disconnected(str(error) or type(error).__name__) from error

    async def flush(self, timeout_s: int) -> None:
        """Returns when the server has answered a ping.

        Raises:
            nats.errors.Error: it didn't in time.
        """
        await self._client.flush(timeout_s)

    async def subscribe(self, key: object, subject: str, queue: str, receive: Receive) -> None:
        """Subscribes on this client. What it has left when it is lost isn't delivered: the next one may be ahead."""
        lost = self.lost

        async def on_message(message: Msg) -> None:
            if not lost.is_set():
                receive(Raw(message.subject, message.data, message.reply, message.headers or NO_HEADERS))

        try:
            self._bound[key] = await self._client.subscribe(
                subject,
                queue=queue,
                cb=on_message,
                pending_msgs_limit=self._options.subscription_limit,
                pending_bytes_limit=self._options.subscription_bytes,
            )
        except (nats.errors.Error, OSError) as error:
            self._lose(str(error) or type(error).__name__)

    async def unsubscribe(self, key: object) -> None:
        """Ends a subscription; one that this client doesn't have is no error."""
        bound = self._bound.pop(key, None)
        if bound is None or self.lost.is_set():
            return
        try:
            await bound.unsubscribe()
        except (nats.errors.Error, OSError) as error:
            self._on_error(error)

    async def bury(self) -> None:
        """Ends the client and everything it left running."""
        self._lose("closed")
        for task in self._tasks:
            task.cancel()
        if not self._has_begun:
            return
        closing = asyncio.create_task(self._client.close(), name="close the bus's client")
        await asyncio.wait({closing, *self._tasks}, timeout=BURY_S)
        if not closing.done():
            closing.cancel()
            await asyncio.wait({closing}, timeout=BURY_S)
        elif not closing.cancelled() and (error := closing.exception()) is not None:
            assert isinstance(error, Exception)
            self._on_error(error)

    def _own(self, coroutine: Any, name: str) -> asyncio.Task[Any]:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _lose(self, why: str) -> None:
        if not self.lost.is_set():
            self.why = why
            self.lost.set()
        if self._socket is not None:
            self._socket.abort()

    async def _client_error(self, error: Exception) -> None:
        self._on_error(error)

    async def _client_closed(self) -> None:
        last = self._client.last_error
        self._lose(str(last) if last is not None else "the client closed")

    async def _relieve(self) -> None:
        """Waits until the socket takes more; a socket that takes nothing for 2 s is as good as none."""
        assert self._socket is not None
        try:
            async with asyncio.timeout(RELIEF_S):
                while self._client.pending_data_size > PENDING_BYTES and not self.lost.is_set():
                    self._socket.drained.clear()
                    await self._socket.drained.wait()
        except TimeoutError as error:
            raise disconnected("the server takes nothing") from error

    async def _watch(self) -> None:
        """Loses the connection when a ping stays unanswered: 2.5 s with nothing heard at all, 10 s in any case.

        A tick that comes late (a suspended machine, a blocked loop) restarts the clock: what was sent meanwhile must be
        given the chance to be read.
        """
        assert self._socket is not None
        ping: asyncio.Task[Any] | None = None
        asked_at = ticked_at = self._clock.now()
        while True:
            await asyncio.sleep(TICK_S)
            now = self._clock.now()
            was_late = now - ticked_at > TICK_S + LATE_TICK_S
            ticked_at = now
            if not self._client.is_connected:
                await self._client_closed()
            elif ping is None or (ping.done() and now - asked_at >= PING_S):
                ping = self._own(self._client.flush(timeout=NEVER_S), "ping the bus's server")
                asked_at = now
            elif was_late:
                asked_at = now
            elif not ping.done() and self._is_silent(now, asked_at):
                self._lose(f"the server was silent for {now - self._socket.heard_at:.1f} s")

    def _is_silent(self, now: float, asked_at: float) -> bool:
        assert self._socket is not None
        unanswered_s = now - asked_at
        return unanswered_s >= UNANSWERED_S or min(unanswered_s, now - self._socket.heard_at) >= SILENT_S
