"""May this user do on an existing bus what a node does? Asked at the start, so that nothing fails in silence later.

    a connection of its own ──SUB / PUB of every kind of subject──> server
                            <──-ERR 'Permissions Violation for …'── before the PONG that ends each question

A message of the probe has an id that no node has and an empty body: who hears it counts it as unreadable and goes on.
A header keeps it out of streams.
"""

from __future__ import annotations

import asyncio
import re
from typing import Final

import msgspec
import nats
import nats.errors

from skulk.bus.nats_bus import parse_addresses
from skulk.bus.subjects import CHANNELS, ENDPOINTS
from skulk.errors import StartError
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
    denied: dict[str, dict[str, None]] = {"publish": {}, "subscription": {}}

    async def on_error(error: Exception) -> None:
        match = _VIOLATION.search(str(error))
        if match is not None:
            denied[match[1].lower()][match[2]] = None

    shown = ", ".join(address.shown for address in parse_addresses(url))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            client = await nats.connect(
                [address.url for address in parse_addresses(url)],
                user=user or None,
                password=password or None,
                name=_ID,
                allow_reconnect=False,
                error_cb=on_error,
            )
            try:
                publish, subscribe = needed(cluster)
                for subject in subscribe:
                    await client.subscribe(subject)
                await client.flush(TIMEOUT_S)
                for subject in publish:
                    await client.publish(subject, b"", headers=_NO_STREAM)
                await client.flush(TIMEOUT_S)
                max_payload = client.max_payload
            finally:
                await client.close()
    except (OSError, nats.errors.Error) as error:
        raise StartError(
            "cluster_not_reached", f"the NATS server at {shown} can't be used: {error or type(error).__name__}"
        ) from error
    return Permissions(
        publish=tuple(denied["publish"]), subscribe=tuple(denied["subscription"]), max_payload=max_payload
    )
