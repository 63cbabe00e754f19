"""Which addresses of a machine are worth telling others, and how a route is written.

| address                              | others may dial it                                             |
|--------------------------------------|----------------------------------------------------------------|
| loopback (127.0.0.0/8, ::1)          | only from this machine: told with ``--local`` alone            |
| link-local (169.254.0.0/16, fe80::)  | never: it means another machine on every link                  |
| unspecified, multicast, reserved     | never                                                          |
| all others, private ones first       | yes; which of them works is found out by asking (`probe`)      |

All pure but `local_addresses`, which asks the system.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Final, TypeAlias

import psutil

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_ROUTES: Final = 8
"""Addresses of one node that are told and kept; no machine is reached by more."""
_ROUTE: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]{1,253})):([0-9]{1,5})")


def route_text(host: str, port: int) -> str:
    """``host:port``, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_route(route: str) -> tuple[str, int] | None:
    """Host and port of a route; None where the text is none."""
    match = _ROUTE.fullmatch(route)
    if match is None or not 0 < int(match[3]) < 65536 or (match[1] and _parsed(match[1]) is None):
        return None
    return match[1] or match[2], int(match[3])


def is_usable(address: Address, *, local: bool) -> bool:
    """Whether another node may dial this address.

    Args:
        address: of an interface, or from somebody's word.
        local: the cluster lives on this machine's loopback.
    """
    if address.is_loopback:
        return local
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped is None and not (
        address.is_link_local or address.is_unspecified or address.is_multicast or address.is_reserved
    )


def usable_of(found: Iterable[str], *, local: bool = False) -> tuple[str, ...]:
    """The usable ones among addresses as text, each once: IPv4 before IPv6, private before public, then by number."""
    usable = {address for text in found if (address := _parsed(text)) is not None and is_usable(address, local=local)}
    ordered = sorted(usable, key=lambda one: (one.version, not one.is_private, int(one)))
    return tuple(str(one) for one in ordered[:MAX_ROUTES])


def usable_routes(told: Iterable[str], *, local: bool) -> tuple[str, ...]:
    """What of the routes that another node told may be dialled, in its order; host names are taken as they are."""
    routes: dict[str, None] = {}
    for route in told:
        split = split_route(route)
        if split is None:
            continue
        host, port = split
        address = _parsed(host)
        if (address is None and not _is_number(host)) or (address is not None and is_usable(address, local=local)):
            routes[route_text(host, port)] = None
    return tuple(routes)[:MAX_ROUTES]


def is_loopback_route(route: str) -> bool:
    """Whether a route leads to this machine's loopback."""
    split = split_route(route)
    host = "" if split is None else split[0]
    address = _parsed(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def local_addresses() -> tuple[str, ...]:
    """The addresses by which other machines reach this one now; may be none. Asks the system, under a millisecond."""
    states = psutil.net_if_stats()
    return usable_of(
        one.address
        for name, addresses in psutil.net_if_addrs().items()
        if (state := states.get(name)) is not None and state.isup
        for one in addresses
    )


def _parsed(text: str) -> Address | None:
    try:
        return ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None


def _is_number(host: str) -> bool:
    """Whether a host that is no address looks like a broken one (``300.1.2.3``); no name ends in digits alone."""
    return host.rpartition(".")[2].isdecimal()
