"""The stream ``SKULK_EVENTS``: on a bus with JetStream, the events of all its clusters outlive every node.

The stream listens to the event subjects; nothing of ours waits for it. Each event carries ``Nats-Msg-Id``, so that one
that is published again is kept once. Where a stream of this name exists its bounds are the operator's, and stay.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from skulk.bus.core import CoreBus
from skulk.bus.subjects import PREFIX
from skulk.errors import ServiceError, UnavailableError
from skulk.units import MIB
from skulk.wire.base import PROTOCOL

STREAM: Final = "SKULK_EVENTS"
SUBJECTS: Final = f"{PREFIX}.*.v{PROTOCOL}.event.>"
MAX_BYTES: Final = 64 * MIB
MAX_AGE_S: Final = 30 * 24 * 3600
DUPLICATES_S: Final = 120
API: Final = "$JS.API.STREAM"
API_S: Final = 5.0
NOT_FOUND: Final = 404
_NS: Final = 1_000_000_000


class _ApiError(msgspec.Struct, frozen=True):
    code: int = 0
    description: str = ""


class _StreamConfig(msgspec.Struct, frozen=True):
    subjects: tuple[str, ...] = ()
    max_bytes: int = -1
    max_age: int = 0


class _Answer(msgspec.Struct, frozen=True):
    """What of JetStream's answers matters here."""

    error: _ApiError | None = None
    config: _StreamConfig | None = None


def stream_config() -> dict[str, Any]:
    """The stream as it is made: on disk, bounded by bytes and age, the oldest events go first."""
    return {
        "name": STREAM,
        "subjects": [SUBJECTS],
        "retention": "limits",
        "storage": "file",
        "discard": "old",
        "max_bytes": MAX_BYTES,
        "max_age": MAX_AGE_S * _NS,
        "duplicate_window": DUPLICATES_S * _NS,
        "num_replicas": 1,
    }


async def ensure_events_stream(bus: CoreBus) -> str:
    """Makes the stream where there is none.

    Returns:
        What is wrong with it, for people; empty: the events are kept.
    """
    try:
        found = await _call(bus, "INFO", b"")
        if found.error is not None and found.error.code == NOT_FOUND:
            found = await _call(bus, "CREATE", msgspec.json.encode(stream_config()))
    except UnavailableError as error:
        no_js = "the bus has no JetStream, or not for this user" if error.code == "unreachable" else error.detail
        return f"the events aren't kept in {STREAM}: {no_js}"
    except ServiceError as error:
        return f"the events aren't kept in {STREAM}: {error.detail}"
    if found.error is not None:
        return f"the events aren't kept in {STREAM}: {found.error.description or found.error.code}"
    return _why_not_ours(found.config or _StreamConfig())


def _why_not_ours(config: _StreamConfig) -> str:
    if SUBJECTS not in config.subjects:
        return f"a stream {STREAM} exists and doesn't listen to {SUBJECTS}: add that subject to it"
    if config.max_bytes <= 0 or config.max_age <= 0:
        return f"the stream {STREAM} has no bound of {'bytes' if config.max_bytes <= 0 else 'age'}: it grows for ever"
    return ""


async def _call(bus: CoreBus, verb: str, body: bytes) -> _Answer:
    answer = await bus.ask(f"{API}.{verb}.{STREAM}", body, API_S)
    try:
        return msgspec.json.decode(answer, type=_Answer)
    except msgspec.DecodeError as error:
        raise ServiceError("internal", f"JetStream's answer isn't readable: {error}") from error
