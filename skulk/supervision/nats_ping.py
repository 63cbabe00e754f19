"""Does the nats-server still answer? A policy that is pure, and the connection that asks.

| answer to a ping                            | misses | verdict                            |
|---------------------------------------------|--------|------------------------------------|
| PONG, or any other word of the server       | 0      | lives                              |
| none in time, or no connection              | + 1    | at `PingPolicy.misses`: replace it |
| none, but we ourselves were late by 250 ms  | same   | says nothing about the server      |

A raw connection and not the HTTP monitor: the monitor can answer while the loop that serves clients is stuck, and may
be switched off. A process that is stopped (SIGSTOP) still accepts connections, by its kernel; it never says INFO.
"""

from __future__ import annotations

import asyncio
import json
from typing import Final

import msgspec

LINE_LIMIT: Final = 256 * 1024  # an INFO with many cluster addresses is long


class PingPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How often to ask and when to lose patience.

    Attributes:
        interval_s: from one question to the next.
        timeout_s: wait for an answer, connecting included.
        misses: so many in a row, and the server counts as dead.
        late_s: a miss noticed so much after its time was our own delay (suspend, starved loop).
    """

    interval_s: float = 0.5
    timeout_s: float = 0.5
    misses: int = 2
    late_s: float = 0.25


class PingState(msgspec.Struct, frozen=True, kw_only=True):
    """Misses in a row."""

    misses: int = 0

    def is_dead(self, policy: PingPolicy) -> bool:
        return self.misses >= policy.misses


def on_pong(_: PingState) -> PingState:
    """The server answered."""
    return PingState()


def on_miss(policy: PingPolicy, state: PingState, took_s: float) -> PingState:
    """The server didn't answer.

    Args:
        policy: the patience.
        state: misses so far.
        took_s: from the question to this verdict, by the clock.
    """
    was_late = took_s > policy.timeout_s + policy.late_s
    return state if was_late else PingState(misses=state.misses + 1)


class PingConnection:
    """A client's connection that is used for pings only; connects on demand.

    Args:
        port: the client port on loopback.
        user: name of the node's own processes.
        password: theirs.
    """

    def __init__(self, port: int, user: str, password: str) -> None:
        self._port = port
        options = {
            "user": user,
            "pass": password,
            "name": "supervision",
            "lang": "python",
            "version": "1",
            "verbose": False,
            "pedantic": False,
        }
        self._connect_line = b"CONNECT " + json.dumps(options).encode() + b"\r\n"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ping(self) -> None:
        """Ask once and take the answer. Has no time limit of its own; close it after any error or cancellation.

        Raises:
            OSError: refused, cut off, or not what a nats-server says.
        """
        reader, writer = self._streams or await self._connect()
        writer.write(b"PING\r\n")
        while True:
            line = await _line(reader)
            if line.startswith(b"PING"):
                writer.write(b"PONG\r\n")
            elif line.startswith(b"-ERR"):
                # It refuses us, so it lives; it closes such a connection.
                self.close()
                return
            elif line.startswith(b"PONG"):
                return

    def close(self) -> None:
        """Drop the connection; the next ping makes a new one."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=LINE_LIMIT)
        # Kept at once, so that whoever gives up waiting for the INFO can close it.
        self._streams = (reader, writer)
        hello = await _line(reader)
        if not hello.startswith(b"INFO "):
            raise ConnectionError(f"port {self._port} says {hello[:40]!r} and not INFO")
        writer.write(self._connect_line)
        return self._streams


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        line = await reader.readline()
    except ValueError as error:
        raise ConnectionError(f"a line over {LINE_LIMIT} bytes") from error
    if not line.endswith(b"\n"):
        raise ConnectionError("the server closed the connection")
    return line
