"""What clients send: JSON bodies and query parameters, read strictly and refused with the place of the fault."""

from __future__ import annotations

import asyncio
import re
from typing import Any, Final, TypeVar, cast

import aiohttp
import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from skulk.errors import RequestError

T = TypeVar("T")

BODY_WAIT_S: Final = 120.0

_PLACE: Final = re.compile(r"(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>.*)`)?", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(?P<name>.+)`")
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(?P<name>.+)`")


async def read_object(request: web.Request) -> dict[str, Any]:
    """The body as a JSON object, whatever its Content-Type says.

    Raises:
        RequestError: ``invalid_request``.
        web.HTTPRequestEntityTooLarge: the body is over the limit.
    """
    if (request.content_length or 0) > request.client_max_size:
        # told at once, not after what is too much was read
        raise web.HTTPRequestEntityTooLarge(max_size=request.client_max_size, actual_size=request.content_length or 0)
    try:
        async with asyncio.timeout(BODY_WAIT_S):
            body = await request.read()
    except TimeoutError as error:
        raise RequestError(
            "invalid_request", f"the body did not arrive within {BODY_WAIT_S:.0f} s; send it faster, or less of it"
        ) from error
    except (aiohttp.ClientPayloadError, HttpProcessingError, web.RequestPayloadError) as error:
        raise RequestError("invalid_request", f"the body can't be read as its headers say: {error}") from error
    return json_object(body)


def json_object(body: bytes) -> dict[str, Any]:
    """Bytes as a JSON object.

    Raises:
        RequestError: ``invalid_request``: malformed, too deeply nested, no object.
    """
    try:
        read: object = msgspec.json.decode(body)
    except RecursionError:
        raise RequestError("invalid_request", "the body is nested too deeply") from None
    except msgspec.ValidationError as error:
        what = _PLACE.fullmatch(str(error))
        raise RequestError(
            "invalid_request", f"the body holds a number out of range: {what and what['what']}"
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError("invalid_request", f"the body is no JSON: {error}") from error
    if not isinstance(read, dict):
        raise RequestError("invalid_request", f"the body must be a JSON object, not {_kind_of(read)}")
    return cast("dict[str, Any]", read)


def read_as(fields: dict[str, Any], kind: type[T]) -> T:
    """Fields as a record; no value is bent into another type.

    Raises:
        RequestError: ``invalid_request``, ``param`` names the field with its path.
    """
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise _fault(str(error)) from error
    except (RecursionError, OverflowError, ValueError) as error:
        raise RequestError("invalid_request", f"the body can't be read: {error}") from error


def _fault(text: str) -> RequestError:
    place = _PLACE.fullmatch(text)
    assert place is not None
    what, path = place["what"], (place["path"] or "").removeprefix(".")
    for pattern, verb in ((_MISSING, "is missing"), (_UNKNOWN, "is not a field of this call")):
        named = pattern.fullmatch(what)
        if named is not None:
            param = f"{path}.{named['name']}" if path else named["name"]
            return RequestError("invalid_request", f"{param} {verb}", param=param)
    plain = what[:1].lower() + what[1:]
    return RequestError("invalid_request", f"{path or 'the body'}: {plain}", param=path or None)


def _kind_of(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "a number"


def whole_number(request: web.Request, name: str, default: int, *, low: int, high: int) -> int:
    """A query parameter as a whole number.

    Raises:
        RequestError: ``invalid_request``.
    """
    text = request.query.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,18}", text, re.ASCII) or not low <= int(text) <= high:
        raise RequestError("invalid_request", f"{name} must be a whole number from {low} to {high}", param=name)
    return int(text)


def flag(request: web.Request, name: str, *, default: bool) -> bool:
    """A query parameter that is 0 or 1.

    Raises:
        RequestError: ``invalid_request``.
    """
    asked = request.query.get(name, "1" if default else "0")
    if asked not in ("0", "1"):
        raise RequestError("invalid_request", f"{name} must be 0 or 1", param=name)
    return asked == "1"


def needed(request: web.Request, name: str) -> str:
    """A query parameter that must be there.

    Raises:
        RequestError: ``invalid_request``.
    """
    text = request.query.get(name, "")
    if not text:
        raise RequestError("invalid_request", f"the query parameter {name} is missing", param=name)
    return text
