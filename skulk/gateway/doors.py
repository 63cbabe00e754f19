"""Who is let in: by Host (against DNS rebinding), by Origin (against cross-site requests), by key.

Host     an IP literal, a name without a dot, *.local | *.lan | *.home.arpa | *.internal, the node's own name,
         or one of SKULK_ALLOWED_HOSTS                                        else 403 forbidden_host
Origin   absent, equal to Host, or one of SKULK_ALLOWED_HOSTS                 else 403 forbidden_origin
key      where SKULK_API_KEYS is set: Authorization: Bearer KEY (or X-Api-Key); all routes but /health and /ready
                                                                              else 401 unauthorized
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

from skulk.errors import RequestError, StartError

OPEN_PATHS: Final = frozenset({"/health", "/ready"})
LOCAL_SUFFIXES: Final = (".local", ".lan", ".home.arpa", ".internal")
KEY_NAME: Final = web.RequestKey("key_name", str)
# Whole: ``[::1]evil.org`` and ``localhost:80@evil.org`` begin like names of ours.
_HOST: Final = re.compile(r"(?:\[(?P<bracketed>[0-9a-f:.%a-z_-]+)\]|(?P<name>[^\s:@/\[\]]+))(?::[0-9]{1,5})?")
_KEYS_LIMIT: Final = 10_000


class Doors:
    """The rules of one gateway.

    Args:
        own_names: of the node: its name and host name.
        allowed_hosts: further names, ``host``, ``host:port`` or a whole origin (``https://chat.example.org``).
        keys: names by the digest of their key; empty: no key is asked for.
    """

    def __init__(self, own_names: Iterable[str], allowed_hosts: Iterable[str], keys: dict[bytes, str]) -> None:
        self._names = frozenset(name.lower().rstrip(".") for name in own_names if name)
        self._allowed = frozenset(name.lower().rstrip("/") for name in allowed_hosts)
        self._keys = keys

    def check_host(self, host: str | None) -> None:
        """Lets a Host header in.

        Raises:
            RequestError: ``forbidden_host``.
        """
        name = _name_of(host or "")
        if _is_local(name) or name in self._names or self._is_allowed(host or "", name):
            return
        raise RequestError(
            "forbidden_host",
            f"requests for the host {(host or '')[:200]!r} are refused; where this name is yours, add it to "
            "SKULK_ALLOWED_HOSTS",
        )

    def check_origin(self, origin: str | None, host: str | None) -> None:
        """Lets an Origin header in.

        Raises:
            RequestError: ``forbidden_origin``.
        """
        if origin is None:
            return
        place = _origin_place(origin)
        if place and host and place == _origin_place(f"{urlsplit(origin).scheme}://{host}"):
            return
        if origin.lower() in self._allowed or self._is_allowed(place, _name_of(place)):
            return
        raise RequestError(
            "forbidden_origin",
            f"a page of {origin[:200]!r} may not call this API; where this origin is yours, add it to "
            "SKULK_ALLOWED_HOSTS",
        )

    def check_key(self, path: str, authorization: str | None, api_key: str | None) -> str | None:
        """Lets a key in; returns its name, None where none is needed.

        Raises:
            RequestError: ``unauthorized``.
        """
        if not self._keys or path in OPEN_PATHS:
            return None
        scheme, _, token = (authorization or "").partition(" ")
        key = token.strip() if scheme.lower() == "bearer" else api_key
        if not key:
            raise RequestError("unauthorized", "this API needs a key: send it as Authorization: Bearer KEY")
        sent = _digest(key)
        for digest, name in self._keys.items():
            if hmac.compare_digest(sent, digest):
                return name
        raise RequestError("unauthorized", "this API key is not one of SKULK_API_KEYS")

    def _is_allowed(self, place: str, name: str) -> bool:
        return bool(name) and (place.lower() in self._allowed or name in self._allowed)


DOORS: Final = web.AppKey("doors", Doors)


@web.middleware
async def doors_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Checks all three before a route's handler runs."""
    doors = request.app[DOORS]
    host = request.headers.get("Host")
    doors.check_host(host)
    doors.check_origin(request.headers.get("Origin"), host)
    name = doors.check_key(request.path, request.headers.get("Authorization"), request.headers.get("X-Api-Key"))
    if name is not None:
        request[KEY_NAME] = name
    return await handler(request)


def read_keys(entries: Iterable[str]) -> dict[bytes, str]:
    """Key names by the digest of their key, from ``name:key`` entries and ``@file`` ones.

    Raises:
        StartError: ``config_invalid``.
    """
    keys: dict[bytes, str] = {}
    for entry in _entries(entries):
        name, colon, key = entry.partition(":")
        if not colon or not name or not key:
            raise StartError(
                "config_invalid",
                f"SKULK_API_KEYS holds an entry{f' {name!r}' if colon else ''} that is not name:key",
            )
        keys[_digest(key)] = name
    if len(keys) > _KEYS_LIMIT:
        raise StartError("config_invalid", f"SKULK_API_KEYS names {len(keys)} keys; the limit is {_KEYS_LIMIT}")
    return keys


def _entries(entries: Iterable[str]) -> Iterable[str]:
    for entry in entries:
        if not entry.startswith("@"):
            yield entry.strip()
            continue
        try:
            lines = Path(entry[1:]).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StartError("config_invalid", f"the file of SKULK_API_KEYS can't be read: {error}") from error
        yield from (line.strip() for line in lines if line.strip() and not line.startswith("#"))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _name_of(host: str) -> str:
    """The name in a Host header, without port, brackets and final dot, in lower case; empty where it is none."""
    parts = _HOST.fullmatch(host.strip().lower())
    return "" if parts is None else (parts["bracketed"] or parts["name"].rstrip("."))


def _is_local(name: str) -> bool:
    if not name:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(LOCAL_SUFFIXES)
    return True


def _origin_place(origin: str) -> str:
    """``host:port`` of an origin, the scheme's own port filled in; empty where it is none (``null``)."""
    try:
        parts = urlsplit(origin.lower())
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    except ValueError:
        return ""
    return f"{parts.hostname}:{port}" if parts.hostname else ""
