"""Ask a route's port who listens there, and whether it would take us. One short connection, no route is made.

    connect ──> INFO {server_name, cluster, auth_required, tls_required}   ours? else: why not
            ──> CONNECT as a client, with the routes' password         -ERR 'Authorization Violation': another token
                                                                       -ERR 'attempted to connect to route port': ours

nats-server checks the password before it notices that no server is calling, so the second step joins nothing. It is
taken only where both sides have a token, for it leaves a line in the other's log.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from skulk.discovery.addresses import split_route
from skulk.discovery.adverts import Problem
from skulk.discovery.peers import Answer

TIMEOUT_S: Final = 1.5
LINE_LIMIT: Final = 64 * 1024
SERVER_PREFIX: Final = "skulk-"


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks.

    Attributes:
        cluster: the NATS name of our cluster, ``skulk-<name>``.
        user, password: of the routes; empty: no token.
        has_tls: whether our routes use TLS.
    """

    cluster: str
    user: str = ""
    password: str = ""
    has_tls: bool = False


class _Info(msgspec.Struct, frozen=True):
    """What of a server's greeting matters here. ``client_id``: only clients are told one."""

    server_name: str = ""
    cluster: str = ""
    auth_required: bool = False
    tls_required: bool = False
    client_id: int | None = None


async def ask_route(route: str, caller: Caller, now: float, timeout_s: float = TIMEOUT_S) -> Answer:
    """What listens at ``host:port``; takes ``timeout_s`` at most and raises nothing."""
    try:
        async with asyncio.timeout(timeout_s), _connection(route) as (reader, writer):
            return await _asked(route, caller, now, reader, writer)
    except TimeoutError:
        return _no(now, "no_answer", f"{route} gives no answer: a firewall, or the machine is off")
    except ConnectionRefusedError:
        return _no(now, "port_closed", f"nobody listens at {route}: no node runs there, or with another --route-port")
    except (socket.gaierror, UnicodeError) as error:
        return _no(now, "unknown_host", f"{route}: no address is known for that name ({error})")
    except OSError as error:
        return _no(now, "no_answer", f"{route} can't be reached: {error.strerror or error}")


def judge(route: str, caller: Caller, info_line: bytes, now: float) -> Answer:
    """What a greeting tells, before any password was shown. Pure."""
    if not info_line:
        return _no(now, "no_answer", f"{route} closes the connection without a word: what forwards it has no target")
    try:
        info = msgspec.json.decode(info_line.removeprefix(b"INFO "), type=_Info)
    except msgspec.DecodeError:
        return _no(now, "other_program", f"what listens at {route} is no nats-server")
    if not info_line.startswith(b"INFO "):
        return _no(now, "other_program", f"what listens at {route} is no nats-server")
    if info.client_id is not None:
        return _no(now, "other_program", f"{route} is a NATS port for clients; peers are reached by their --route-port")
    if info.cluster != caller.cluster:
        name = info.cluster.removeprefix(SERVER_PREFIX) or "without a name"
        mine = caller.cluster.removeprefix(SERVER_PREFIX)
        return _no(now, "other_cluster", f"{route} belongs to the cluster {name}, this node to {mine} (--cluster NAME)")
    answer = Answer(at=now, node_id=info.server_name.removeprefix(SERVER_PREFIX))
    if info.tls_required != caller.has_tls:
        one, other = ("it", "this node") if info.tls_required else ("this node", "it")
        why = f"{route}: {one} uses TLS for routes and {other} doesn't (SKULK_TLS_CERT and its kin)"
        return msgspec.structs.replace(answer, problem="wrong_tls", detail=why)
    if info.auth_required != bool(caller.password):
        one, other = ("it", "this node") if info.auth_required else ("this node", "it")
        why = f"{route}: {one} has a SKULK_CLUSTER_TOKEN and {other} has none"
        return msgspec.structs.replace(answer, problem="wrong_token", detail=why)
    return answer


async def _asked(
    route: str, caller: Caller, now: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Answer:
    answer = judge(route, caller, await _line(reader), now)
    # With TLS the password would have to wait for a handshake; certificates say more than a token does.
    if (
        answer.problem is None
        and caller.password
        and not caller.has_tls
        and not await _is_taken(caller, reader, writer)
    ):
        return msgspec.structs.replace(
            answer, problem="wrong_token", detail=f"{route}: its SKULK_CLUSTER_TOKEN is not this node's"
        )
    return answer


async def _is_taken(caller: Caller, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    options = {"user": caller.user, "pass": caller.password, "name": "probe", "lang": "python", "version": "1"}
    writer.write(b"CONNECT " + json.dumps({**options, "verbose": False, "pedantic": False}).encode() + b"\r\n")
    while line := await _line(reader):
        if line.startswith(b"-ERR"):
            return b"authorization" not in line.lower()
    return True


@asynccontextmanager
async def _connection(route: str) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    split = split_route(route)
    assert split is not None, f"{route!r} is no route; settings and words of others are checked before"
    reader, writer = await asyncio.open_connection(*split, limit=LINE_LIMIT)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def _line(reader: asyncio.StreamReader) -> bytes:
    """One line; what is longer, or cut off, is no nats-server's and comes as it is."""
    try:
        return await reader.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        return error.partial
    except asyncio.LimitOverrunError:
        return b"too long"


def _no(now: float, problem: Problem, detail: str) -> Answer:
    return Answer(at=now, problem=problem, detail=detail)
