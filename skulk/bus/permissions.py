"""May this user do on an existing bus what a node does? Asked at the start, so that nothing fails in silence later.

    a connection of its own ──SUB / PUB of every kind of subject──> server
                            <──-ERR 'Permissions Violation for …'── before the PONG that ends each question

A message of the probe has an id that no node has and an empty body: who hears it counts it as unreadable and goes on.
A header keeps it out of streams.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec
import nats.errors

from skulk.bus.nats_bus import parse_addresses
from skulk.bus.nats_connection import ClientOptions, Connection
from skulk.bus.subjects import CHANNELS, ENDPOINTS
from skulk.bus.transport import Raw
from skulk.clock import SystemClock
from skulk.errors import StartError, UnavailableError
from skulk.units import KIB, format_bytes

LEAST_PAYLOAD: Final = 256 * KIB
TIMEOUT_S: Final = 5
_VIOLATION: Final = re.compile(r"permissions violation for (publish|subscription) to \"([^\"]+)\"", re.IGNORECASE)
_ID: Final = "skulk-probe"
_NO_STREAM: Final = {"Nats-Expected-Stream": "none"}


class Permissions(msgspec.Struct, frozen=True, kw_only=True):
    """What a user may not do.

    Attributes:
        publish: subjects that it may not publish to.
        subscribe: subjects that it may not subscribe to.
        max_payload: of the server, bytes.
    """

    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()
    max_payload: int = 0


def needed(cluster: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The subjects that a node publishes to and those that it subscribes to, one of each kind. Pure."""
    templates = (*CHANNELS, *ENDPOINTS)
    publish = [template.subject(cluster, **dict.fromkeys(template.ids, _ID)) for template in templates]
    subscribe = [template.pattern(cluster) for template in templates]
    return (*publish, f"_INBOX.{_ID}.1"), (*subscribe, f"_INBOX.{_ID}.*", "$SRV.PING", "$SRV.INFO", "$SRV.STATS")


def check_permissions(found: Permissions, cluster: str) -> None:
    """Refuses what a node can't live with.

    Raises:
        StartError: ``bus_unusable``, with what is missing and what to grant.
    """
    if found.max_payload < LEAST_PAYLOAD:
        raise StartError(
            "bus_unusable",
            f"The bus that SKULK_NATS_URL names takes messages of {format_bytes(found.max_payload)} at most; "
            f"a node needs {format_bytes(LEAST_PAYLOAD)}. Raise max_payload in its configuration.",
        )
    missing = [*(f"publish to {one}" for one in found.publish), *(f"subscribe to {one}" for one in found.subscribe)]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise StartError(
            "bus_unusable",
            f"The user of SKULK_NATS_URL may not {shown}. Grant it publish and subscribe on skulk.{cluster}.v1.>, "
            "_INBOX.> and $SRV.>; deployment/nats has an example.",
        )


async def probe_permissions(url: str, cluster: str, *, user: str = "", password: str = "") -> Permissions:
    """What this user may not do there.

    Raises:
        StartError: ``cluster_not_reached``.
    """
    publish, subscribe = needed(cluster)
    named = {subject.lower(): subject for subject in (*publish, *subscribe)}
    options = ClientOptions(name=_ID, user=user or None, password=password or None, connect_timeout_s=TIMEOUT_S)
    denied: dict[str, dict[str, None]] = {"publish": {}, "subscription": {}}

    def on_error(error: Exception) -> None:
        match = _VIOLATION.search(str(error))
        if match is not None:
            # nats-py tells errors in lower case
            denied[match[1].lower()][named.get(match[2].lower(), match[2])] = None

    addresses = parse_addresses(url)
    failure: Exception = OSError("no address")
    for address in addresses:
        connection = Connection(options, SystemClock(), on_error)
        try:
            await connection.open(address.url, address.host, address.port)
            await _ask(connection, publish, subscribe)
            return Permissions(
                publish=tuple(denied["publish"]),
                subscribe=tuple(denied["subscription"]),
                max_payload=connection.max_payload,
            )
        except (OSError, UnavailableError, nats.errors.Error) as error:
            failure = error
        finally:
            await connection.bury()
    shown = ", ".join(address.shown for address in addresses)
    why = str(failure) or type(failure).__name__
    raise StartError("cluster_not_reached", f"the NATS server at {shown} can't be used: {why}") from failure


async def _ask(connection: Connection, publish: tuple[str, ...], subscribe: tuple[str, ...]) -> None:
    """Tries each; when it returns, every refusal has been reported."""
    for subject in subscribe:
        await connection.subscribe(subject, subject, "", lambda _: None)
    for subject in publish:
        await connection.publish(Raw(subject, b"", headers=_NO_STREAM))
    for _ in range(2):  # the first may overtake what nats-py still holds back
        await connection.flush(TIMEOUT_S)
