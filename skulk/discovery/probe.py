"""Ask a route's port who listens there, and whether it would take us. One short connection, no route is made.

    connect ──> INFO {server_name, cluster, auth_required}                  ours? else: why not
            ──> CONNECT as a client, with the routes' password         -ERR 'Authorization Violation': another token
                                                                       -ERR 'attempted to connect to route port': ours

nats-server checks the password before it notices that no server is calling, so the second step joins nothing. It is
taken only where both sides have a token, for it leaves a line in the other's log. A server with TLS for routes says
nothing before the handshake; one that stays silent is offered a handshake, to tell TLS from a firewall.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Final

import msgspec

from skulk.discovery.addresses import split_route
from skulk.discovery.adverts import Problem, printable
from skulk.discovery.peers import Answer
from skulk.ids import is_token

TIMEOUT_S: Final = 1.5
LINE_LIMIT: Final = 64 * 1024
PREFIX: Final = "skulk-"
_TLS_SETTINGS: Final = "SKULK_TLS_CERT, SKULK_TLS_KEY, SKULK_TLS_CA"


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks.

    Attributes:
        cluster: the NATS name of our cluster, ``skulk-<name>``.
        user, password: of the routes; empty: no token.
        tls: files of certificate, key and authority; None: our routes use no TLS.
    """

    cluster: str
    user: str = ""
    password: str = ""
    tls: tuple[str, str, str] | None = None


class _Info(msgspec.Struct, frozen=True):
    """What of a server's greeting matters here. ``client_id``: only clients are told one."""

    server_name: str = ""
    cluster: str = ""
    auth_required: bool = False
    client_id: int | None = None


def server_name(node_id: str, incarnation: str) -> str:
    """The name of a node's nats-server. Another one in each life: servers refuse a namesake.

    A copied home thus joins, and the beats tell that two nodes have one id; and a machine that lost its power isn't
    kept out until its former connections are noticed to be dead.
    """
    return f"{PREFIX}{node_id}.{incarnation}"


def node_of_server(name: str) -> str:
    """The node whose server has this name; empty where it is no node's."""
    node_id = name.removeprefix(PREFIX).partition(".")[0]
    return node_id if is_token(node_id) else ""


async def ask_route(route: str, caller: Caller, now: float, timeout_s: float = TIMEOUT_S) -> Answer:
    """What listens at ``host:port``; takes twice ``timeout_s`` at most and raises nothing."""
    try:
        async with asyncio.timeout(timeout_s), _connection(route, _context(caller)) as (reader, writer):
            return await _asked(route, caller, now, reader, writer)
    except TimeoutError:
        if caller.tls is None and await _speaks_tls(route, timeout_s):
            return _no(now, "wrong_tls", f"{route} uses TLS for routes and this node doesn't ({_TLS_SETTINGS})")
        return _no(now, "no_answer", f"{route} gives no answer: a firewall, or the machine is off")
    except ssl.SSLError as error:
        if error.reason == "WRONG_VERSION_NUMBER":
            return _no(now, "wrong_tls", f"this node uses TLS for routes and {route} doesn't ({_TLS_SETTINGS})")
        return _no(now, "wrong_tls", f"TLS with {route} fails: {error.reason or error} ({_TLS_SETTINGS})")
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
        name = printable(info.cluster.removeprefix(PREFIX)) or "without a name"
        mine = caller.cluster.removeprefix(PREFIX)
        return _no(now, "other_cluster", f"{route} belongs to the cluster {name}, this node to {mine} (--cluster NAME)")
    answer = Answer(at=now, node_id=node_of_server(info.server_name))
    if info.auth_required != bool(caller.password):
        one, other = ("it", "this node") if info.auth_required else ("this node", "it")
        why = f"{route}: {one} has a SKULK_CLUSTER_TOKEN and {other} has none"
        return msgspec.structs.replace(answer, problem="wrong_token", detail=why)
    return answer


async def _asked(
    route: str, caller: Caller, now: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Answer:
    answer = judge(route, caller, await _line(reader), now)
    if answer.problem is None and caller.password and not await _is_taken(caller, reader, writer):
        return msgspec.structs.replace(
            answer, problem="wrong_token", detail=f"{route}: its SKULK_CLUSTER_TOKEN is not this node's"
        )
    return answer


def _context(caller: Caller) -> ssl.SSLContext | None:
    if caller.tls is None:
        return None
    certificate, key, authority = caller.tls
    context = ssl.create_default_context(cafile=authority)
    context.load_cert_chain(certificate, key)
    return context


async def _speaks_tls(route: str, timeout_s: float) -> bool:
    """Whether a silent server answers a handshake; nothing is trusted and nothing is said."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(timeout_s), _connection(route, context):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")  # who refuses a handshake in its words speaks TLS
    except OSError:
        return False


async def _is_taken(caller: Caller, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    options = {"user": caller.user, "pass": caller.password, "name": "probe", "lang": "python", "version": "1"}
    writer.write(b"CONNECT " + json.dumps({**options, "verbose": False, "pedantic": False}).encode() + b"\r\n")
    while line := await _line(reader):
        if line.startswith(b"-ERR"):
            return b"authorization" not in line.lower()
    return True


@asynccontextmanager
async def _connection(
    route: str, context: ssl.SSLContext | None
) -> AsyncGenerator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    split = split_route(route)
    assert split is not None, f"{route!r} is no route; settings and words of others are checked before"
    name = None if context is None else split[0]
    reader, writer = await asyncio.open_connection(*split, limit=LINE_LIMIT, ssl=context, server_hostname=name)
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
