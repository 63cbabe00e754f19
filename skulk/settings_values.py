"""How values of settings are read, and written so that they read back: one `Parser` a kind.

A value arrives as text (flags, environment), or as text or a list of texts (``skulk.toml``, whose numbers and booleans
are turned into text first), so one parser serves all three sources.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final, TypeAlias

import msgspec

from skulk.ids import is_token

Raw: TypeAlias = str | list[str]

DEFAULT_ROUTE_PORT: Final = 52416
KV_TYPES: Final = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
COMPUTES: Final = ("vulkan", "rocm", "cuda", "cpu", "metal")

_TRUE: Final = ("1", "true", "yes", "on")
_FALSE: Final = ("0", "false", "no", "off")
_UNITS: Final = {
    "": 1,
    "b": 1,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE: Final = re.compile(r"([0-9]{1,19}(?:\.[0-9]{1,9})?)\s*([a-z]*)", re.IGNORECASE)
_MULTIADDRESS: Final = re.compile(r"/(?:ip4|ip6|dns|dns4|dns6)/([^/]+)/tcp/(\d+)(?:/.*)?")
_HOST_PORT: Final = re.compile(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:/\[\]]+))(?::(\d+))?")


class Parser(msgspec.Struct, frozen=True, kw_only=True):
    """How a kind of value is read and written.

    Attributes:
        parse: from raw to the field's value; raises `ValueError` where it isn't one.
        accepts: what is accepted, for the sentence of a refusal.
        show: the inverse of ``parse``; what `parse` reads back to the same value.
        is_switch: a flag of this kind takes no value.
        is_list: a flag of this kind may be repeated.
    """

    parse: Callable[[Raw], object]
    accepts: str
    show: Callable[[object], str] = str
    is_switch: bool = False
    is_list: bool = False


def _scalar(raw: Raw) -> str:
    if isinstance(raw, list):
        raise ValueError("a list where one value is expected")  # noqa: TRY004 - all refusals of a parser are one kind
    return raw.strip()


def _items(raw: Raw) -> list[str]:
    parts = raw if isinstance(raw, list) else raw.split(",")
    return [part.strip() for part in parts if part.strip()]


def _check(condition: object) -> None:
    if not condition:
        raise ValueError("out of range or of the wrong form")


def _boolean(raw: Raw) -> bool:
    text = _scalar(raw).lower()
    _check(text in _TRUE + _FALSE)
    return text in _TRUE


def integer(low: int, high: int) -> Parser:
    """Whole numbers of a range."""

    def parse(raw: Raw) -> int:
        text = _scalar(raw)
        _check(re.fullmatch(r"\d{1,15}", text, re.ASCII))
        value = int(text)
        _check(low <= value <= high)
        return value

    return Parser(parse=parse, accepts=f"a whole number from {low} to {high}")


def _parse_seconds(raw: Raw) -> float:
    text = _scalar(raw).removesuffix("s").rstrip()
    _check(re.fullmatch(r"\d{1,6}(\.\d{1,6})?", text, re.ASCII))
    value = float(text)
    _check(value <= 604_800)
    return value


def parse_size(raw: Raw) -> int:
    """Bytes from ``24GiB``, ``24G`` (both powers of 1,024), ``24GB`` (powers of 1,000) or a bare number of bytes."""
    match = _SIZE.fullmatch(_scalar(raw))
    _check(match is not None and match[2].lower() in _UNITS)
    assert match is not None
    factor = _UNITS[match[2].lower()]
    value = int(float(match[1]) * factor) if "." in match[1] else int(match[1]) * factor
    _check(value < 2**60)
    return value


def _show_size(value: object) -> str:
    assert isinstance(value, int)
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value and value % factor == 0:
            return f"{value // factor}{unit}"
    return str(value)


def _show_items(value: object) -> str:
    assert isinstance(value, tuple)
    return ",".join(str(item) for item in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def choice(*words: str) -> Parser:
    """One of some words."""

    def parse(raw: Raw) -> str:
        text = _scalar(raw).lower()
        _check(text in words)
        return text

    return Parser(parse=parse, accepts=", ".join(words[:-1]) + " or " + words[-1])


def words(accepts: str, *, among: tuple[str, ...] = ()) -> Parser:
    """A list of texts, or of some words."""

    def parse(raw: Raw) -> tuple[str, ...]:
        items = [item.lower() for item in _items(raw)] if among else _items(raw)
        _check(all(item in among for item in items) if among else all(item.isprintable() for item in items))
        return tuple(dict.fromkeys(items))

    return _listing(parse, accepts)


def _parse_text(raw: Raw) -> str:
    text = _scalar(raw)
    _check(text.isprintable())
    return text


def _parse_host(raw: Raw) -> str:
    text = _scalar(raw)
    _check(re.fullmatch(r"[\w.:%-]+", text, re.ASCII))
    return text


def _parse_host_port(raw: Raw) -> str:
    text = _scalar(raw)
    named = _HOST_PORT.fullmatch(text)
    _check(named and (named[3] is None or 0 < int(named[3][:6]) < 65536))
    return text


def _parse_folders(raw: Raw) -> tuple[str, ...]:
    parts = raw if isinstance(raw, list) else re.split(r"[,:]", raw)
    folders = [part.strip() for part in parts if part.strip()]
    _check(all("\0" not in folder for folder in folders))
    return tuple(dict.fromkeys(folders))


def _parse_path(raw: Raw) -> str:
    text = _scalar(raw)
    _check(text and "\0" not in text)
    return text


def _parse_cluster(raw: Raw) -> str:
    text = _scalar(raw)
    _check(is_token(text) and len(text) <= 32)
    return text


def _parse_url(*schemes: str) -> Callable[[Raw], str]:
    pattern = re.compile(rf"(?:{'|'.join(schemes)})://[^\s/?#]+(?:/[^\s?#]*)?", re.IGNORECASE)

    def parse(raw: Raw) -> str:
        text = _scalar(raw)
        if not text:
            return ""
        _check(pattern.fullmatch(text))
        return text.rstrip("/")

    return parse


def _parse_nats_urls(raw: Raw) -> str:
    one = _parse_url("nats", "tls")
    return ",".join(one(item) for item in _items(raw))


def parse_peer(text: str) -> str:
    """A peer's route as ``host:port``, from ``host[:port]``, ``[v6]:port`` or ``/ip4/A/tcp/P``; 52416 when omitted.

    Raises:
        ValueError: it is none of these.
    """
    if text.startswith("/"):
        address = _MULTIADDRESS.fullmatch(text)
        _check(address)
        assert address is not None
        host, port = address[1], address[2]
    else:
        named = _HOST_PORT.fullmatch(text)
        _check(named)
        assert named is not None
        host, port = named[1] or named[2], named[3] or str(DEFAULT_ROUTE_PORT)
    _check(len(port) <= 5 and 0 < int(port) < 65536)
    return f"[{host}]:{int(port)}" if ":" in host else f"{host}:{int(port)}"


def _parse_peers(raw: Raw) -> tuple[str, ...]:
    return tuple(dict.fromkeys(parse_peer(item) for item in _items(raw)))


def _parse_layers(raw: Raw) -> int:
    text = _scalar(raw).lower()
    return -1 if text in ("all", "-1") else int(_LAYERS.parse(text))  # pyright: ignore[reportArgumentType]


def _show_boolean(value: object) -> str:
    return "1" if value else "0"


def _listing(parse: Callable[[Raw], object], accepts: str) -> Parser:
    return Parser(parse=parse, accepts=accepts, show=_show_items, is_list=True)


def _negate(raw: Raw) -> bool:
    return not _boolean(raw)


def _show_negated(value: object) -> str:
    return _show_boolean(not value)


def _show_seconds(value: object) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _show_layers(value: object) -> str:
    return "all" if value == -1 else str(value)


_LAYERS: Final = integer(0, 10_000)
GPU_LAYERS: Final = Parser(parse=_parse_layers, accepts="all, or a whole number from 0 to 10000", show=_show_layers)
PORT: Final = msgspec.structs.replace(integer(0, 65535), accepts="a port from 1 to 65535, or 0 for a free one")
SECONDS: Final = Parser(parse=_parse_seconds, accepts="seconds from 0 to 604800", show=_show_seconds)
SWITCH: Final = Parser(parse=_boolean, accepts="1 or 0, true or false, yes or no", show=_show_boolean, is_switch=True)
NEGATED: Final = Parser(parse=_negate, accepts=SWITCH.accepts, show=_show_negated, is_switch=True)
SIZE: Final = Parser(parse=parse_size, accepts="a size such as 24GiB, 512MiB or 1073741824", show=_show_size)
TEXT: Final = Parser(parse=_parse_text, accepts="one line of text")
HOST: Final = Parser(parse=_parse_host, accepts="a host name or an address of this machine, without a port")
HOST_PORT: Final = Parser(
    parse=_parse_host_port, accepts="a host name or an address that others can reach, with or without :port"
)
FOLDER: Final = Parser(parse=_parse_path, accepts="a path")
FILE: Final = FOLDER
FOLDERS: Final = _listing(_parse_folders, "folders, separated by commas or colons")
CLUSTER: Final = Parser(parse=_parse_cluster, accepts="1 to 32 of the characters a-z 0-9 _ -")
PEERS: Final = _listing(_parse_peers, "a comma list of host, host:port or /ip4/ADDRESS/tcp/PORT")
HTTP_URL: Final = Parser(parse=_parse_url("http", "https"), accepts="an http:// or https:// address")
NATS_URLS: Final = Parser(
    parse=_parse_nats_urls, accepts="nats://host:port or tls://host:port, or a comma list of these"
)
