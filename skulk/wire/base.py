"""What every message shares, and its form on the bus: JSON, so that a person can read it."""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec

from skulk.errors import ERRORS, ServiceError, SkulkError, error_of

T = TypeVar("T")

PROTOCOL: Final = 1
"""Major version of the bus contract: a node that speaks another one takes no placements and harms nobody."""

_ENCODER = msgspec.json.Encoder()
_DECODERS: dict[Any, msgspec.json.Decoder[Any]] = {}
_OPEN: set[Any] = set()


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """A record of the bus. A new field has a default, a type never changes, unknown fields are ignored."""


def _opened(message: Any, body: bytes) -> Any:
    """Only for what another version wrote: what this one wrote comes out as it went in."""
    return message.opened(msgspec.json.decode(body))


class ErrorBody(Wire, frozen=True, kw_only=True):
    """An error as it crosses the bus: the body beside the ``Nats-Service-Error`` headers, and inside streams.

    Attributes:
        code: a key of ``subjects/errors.toml``.
        detail: what happened, with numbers, and what to do.
        retryable: the same call, unchanged, may succeed later.
        param: the request field at fault, where there is one.
        retry_after_s: seconds after which a retry makes sense, where known.
    """

    code: str
    detail: str
    retryable: bool = False
    param: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of(cls, error: SkulkError) -> ErrorBody:
        """The body that carries ``error``."""
        return cls(
            code=error.code,
            detail=error.detail,
            retryable=ERRORS[error.code].retryable,
            param=error.param,
            retry_after_s=error.retry_after_s,
        )

    def to_error(self) -> SkulkError:
        """The exception that this body carries."""
        return error_of(self.code, self.detail, param=self.param, retry_after_s=self.retry_after_s)


def encode(message: Any) -> bytes:
    """A message as JSON."""
    return _ENCODER.encode(message)


def decode(body: bytes, kind: type[T]) -> T:
    """A message from JSON; decoders are kept per type. One that has a method ``opened`` keeps
    what this version doesn't know.

    Raises:
        ServiceError: ``invalid_message``: the bytes are no JSON or not of this shape.
    """
    decoder = _DECODERS.get(kind)
    if decoder is None:
        decoder = _DECODERS[kind] = msgspec.json.Decoder(kind)
        if hasattr(kind, "opened"):
            _OPEN.add(kind)
    try:
        message: T = decoder.decode(body)
        if kind in _OPEN and _ENCODER.encode(message) != body:
            return _opened(message, body)
        return message
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ServiceError("invalid_message", f"not a {getattr(kind, '__name__', kind)}: {error}") from error
    except RecursionError:
        raise ServiceError("invalid_message", f"not a {getattr(kind, '__name__', kind)}: nested too deeply") from None
