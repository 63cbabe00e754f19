"""One frozen `Settings`, read once from flags > environment ``SKULK_*`` > ``skulk.toml`` > defaults.

This module is the record; `skulk.settings_options` is the table of names, parsers and help texts, and
`skulk.settings_load` reads the sources. The environment is read there and nowhere else.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Participation = Literal["full", "management"]
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
AutoPlace = Literal["cached", "any", "off"]
FlashAttention = Literal["auto", "on", "off"]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a process was told. Paths are absolute after loading; empty means "not given".

    Attributes:
        home: state folder: identity, lock, snapshot, logs, models.
        models_path: read-only folders that are looked through for models too.
        api_host: address the gateway listens on.
        nats_port: client port of the own nats-server, loopback only; 0 picks a free one, as for the other ports.
        bootstrap_peers: ``host:port`` of other nodes' routes.
        route_advertise: ``host[:port]`` by which others reach this node's routes; empty: its addresses.
        tls_cert, tls_key, tls_ca: files for TLS between nats-servers; all or none.
        events_stream: keep the events in a JetStream stream of the bus that ``nats_url`` names.
        local: everything on loopback, no discovery.
        api: whether this node has a gateway.
        place: models to have at least one instance of.
        memory_limit_bytes: the most that models may take here; 0: no limit but the memory.
        max_body_bytes: largest HTTP body.
        load_wait_s: longest wait of a request for a loading instance.
        failover: a stream whose runner is lost goes on at another one.
        request_timeout_s: deadline of a request, by default and at most.
        idle_ttl_s: after so long without a request a model that was placed on demand is unloaded.
        auto_place: what a request may place on demand.
        backends: declared computes of llama.cpp; empty: detect.
        threads: of llama.cpp; 0: physical cores.
        gpu_layers: -1: all.
        logits_all: keep every token's logits, for logprobs of prompts; costs context length x vocabulary.
        logits_all_n_ctx: the most context that is served with ``logits_all``, tokens.
        api_url: the cluster that the client commands talk to.
        hf_token: for gated repositories of the hub.
        models_budget_bytes: the most that fetched models may take on the disk; 0: no limit.
        foreign_caches: whether Ollama's and LM Studio's models are looked at.
        ollama_models: Ollama's store; empty: its usual place.
    """

    home: str
    models_dir: str
    models_path: tuple[str, ...] = ()
    cluster: str = "skulk"
    api_host: str = "0.0.0.0"  # noqa: S104 - the spec's default: any node answers; the doors are in the gateway
    api_port: int = 52415
    nats_port: int = 52414
    route_port: int = 52416
    files_port: int = 52417
    bootstrap_peers: tuple[str, ...] = ()
    route_advertise: str = ""
    mdns: bool = True
    local: bool = False
    api: bool = True
    participation: Participation = "full"
    offline: bool = False
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"
    place: tuple[str, ...] = ()
    nats_url: str = ""
    events_stream: bool = False
    nats_server: str = ""
    cluster_token: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    tls_ca: str = ""
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    memory_limit_bytes: int = 0
    max_body_bytes: int = 64 * 1024 * 1024
    load_wait_s: float = 60.0
    failover: bool = True
    request_timeout_s: float = 600.0
    step_timeout_s: float = 120.0
    idle_ttl_s: float = 600.0
    replace_after_s: float = 15.0
    auto_place: AutoPlace = "cached"
    backends: tuple[str, ...] = ()
    parallel: int = 16
    threads: int = 0
    batch: int = 2048
    ubatch: int = 512
    kv_type: str = "f16"
    gpu_layers: int = -1
    flash_attention: FlashAttention = "auto"
    logits_all: bool = False
    logits_all_n_ctx: int = 8192
    api_url: str = ""
    hf_token: str = ""
    hf_endpoint: str = ""
    hf_home: str = ""
    models_budget_bytes: int = 0
    foreign_caches: bool = True
    ollama_models: str = ""
