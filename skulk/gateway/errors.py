"""One error envelope for everything that HTTP answers with a 4xx or 5xx.

    {"error": {"message": text, "type": family, "param": field or null, "code": a key of subjects/errors.toml}}

    SkulkError            -> its own status and code
    aiohttp's 404/405/413 -> route_not_found, method_not_allowed, body_too_large
    anything else         -> internal, with the traceback in the log and nothing of it in the answer

429 and 503 always carry ``Retry-After``, in whole seconds.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from typing import Final

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler
from msgspec import UNSET, UnsetType

from skulk.errors import RequestError, ServiceError, SkulkError
from skulk.gateway.keys import METRICS, REQUEST_ID, SPEC
from skulk.gateway.waiting import Loading, LoadingError
from skulk.ids import new_id
from skulk.units import format_bytes
from skulk.wire.base import encode

log = logging.getLogger("skulk.gateway")

DEFAULT_RETRY_S: Final = 1.0
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ErrorObject(msgspec.Struct, frozen=True, kw_only=True):
    """The inside of the envelope; ``type`` as the official OpenAI clients know it."""

    message: str
    type: str
    param: str | None
    code: str


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """An error as clients read it, in bodies and inside streams. ``loading``: of a model that isn't ready yet."""

    error: ErrorObject
    loading: Loading | UnsetType = UNSET


def envelope_of(error: SkulkError) -> Envelope:
    """The envelope that tells ``error``."""
    status = error.http_status
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    told = ErrorObject(message=error.detail, type=kind, param=error.param, code=error.code)
    return Envelope(error=told, loading=error.loading if isinstance(error, LoadingError) else UNSET)


def error_response(error: SkulkError) -> web.Response:
    """The whole HTTP answer that tells ``error``."""
    headers: dict[str, str] = {}
    if error.http_status in (429, 503):
        wait_s = DEFAULT_RETRY_S if error.retry_after_s is None else error.retry_after_s
        headers["Retry-After"] = str(max(1, math.ceil(wait_s)))
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(
        body=encode(envelope_of(error)),
        status=error.http_status,
        headers=headers,
        content_type="application/json",
    )


def internal_error(request_id: str) -> ServiceError:
    """What a client is told of a defect of ours: nothing of its inside."""
    return ServiceError("internal", f"an internal error; the log of this node has it under request id {request_id}")


def request_id_of(sent: str | None) -> str:
    """The client's ``X-Request-Id`` where it is short and plain, else a new one."""
    return sent if sent is not None and _REQUEST_ID.fullmatch(sent) else new_id()


@web.middleware
async def error_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The outermost border of HTTP: every failure leaves it as one envelope."""
    request[REQUEST_ID] = request_id_of(request.headers.get("X-Request-Id"))
    metrics = request.app[METRICS]
    with metrics.in_flight():
        try:
            response = await handler(request)
        except asyncio.CancelledError:
            metrics.count_request(request, 499)
            raise
        except SkulkError as error:
            response = error_response(error)
        except web.HTTPException as error:
            response = _of_aiohttp(request, error)
        except Exception:  # the border: a defect of ours must neither end the server nor show its inside
            log.exception("request %s %s %s failed", request[REQUEST_ID], request.method, request.path)
            response = error_response(internal_error(request[REQUEST_ID]))
    metrics.count_request(request, response.status)
    return response


def _of_aiohttp(request: web.Request, error: web.HTTPException) -> web.Response:
    match error:
        case web.HTTPNotFound():
            told = RequestError(
                "route_not_found", f"there is no {request.method} {request.path} here; GET / lists what there is"
            )
        case web.HTTPMethodNotAllowed():
            allowed = ", ".join(sorted(error.allowed_methods))
            told = RequestError(
                "method_not_allowed", f"{request.path} does not take {request.method}; it takes {allowed}"
            )
            response = error_response(told)
            response.headers["Allow"] = allowed
            return response
        case web.HTTPRequestEntityTooLarge():
            told = body_too_large(request.app[SPEC].max_body_bytes)
        case _:
            told = RequestError("invalid_request", f"the request can't be read: {error.reason}")
    return error_response(told)


def body_too_large(limit_bytes: int) -> RequestError:
    """The refusal of a body over the limit."""
    return RequestError(
        "body_too_large",
        f"the body is over the limit of {format_bytes(limit_bytes)}; send less, or start the node with a larger "
        "SKULK_MAX_BODY",
    )


async def name_request(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: every answer, streams too, names its request, and not the versions of what we run on."""
    response.headers["Server"] = "skulk"
    request_id = request.get(REQUEST_ID)
    if request_id is not None:
        response.headers["X-Request-Id"] = request_id
