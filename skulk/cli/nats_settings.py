"""From the node's settings to its nats-server's: names, secrets, TLS."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from skulk.discovery.probe import server_name
from skulk.errors import StartError
from skulk.settings import Settings
from skulk.supervision.nats_config import NatsServerConfig, RouteTls, route_credentials

_LIKE_BCRYPT: Final = re.compile(r"\$2[abxy]?\$")


def server_config(settings: Settings, node_id: str, incarnation: str, routes: tuple[str, ...]) -> NatsServerConfig:
    """What the node's own nats-server runs with.

    Raises:
        StartError: ``config_invalid``.
    """
    credentials = route_credentials(settings.cluster_token) if settings.cluster_token else None
    return NatsServerConfig(
        server_name=server_name(node_id, incarnation),
        cluster_name=f"skulk-{settings.cluster}",
        client_password=client_password(settings.cluster_token),
        client_port=settings.nats_port,
        route_port=settings.route_port,
        routes=routes,
        advertise=settings.route_advertise,
        route_user="" if credentials is None else credentials.user,
        route_password="" if credentials is None else credentials.password,
        tls=route_tls(settings),
        local=settings.local,
    )


def client_password(token: str) -> str:
    """The password of the bus's clients: the cluster's token as it is, so that a person can show it too.

    Raises:
        StartError: ``config_invalid``: nats-server would read it as something else.
    """
    if not token.isprintable():
        raise StartError("config_invalid", "SKULK_CLUSTER_TOKEN holds a control character; choose one without.")
    if _LIKE_BCRYPT.match(token):
        raise StartError(
            "config_invalid",
            f"SKULK_CLUSTER_TOKEN begins with {token[:4]!r}, which nats-server takes for the hash of a password; "
            "choose one that begins otherwise.",
        )
    return token


def route_tls(settings: Settings) -> RouteTls | None:
    """TLS between servers, as it was told; None without.

    Raises:
        StartError: ``config_invalid``: one of the three files isn't named, or isn't there.
    """
    files = {
        "SKULK_TLS_CERT": settings.tls_cert,
        "SKULK_TLS_KEY": settings.tls_key,
        "SKULK_TLS_CA": settings.tls_ca,
    }
    if not any(files.values()):
        return None
    for name, path in files.items():
        if not path:
            raise StartError("config_invalid", f"{name} is missing: TLS for routes takes {', '.join(files)} together.")
        if not Path(path).is_file():
            raise StartError(
                "config_invalid", f"{name}: {path} is no file; nats-server needs it for TLS of its routes."
            )
    return RouteTls(cert_file=settings.tls_cert, key_file=settings.tls_key, ca_file=settings.tls_ca)
