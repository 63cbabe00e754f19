"""What the launcher tells a gateway at its start: one JSON line on the gateway's standard input.

It never crosses the bus, for it holds the bus's password and the API keys; environment and command line would show them
to ``ps``.
"""

from __future__ import annotations

from typing import Literal

from skulk.wire.base import Wire


class GatewaySpec(Wire, frozen=True, kw_only=True):
    """One gateway's whole instruction.

    Attributes:
        gateway_id: a subject token; its streams go to it.
        incarnation: of this process, new at every start.
        node_id: the node it belongs to; what ``GET /node_id`` answers.
        nats_url: the node's own nats-server; ``user`` and ``password`` empty where it asks for none.
        api_port: 0 picks a free one; the announcement of readiness tells it.
        models_dir: where this node's weights lie; ``models_path``: read-only folders beside it.
        card_dirs: folders of own cards.
        ollama_dir: Ollama's store; empty: it isn't looked at.
        verified_file: where the node keeps the hashes that it took.
        max_body_bytes: largest body of an HTTP request.
        load_wait_s: longest wait of a request for a loading instance.
        auto_place: which models a request may place; ``failover``: streams go on elsewhere when their runner is lost.
        request_timeout_s: deadline of a request, by default and at most.
        api_keys: ``name:key`` each, or ``@file`` with one a line; empty: no key is asked for.
        allowed_hosts: names that Host and Origin may hold besides the usual ones.
        drain_timeout_s: how long running answers may go on after a polite stop.
        keep_alive_s: longest silence in a stream.
    """

    gateway_id: str
    incarnation: str
    node_id: str
    node_name: str
    version: str
    cluster: str
    nats_url: str
    user: str = ""
    password: str = ""
    api_host: str = "127.0.0.1"
    api_port: int = 0
    models_dir: str
    models_path: tuple[str, ...] = ()
    card_dirs: tuple[str, ...] = ()
    ollama_dir: str = ""
    verified_file: str
    offline: bool = False
    max_body_bytes: int = 64 * 1024 * 1024
    load_wait_s: float = 60.0
    auto_place: Literal["cached", "any", "off"] = "cached"
    failover: bool = True
    request_timeout_s: float = 600.0
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    drain_timeout_s: float = 5.0
    keep_alive_s: float = 10.0
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
