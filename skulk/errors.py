"""Every way Skulk refuses or fails, by code.

    SkulkError                 code, text with the numbers, what to do
     ├── RequestError          the caller can mend it                 (400, 401, 403, 404, 405, 413, 415)
     ├── UnavailableError      the same call may succeed later        (429, 503)
     ├── ServiceError          our side failed while serving a call   (500, 502, 504)
     └── StartError            this process can't start or go on      (exit status 1, 2 or 75)

The codes stand here and in ``subjects/errors.toml``; a contract test proves the two equal. A code is API and
is never renamed; the text is not API. A broken invariant is an assertion, not one of these.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias, cast

import msgspec

Family: TypeAlias = Literal["request", "unavailable", "service", "start"]


class ErrorCode(msgspec.Struct, frozen=True, kw_only=True):
    """What a code means to machines.

    Attributes:
        number: value of the ``Nats-Service-Error-Code`` header; never reused.
        http_status: status of an HTTP answer that carries it.
        retryable: the same call, unchanged, may succeed later.
        family: which subclass of `SkulkError` carries it.
        exit_status: status of a process that ends with it.
    """

    number: int
    http_status: int
    retryable: bool
    family: Family
    exit_status: int = 1


def _request(number: int, http_status: int) -> ErrorCode:
    return ErrorCode(number=number, http_status=http_status, retryable=False, family="request")


def _unavailable(number: int, http_status: int = 503) -> ErrorCode:
    return ErrorCode(number=number, http_status=http_status, retryable=True, family="unavailable")


def _service(number: int, http_status: int, *, retryable: bool = True) -> ErrorCode:
    return ErrorCode(number=number, http_status=http_status, retryable=retryable, family="service")


def _start(number: int, exit_status: int) -> ErrorCode:
    return ErrorCode(number=number, http_status=500, retryable=False, family="start", exit_status=exit_status)


ERRORS: Final[dict[str, ErrorCode]] = {
    "invalid_request": _request(40001, 400),
    "unsupported_field": _request(40002, 400),
    "context_length_exceeded": _request(40003, 400),
    "unplaceable": _request(40004, 400),
    "model_file_invalid": _request(40005, 400),
    "template_failed": _request(40006, 400),
    "message_too_large": _request(40007, 413),
    "request_crashed_runner": _request(40008, 400),
    "model_in_use": _request(40009, 400),
    "download_cancelled": _request(40010, 400),
    "sharding_unsupported": _request(40011, 400),
    "request_cancelled": _request(40020, 400),
    "unauthorized": _request(40101, 401),
    "model_gated": _request(40303, 403),
    "forbidden_host": _request(40301, 403),
    "forbidden_origin": _request(40302, 403),
    "model_not_found": _request(40401, 404),
    "model_not_placed": _request(40402, 404),
    "instance_not_found": _request(40403, 404),
    "command_not_found": _request(40404, 404),
    "route_not_found": _request(40405, 404),
    "node_not_found": _request(40406, 404),
    "model_renamed": _request(40407, 404),
    "revision_not_found": _request(40408, 404),
    "quantization_not_found": _request(40409, 404),
    "download_not_found": _request(40410, 404),
    "method_not_allowed": _request(40501, 405),
    "body_too_large": _request(41301, 413),
    "overloaded": _unavailable(42901, 429),
    "no_master": _unavailable(50301),
    "not_master": _unavailable(50302),
    "facts_pending": _unavailable(50303),
    "instance_not_ready": _unavailable(50304),
    "draining": _unavailable(50305),
    "unreachable": _unavailable(50306),
    "bus_disconnected": _unavailable(50307),
    "refused_by_node": _unavailable(50308),
    "hub_rate_limited": _unavailable(50309),
    "hub_unreachable": _unavailable(50310),
    "master_unreachable": _unavailable(50311),
    "internal": _service(50001, 500, retryable=False),
    "disk_full": _service(50002, 500, retryable=False),
    "runner_failed": _service(50201, 502),
    "stream_lost": _service(50202, 502),
    "invalid_message": _service(50203, 502, retryable=False),
    "hub_failed": _service(50204, 502),
    "download_failed": _service(50205, 502),
    "backend_faulty": _service(50206, 502, retryable=False),
    "deadline_exceeded": _service(50401, 504),
    "config_invalid": _start(60001, 2),
    "port_in_use": _start(60002, 75),
    "home_in_use": _start(60003, 75),
    "nats_server_missing": _start(60004, 1),
    "nats_server_too_old": _start(60005, 1),
    "engine_missing": _start(60006, 1),
    "home_not_writable": _start(60007, 1),
    "child_failed": _start(60008, 1),
    "cluster_not_reached": _start(60009, 1),
    "bus_unusable": _start(60010, 1),
    "node_id_in_use": _start(60011, 75),
}


class SkulkError(Exception):
    """A refusal or a failure with a code.

    Args:
        code: a key of `ERRORS`.
        detail: one or two clear sentences with the numbers that matter and what to do about it.
        param: the request field at fault, where there is one.
        retry_after_s: seconds after which a retry makes sense, where known.
    """

    family: Family

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        assert ERRORS[code].family == self.family, f"{code} belongs to the family {ERRORS[code].family}"
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def number(self) -> int:
        return ERRORS[self.code].number

    @property
    def http_status(self) -> int:
        return ERRORS[self.code].http_status

    @property
    def retryable(self) -> bool:
        return ERRORS[self.code].retryable

    @property
    def exit_status(self) -> int:
        return ERRORS[self.code].exit_status


class RequestError(SkulkError):
    """The caller can mend the request."""

    family: Family = "request"


class UnavailableError(SkulkError):
    """The same call may succeed later."""

    family: Family = "unavailable"


class ServiceError(SkulkError):
    """Our side failed while it served a call."""

    family: Family = "service"


class StartError(SkulkError):
    """This process can't start or can't go on."""

    family: Family = "start"


_FAMILIES: Final[dict[Family, type[SkulkError]]] = {
    "request": RequestError,
    "unavailable": UnavailableError,
    "service": ServiceError,
    "start": StartError,
}


def error_of(
    code: str,
    detail: str,
    *,
    param: str | None = None,
    retry_after_s: float | None = None,
) -> SkulkError:
    """The exception for a code that came over the wire.

    A code that this version doesn't know (a newer peer's) becomes ``internal`` and keeps its name in the text.
    """
    if code not in ERRORS:
        return ServiceError("internal", f"{detail} ({code})", param=param, retry_after_s=retry_after_s)
    kind = _FAMILIES[ERRORS[code].family]
    return kind(code, detail, param=param, retry_after_s=retry_after_s)


def first_of(error: BaseException) -> BaseException:
    """The first of a group of exceptions, of a group inside it, …; one that is no group is itself."""
    while isinstance(error, BaseExceptionGroup):
        error = cast("BaseExceptionGroup[BaseException]", error).exceptions[0]
    return error
