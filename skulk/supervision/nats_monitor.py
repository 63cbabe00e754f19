"""Which servers this node's nats-server has routes to, asked of its monitor on loopback.

A connection for each question, a few hundred bytes: the server closes what stays open while it is replaced anyway.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec

from skulk.supervision.nats_config import LOOPBACK

TIMEOUT_S: Final = 1.0
MAX_BYTES: Final = 16 * 1024 * 1024


class _Route(msgspec.Struct, frozen=True):
    remote_name: str = ""
    did_solicit: bool = False
    ip: str = ""
    port: int = 0


class _Routes(msgspec.Struct, frozen=True):
    routes: tuple[_Route, ...] = ()


async def joined_servers(monitor_port: int, timeout_s: float = TIMEOUT_S) -> dict[str, str]:
    """The servers that are joined by a route now: their names, and ``ip:port`` where ours dialled (else empty).

    Raises:
        OSError: the server doesn't answer as it should (`TimeoutError` is one).
    """
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(LOOPBACK, monitor_port)
        try:
            writer.write(b"GET /routez HTTP/1.0\r\nHost: localhost\r\n\r\n")
            answer = await _all(reader)
        finally:
            writer.transport.abort()
    return read_routes(answer)


def read_routes(answer: bytes) -> dict[str, str]:
    """What `joined_servers` gives, from an HTTP answer of ``/routez``. Pure.

    Raises:
        OSError: it is none.
    """
    head, _, body = answer.partition(b"\r\n\r\n")
    if b" 200 " not in head.partition(b"\r\n")[0] + b" ":
        raise ConnectionError(f"the monitor says {head[:60]!r}")
    try:
        found = msgspec.json.decode(body, type=_Routes)
    except msgspec.DecodeError as error:
        raise ConnectionError(f"the monitor's answer isn't readable: {error}") from error
    return {route.remote_name: _dialled(route) for route in found.routes if route.remote_name}


def _dialled(route: _Route) -> str:
    host = f"[{route.ip}]" if ":" in route.ip else route.ip
    return f"{host}:{route.port}" if route.did_solicit else ""


async def _all(reader: asyncio.StreamReader) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := await reader.read(65_536):
        parts.append(part)
        size += len(part)
        if size > MAX_BYTES:
            raise ConnectionError(f"the monitor says more than {MAX_BYTES} bytes")
    return b"".join(parts)
