"""The configuration of a node's nats-server, and what its log says about its ports. Pure.

| option                       | why                                                                                   |
|------------------------------|---------------------------------------------------------------------------------------|
| host, http on 127.0.0.1      | only this node's processes are clients; other nodes come by routes                    |
| ping_interval 1 s, ping_max 3| the defaults (2 min, 2) never noticed a silent cut; these do within 3.5 s             |
| no_advertise                 | else clients learn other nodes' loopback addresses and silently move there            |
| connect_retries              | a gossiped route is tried once by default, and two nodes that lost each other stay so |
| pool_size -1                 | one connection a peer: of a pool, a part can be missing, and its subjects with it     |
| advertise                    | what other servers gossip; without it, the address a connection came from             |
| *_error_reports              | a switched-off neighbour would fill the log with one line a second                    |
| authorization                | stands in this file (0600), never on a command line, which every user can read        |

A section for routes stands in it from the first start: a reload can add routes, not the listener.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from typing import Final, Literal, TypeAlias
from urllib.parse import quote

import msgspec

from skulk.units import MIB

LOOPBACK: Final = "127.0.0.1"
ANY_HOST: Final = "0.0.0.0"  # noqa: S104 - other nodes come by this door; a token and TLS guard it
CONNECT_RETRIES: Final = 1_000_000_000
ERROR_REPORTS: Final = 600  # every tenth minute at one attempt a second


class RouteTls(msgspec.Struct, frozen=True, kw_only=True):
    """TLS between servers, mutual: paths that are passed through to nats-server."""

    cert_file: str
    key_file: str
    ca_file: str


class NatsServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What differs from node to node.

    Attributes:
        server_name: unique in the cluster; a server refuses a namesake.
        cluster_name: equal on all servers that join.
        client_port: on loopback; 0: a free one, kept over restarts, as for the other ports.
        monitor_port: HTTP on loopback; None: off.
        route_host: address the routes' listener binds to; see `local`.
        route_port: None: no cluster.
        routes: ``host:port`` of other servers' route listeners; one for each server.
        advertise: ``host[:port]`` by which others reach this one's; empty: as they see it.
        client_user, client_password: for clients; no password: whoever is on this machine may connect.
        route_user, route_password: both empty: any server that knows the cluster's name may join.
        tls: for routes.
        max_payload_bytes: largest message, headers included.
        local: the routes' listener on loopback too.
    """

    server_name: str
    cluster_name: str
    client_user: str = "skulk"
    client_password: str = ""
    client_port: int = 0
    monitor_port: int | None = 0
    route_host: str = ANY_HOST
    route_port: int | None = 0
    routes: tuple[str, ...] = ()
    advertise: str = ""
    route_user: str = ""
    route_password: str = ""
    tls: RouteTls | None = None
    max_payload_bytes: int = MIB
    local: bool = False


class NatsPorts(msgspec.Struct, frozen=True, kw_only=True):
    """Port numbers of one server; 0: not known or not listening."""

    client: int = 0
    monitor: int = 0
    route: int = 0


class RouteCredentials(msgspec.Struct, frozen=True, kw_only=True):
    """What a server of the same token shows to join."""

    user: str
    password: str


def new_password() -> str:
    """32 random bytes in letters that need no quoting anywhere."""
    return secrets.token_urlsafe(32)


def route_credentials(token: str) -> RouteCredentials:
    """Derive them from ``SKULK_CLUSTER_TOKEN``, equal on every node.

    A digest and not the token itself: a token may hold any letter, one that starts like a bcrypt hash would be taken
    for one, and the file shouldn't tell the token.
    """
    digest = hashlib.sha256(b"skulk route\0" + token.encode()).hexdigest()
    return RouteCredentials(user="route", password=digest)


def render(config: NatsServerConfig, ports: NatsPorts | None = None) -> str:
    """The text of ``nats.conf``.

    Args:
        config: the node's settings.
        ports: numbers to take where the configuration leaves them free.
    """
    known = ports or NatsPorts()
    lines = [
        f"server_name: {_quoted(config.server_name)}",
        f'host: "{LOOPBACK}"',
        f"port: {_port(config.client_port, known.client)}",
        *([] if config.monitor_port is None else [f'http: "{LOOPBACK}:{_port(config.monitor_port, known.monitor)}"']),
        f"max_payload: {config.max_payload_bytes}",
        'ping_interval: "1s"',
        "ping_max: 3",
        'write_deadline: "5s"',
        f"connect_error_reports: {ERROR_REPORTS}",
        f"reconnect_error_reports: {ERROR_REPORTS}",
    ]
    if config.client_password:
        # As a list: in the short form, one user without a list, every client is dropped at each reload.
        user = f"{{ {_credentials(config.client_user, config.client_password)} }}"
        lines.append(f"authorization {{ timeout: 5, users: [ {user} ] }}")
    if config.route_port is not None:
        lines += _cluster_lines(config, _port(config.route_port, known.route))
    return "\n".join(lines) + "\n"


def _cluster_lines(config: NatsServerConfig, port: int) -> list[str]:
    has_credentials = bool(config.route_user or config.route_password)
    secret = f"{quote(config.route_user, safe='')}:{quote(config.route_password, safe='')}@" if has_credentials else ""
    return [
        "cluster {",
        f"  name: {_quoted(config.cluster_name)}",
        f"  host: {_quoted(LOOPBACK if config.local else config.route_host)}",
        f"  port: {port}",
        "  no_advertise: true",
        *([f"  advertise: {_quoted(config.advertise)}"] if config.advertise else []),
        "  pool_size: -1",
        f"  connect_retries: {CONNECT_RETRIES}",
        '  ping_interval: "1s"',
        "  ping_max: 3",
        *(
            [f"  authorization {{ {_credentials(config.route_user, config.route_password)}, timeout: 5 }}"]
            if has_credentials
            else []
        ),
        *([] if config.tls is None else _tls_lines(config.tls)),
        "  routes: [",
        *(f"    {_quoted(f'nats://{secret}{route}')}" for route in config.routes),
        "  ]",
        "}",
    ]


def _tls_lines(tls: RouteTls) -> list[str]:
    files = (("cert_file", tls.cert_file), ("key_file", tls.key_file), ("ca_file", tls.ca_file))
    return [
        "  tls {",
        *(f"    {name}: {_quoted(path)}" for name, path in files),
        "    verify: true",
        "    timeout: 5",
        "  }",
    ]


def _credentials(user: str, password: str) -> str:
    return f"user: {_quoted(user)}, password: {_quoted(password)}"


def _port(wanted: int, known: int) -> int:
    # 0 would mean the default port to nats-server, -1 means a free one.
    return wanted or known or -1


def _quoted(text: str) -> str:
    assert text.isprintable(), "settings are checked for control characters before they come here"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


Listener: TypeAlias = Literal["client", "monitor", "route"]

_LISTENING: Final[dict[Listener, re.Pattern[str]]] = {
    "client": re.compile(r"\[INF\] Listening for client connections on \S+:(\d+)"),
    "monitor": re.compile(r"\[INF\] Starting http monitor on \S+:(\d+)"),
    "route": re.compile(r"\[INF\] Listening for route connections on \S+:(\d+)"),
}
_CAN_NOT_LISTEN: Final[dict[Listener, re.Pattern[str]]] = {
    "client": re.compile(r"\[FTL\] Error listening on port: .*listen tcp \S+:(\d+): (?:bind: )?([^\"]*)"),
    "monitor": re.compile(r"\[FTL\] Can't start monitoring: .*listen tcp \S+:(\d+): (?:bind: )?(.*)"),
    "route": re.compile(r"\[FTL\] Error listening on router port: .*listen tcp \S+:(\d+): (?:bind: )?(.*)"),
}


class ListenFailure(msgspec.Struct, frozen=True, kw_only=True):
    """A port that nats-server couldn't have."""

    listener: Listener
    port: int
    why: str

    @property
    def is_in_use(self) -> bool:
        return "address already in use" in self.why


def ready_pattern(config: NatsServerConfig) -> str:
    """The line after which every listener stands; ``Server is ready`` comes before that of routes."""
    return "Server is ready" if config.route_port is None else _LISTENING["route"].pattern


def ports_seen(ports: NatsPorts, line: str) -> NatsPorts:
    """Fold one line of the server's log into what is known of its ports."""
    for listener, pattern in _LISTENING.items():
        match = pattern.search(line)
        if match is not None:
            return with_port(ports, listener, int(match[1]))
    return ports


def with_port(ports: NatsPorts, listener: Listener, port: int) -> NatsPorts:
    """``ports`` with one of them set."""
    return msgspec.structs.replace(ports, **{listener: port})


def listen_failure(line: str) -> ListenFailure | None:
    """What a line of the server's log says about a port that it couldn't have."""
    for listener, pattern in _CAN_NOT_LISTEN.items():
        match = pattern.search(line)
        if match is not None:
            return ListenFailure(listener=listener, port=int(match[1]), why=match[2].strip())
    return None
