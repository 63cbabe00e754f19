"""The one table of settings: field, environment variable, key of ``skulk.toml``, parser, help text, flag.

To add a setting: a field in `skulk.settings`, a row here, and for a new kind of value a parser in
`skulk.settings_values`.
"""

from __future__ import annotations

import re
from typing import Any, Final, Literal, TypeAlias

import msgspec

from skulk.settings import Settings
from skulk.settings_values import (
    CLUSTER,
    COMPUTES,
    FILE,
    FOLDER,
    FOLDERS,
    GPU_LAYERS,
    HOST,
    HOST_PORT,
    HTTP_URL,
    KV_TYPES,
    NATS_URLS,
    NEGATED,
    PEERS,
    PORT,
    SECONDS,
    SIZE,
    SWITCH,
    TEXT,
    Parser,
    choice,
    integer,
    words,
)

Audience: TypeAlias = Literal["any", "node", "client"]

MASK: Final = "********"
_CREDENTIALS: Final = re.compile(r"(?<=://)[^/\s,]*@")
_NO_LOGITS: Final = "logprobs are not served yet"


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """One setting under all its names.

    Attributes:
        field: of `skulk.settings.Settings`.
        env: environment variable; the key in ``skulk.toml`` follows from it.
        flag: of ``skulk up`` (or of the client commands), empty: none.
        flag_value: what a flag without a value stands for.
        secret: never printed, never logged.
        unserved: why a value other than the default has no effect in this version; empty: it has.
    """

    field: str
    env: str
    parser: Parser
    help: str
    flag: str = ""
    flag_value: str = ""
    metavar: str = ""
    audience: Audience = "node"
    secret: bool = False
    unserved: str = ""

    @property
    def key(self) -> str:
        """Its key in ``skulk.toml``: the variable's name in lower case without ``SKULK_``."""
        return self.env.removeprefix("SKULK_").lower()


def _option(field: str, env: str, parser: Parser, help: str, **rest: Any) -> Option:  # noqa: A002 - its field's name
    return Option(field=field, env=env, parser=parser, help=help, **rest)


OPTIONS: Final[tuple[Option, ...]] = (
    _option(
        "home",
        "SKULK_HOME",
        FOLDER,
        "state folder (default: $XDG_DATA_HOME/skulk, else ~/.local/share/skulk)",
        flag="--home",
        metavar="DIR",
        audience="any",
    ),
    _option("models_dir", "SKULK_MODELS_DIR", FOLDER, "where models are kept (default: <home>/models)"),
    _option("models_path", "SKULK_MODELS_PATH", FOLDERS, "read-only folders that hold models too"),
    _option(
        "cluster",
        "SKULK_CLUSTER",
        CLUSTER,
        "name of the cluster; nodes of other names are not met (default: skulk)",
        flag="--cluster",
        metavar="NAME",
    ),
    _option(
        "api_host",
        "SKULK_API_HOST",
        HOST,
        "address the API listens on (default: 0.0.0.0)",
        flag="--api-host",
        metavar="HOST",
    ),
    _option(
        "api_port",
        "SKULK_API_PORT",
        PORT,
        "port of the API (default: 52415; 0: a free one, as for the other ports)",
        flag="--api-port",
        metavar="PORT",
    ),
    _option(
        "nats_port",
        "SKULK_NATS_PORT",
        PORT,
        "port of the node's own nats-server, loopback only (default: 52414)",
        flag="--nats-port",
        metavar="PORT",
    ),
    _option(
        "route_port",
        "SKULK_ROUTE_PORT",
        PORT,
        "port by which nats-servers of other nodes join (default: 52416)",
        flag="--route-port",
        metavar="PORT",
    ),
    _option(
        "files_port",
        "SKULK_FILES_PORT",
        PORT,
        "port that serves weights to neighbours (default: 52417; off with --local)",
        flag="--files-port",
        metavar="PORT",
    ),
    _option(
        "bootstrap_peers",
        "SKULK_BOOTSTRAP_PEERS",
        PEERS,
        "routes of nodes to dial, host[:port] separated by commas",
        flag="--bootstrap-peers",
        metavar="LIST",
    ),
    _option(
        "route_advertise",
        "SKULK_ROUTE_ADVERTISE",
        HOST_PORT,
        "host[:port] by which others reach this node's routes, behind NAT or in a container (default: its addresses)",
    ),
    _option(
        "mdns",
        "SKULK_NO_MDNS",
        NEGATED,
        "don't look for other nodes on the local network",
        flag="--no-mdns",
        flag_value="1",
    ),
    _option("local", "SKULK_LOCAL", SWITCH, "everything on loopback, no discovery", flag="--local", flag_value="1"),
    _option("api", "SKULK_NO_API", NEGATED, "no API on this node", flag="--no-api", flag_value="1"),
    _option(
        "participation",
        "SKULK_NODE_PARTICIPATION",
        choice("full", "management"),
        "serve no models on this node",
        flag="--no-worker",
        flag_value="management",
    ),
    _option("offline", "SKULK_OFFLINE", SWITCH, "never reach out to the internet", flag="--offline", flag_value="1"),
    _option(
        "log_format",
        "SKULK_LOG_FORMAT",
        choice("text", "json"),
        "form of the log on stderr (default: text)",
        flag="--log-format",
        metavar="text|json",
    ),
    _option(
        "log_level",
        "SKULK_LOG_LEVEL",
        choice("debug", "info", "warning", "error"),
        "least level that is logged (default: info)",
    ),
    _option(
        "place",
        "SKULK_PLACE",
        words("model ids, separated by commas"),
        "see to it that the model has at least one instance (repeatable)",
        flag="--place",
        metavar="MODEL",
    ),
    _option(
        "nats_url", "SKULK_NATS_URL", NATS_URLS, "an existing NATS deployment to use; no nats-server is started then"
    ),
    _option(
        "events_stream",
        "SKULK_EVENTS_STREAM",
        SWITCH,
        "keep the events in the stream SKULK_EVENTS of the bus that SKULK_NATS_URL names (needs JetStream)",
    ),
    _option("nats_server", "SKULK_NATS_SERVER", TEXT, "the nats-server binary to run"),
    _option(
        "cluster_token", "SKULK_CLUSTER_TOKEN", TEXT, "secret that nodes and clients of the bus must show", secret=True
    ),
    _option("tls_cert", "SKULK_TLS_CERT", FILE, "certificate of this node, for TLS between nats-servers"),
    _option("tls_key", "SKULK_TLS_KEY", FILE, "its private key"),
    _option("tls_ca", "SKULK_TLS_CA", FILE, "certificate of the authority that signed those of all nodes"),
    _option(
        "api_keys",
        "SKULK_API_KEYS",
        words("keys, separated by commas"),
        "keys of which a client of the API must show one",
        secret=True,
    ),
    _option(
        "allowed_hosts",
        "SKULK_ALLOWED_HOSTS",
        words("host names, separated by commas"),
        "host names by which browsers may reach the API, besides its own",
    ),
    _option("memory_limit_bytes", "SKULK_MEMORY_LIMIT", SIZE, "the most memory that models may take here; 0: no limit"),
    _option("max_body_bytes", "SKULK_MAX_BODY", SIZE, "largest body of a request (default: 64MiB)"),
    _option(
        "load_wait_s",
        "SKULK_LOAD_WAIT_S",
        SECONDS,
        "longest wait of a request for a model that is loading (default: 60)",
    ),
    _option(
        "request_timeout_s", "SKULK_REQUEST_TIMEOUT_S", SECONDS, "deadline of a request that names none (default: 600)"
    ),
    _option(
        "step_timeout_s",
        "SKULK_STEP_TIMEOUT_S",
        SECONDS,
        "after this long in one step a runner counts as hung (default: 120)",
    ),
    _option(
        "idle_ttl_s",
        "SKULK_IDLE_TTL",
        SECONDS,
        "after this long without a request a model placed on demand is unloaded (default: 600)",
    ),
    _option(
        "replace_after_s",
        "SKULK_REPLACE_AFTER",
        SECONDS,
        "after this long the models of a lost node are placed again (default: 15)",
    ),
    _option(
        "auto_place",
        "SKULK_AUTO_PLACE",
        choice("cached", "any", "off"),
        "which models a request may place on demand: what lies on a node, what the hub has too, none (default: cached)",
    ),
    _option(
        "failover",
        "SKULK_FAILOVER",
        SWITCH,
        "whether a stream whose runner is lost goes on at another one (default: yes)",
    ),
    _option(
        "backends",
        "SKULK_LLAMA_CPP_BACKENDS",
        words("a comma list of vulkan, rocm, cuda, cpu and metal", among=COMPUTES),
        "computes that llama.cpp is declared to have here (default: found out)",
    ),
    _option(
        "parallel",
        "SKULK_LLAMA_CPP_PARALLEL",
        integer(1, 256),
        "requests that one instance serves side by side (default: 16)",
    ),
    _option(
        "threads", "SKULK_LLAMA_CPP_THREADS", integer(0, 1024), "threads of llama.cpp (default: 0, the physical cores)"
    ),
    _option("batch", "SKULK_LLAMA_CPP_BATCH", integer(32, 65536), "most tokens of a step (default: 2048)"),
    _option("ubatch", "SKULK_LLAMA_CPP_UBATCH", integer(32, 65536), "most tokens computed at once (default: 512)"),
    _option("kv_type", "SKULK_LLAMA_CPP_KV_TYPE", choice(*KV_TYPES), "number format of the KV cache (default: f16)"),
    _option("gpu_layers", "SKULK_LLAMA_CPP_GPU_LAYERS", GPU_LAYERS, "layers that go to the GPU (default: all)"),
    _option(
        "flash_attention", "SKULK_LLAMA_CPP_FLASH_ATTN", choice("auto", "on", "off"), "flash attention (default: auto)"
    ),
    _option(
        "logits_all",
        "SKULK_LLAMA_CPP_LOGITS_ALL",
        SWITCH,
        "keep every token's logits, for logprobs (default: 0)",
        unserved=_NO_LOGITS,
    ),
    _option(
        "logits_all_n_ctx",
        "SKULK_LLAMA_CPP_LOGITS_ALL_N_CTX",
        integer(256, 10_000_000),
        "most context served with logits kept (default: 8192)",
        unserved=_NO_LOGITS,
    ),
    _option(
        "api_url",
        "SKULK_API",
        HTTP_URL,
        "the cluster to talk to (default: the running node of the home, else http://127.0.0.1:52415)",
        flag="--api",
        metavar="URL",
        audience="client",
    ),
    _option("hf_token", "HF_TOKEN", TEXT, "token for gated repositories of the hub", secret=True),
    _option("hf_endpoint", "HF_ENDPOINT", HTTP_URL, "another address of the hub"),
    _option("hf_home", "HF_HOME", TEXT, "folder of the hub's own cache"),
    _option(
        "models_budget_bytes",
        "SKULK_MODELS_BUDGET",
        SIZE,
        "the most disk that fetched models may take; the least recently used ones go; 0: no limit",
    ),
    _option("foreign_caches", "SKULK_NO_FOREIGN_CACHES", NEGATED, "don't look at the models of Ollama and LM Studio"),
    _option("ollama_models", "SKULK_OLLAMA_MODELS", TEXT, "Ollama's store (default: ~/.ollama/models)"),
)

BY_FIELD: Final = {option.field: option for option in OPTIONS}
BY_ENV: Final = {option.env: option for option in OPTIONS}
BY_KEY: Final = {option.key: option for option in OPTIONS}


def show_value(option: Option, value: object) -> str:
    """A value as its parser reads it back."""
    return option.parser.show(value)


def masked_value(option: Option, value: object) -> str:
    """A value for people: secrets and the passwords of addresses are masked."""
    text = show_value(option, value)
    if option.secret:
        return MASK if text else ""
    return without_credentials(text)


def without_credentials(text: str) -> str:
    """Text whose addresses no longer carry ``user:password@``."""
    return _CREDENTIALS.sub(f"{MASK}@", text)


def secrets_of(settings: Settings) -> tuple[str, ...]:
    """The texts that must appear in no log: tokens, keys with and without their name, passwords in addresses."""
    secrets = {settings.cluster_token, settings.hf_token}
    for entry in settings.api_keys:
        secrets |= {entry, entry.partition(":")[2]}
    for credentials in _CREDENTIALS.findall(settings.nats_url):
        secrets.add(str(credentials).removesuffix("@").partition(":")[2])
    return tuple(sorted(secrets - {""}))
