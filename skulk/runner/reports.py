"""What crosses between the event loop and the engine thread: commands one way, reports the other. Plain data."""

from __future__ import annotations

import msgspec

from skulk.batching.admission import BatchShape
from skulk.batching.requests import BatchRequest, Output, RequestKey
from skulk.engines.protocol import Engine
from skulk.errors import SkulkError
from skulk.wire.base import ErrorBody
from skulk.wire.generation import FinishReason


class Add(msgspec.Struct, frozen=True):
    """Compute this request; there is room for it."""

    request: BatchRequest


class EndRequest(msgspec.Struct, frozen=True):
    """End a request from outside, before the next step."""

    key: RequestKey
    reason: FinishReason
    error: ErrorBody | None = None


class SetThreads(msgspec.Struct, frozen=True):
    """Compute with so many threads from the next step on."""

    count: int


class EmbedBatch(msgspec.Struct, frozen=True):
    """Compute the vectors of these inputs in one call, before the next step."""

    id: int
    inputs: tuple[tuple[int, ...], ...]


Command = Add | EndRequest | SetThreads | EmbedBatch


class Loading(msgspec.Struct, frozen=True):
    """The load went on: 0.0 to 1.0; at 1.0 the engine warms up."""

    progress: float


class Loaded(msgspec.Struct, frozen=True):
    """The engine is ready."""

    engine: Engine
    shape: BatchShape


class Refused(msgspec.Struct, frozen=True):
    """There is no engine; the thread has ended."""

    error: SkulkError


class Stepped(msgspec.Struct, frozen=True):
    """A turn of the loop: the engine is alive, and this is what came of it.

    ``held``: digests of the prompts whose beginnings are there, where that has changed; None: as before.
    """

    outputs: tuple[Output, ...]
    held: tuple[int, ...] | None = None


class Vectors(msgspec.Struct, frozen=True):
    """What came of an `EmbedBatch`."""

    id: int
    vectors: tuple[tuple[float, ...], ...]


class Failed(msgspec.Struct, frozen=True):
    """The engine can't go on; the thread has ended, and with it every request that was added.

    ``outputs``: their ends. One report, so that nobody is taken in between the ends and the failure.
    """

    error: SkulkError
    outputs: tuple[Output, ...] = ()


class Stopped(msgspec.Struct, frozen=True):
    """The thread has ended because it was asked to; the engine is closed."""


Report = Loading | Loaded | Refused | Stepped | Vectors | Failed | Stopped
