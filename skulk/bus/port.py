"""What every part of Skulk sees of the bus. `NatsBus` and `MemoryBus` are two forms of it and pass one suite.

    publish     fire and forget; refused while disconnected, never buffered
    subscribe   a callback that may only decode, look and enqueue
    request     one question, one answer or an error, within a given time
    serve       the endpoints of one service; each call runs in a task of its own

Errors of all calls, by code: ``bus_disconnected`` (no connection now, or a request's broke before its answer
came: repeat it under the same id), ``unreachable`` (nobody listens there now),
``deadline_exceeded`` (no answer in time), ``message_too_large`` (with size and limit, before anything is sent),
``invalid_message`` (the other side sent what this version can't read), and whatever the called service answers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Generic, Literal, Protocol, TypeVar

import msgspec

from skulk.bus.subjects import Channel, Endpoint

M = TypeVar("M")
Q = TypeVar("Q")
R = TypeVar("R")

BusState = Literal["connected", "disconnected", "closed"]


class Received(msgspec.Struct, Generic[M], frozen=True, kw_only=True):
    """A message as it came in. ``ids``: of its subject, with ``cluster``."""

    message: M
    subject: str
    ids: Mapping[str, str]


class Call(msgspec.Struct, Generic[Q], frozen=True, kw_only=True):
    """A request as it came in.

    Attributes:
        deadline: `Clock.now()` seconds at which the caller stops waiting; None where it didn't say.
    """

    message: Q
    ids: Mapping[str, str]
    deadline: float | None


class BusCounters(msgspec.Struct, kw_only=True):
    """What went through and what went wrong since the start; for ``/metrics`` and ``/state``.

    Attributes:
        refused_late: calls dropped because their caller no longer waits.
        dropped_slow: messages that a full subscription threw away.
        handler_errors: exceptions of subscribers' handlers.
        unsent_answers: answers that found no connection (or too many others waiting).
        client_errors: errors that the client library reported; ``last_error`` is the last of them.
        replaced_clients: connections given up, those that never stood included.
    """

    published: int = 0
    received: int = 0
    requests: int = 0
    served: int = 0
    refused_late: int = 0
    undecodable: int = 0
    dropped_slow: int = 0
    handler_errors: int = 0
    unsent_answers: int = 0
    client_errors: int = 0
    reconnects: int = 0
    replaced_clients: int = 0
    last_error: str = ""


class Subscription(Protocol):
    """A live subscription; it survives reconnects."""

    async def close(self) -> None: ...


class Service(Protocol):
    """A served group of endpoints; `close` lets running calls finish for ``drain_s`` seconds."""

    @property
    def service_id(self) -> str: ...

    async def close(self, drain_s: float = 5.0) -> None: ...


class Bus(Protocol):
    """A connection to one cluster's bus."""

    @property
    def cluster(self) -> str: ...

    @property
    def state(self) -> BusState: ...

    @property
    def heard_at(self) -> float:
        """`Clock.now()` seconds at which the server gave its last sign of life, at most 0.5 s ago while all is well.

        Silence of others counts up to here and no further: a server that has stopped answering is noticed only after
        2.5 to 3.5 s, and until then every speaker behind it seems silent.
        """
        ...

    @property
    def max_payload(self) -> int:
        """Bytes that one message may have, headers included."""
        ...

    @property
    def counters(self) -> BusCounters: ...

    def on_state(self, callback: Callable[[BusState], None]) -> Callable[[], None]:
        """Calls ``callback`` at each change; returns what ends that."""
        ...

    async def publish(self, channel: Channel[M], message: M, **ids: str) -> None:
        """Sends one message.

        Raises:
            UnavailableError: ``bus_disconnected``.
            RequestError: ``message_too_large``, ``invalid_request`` (an id is no token).
        """
        ...

    async def subscribe(
        self,
        channel: Channel[M],
        handler: Callable[[Received[M]], None],
        **ids: str,
    ) -> Subscription:
        """Calls ``handler`` for each message in order; ids that are not given match all.

        What can't be decoded is counted and dropped.
        """
        ...

    async def request(self, endpoint: Endpoint[Q, R], message: Q, *, timeout_s: float, **ids: str) -> R:
        """Asks and waits for the answer; bodies beyond 512 KiB travel as parcels in both directions.

        Raises:
            SkulkError: see the module; or what the service answered.
        """
        ...

    async def serve(
        self,
        service: str,
        handlers: Mapping[Endpoint[Any, Any], Callable[[Call[Any]], Awaitable[Any]]],
        *,
        metadata: Mapping[str, str] | None = None,
        max_calls: int = 256,
        **ids: str,
    ) -> Service:
        """Serves endpoints as one NATS service instance.

        Each call runs in a task of its own (started in the order of arrival, so what a handler does before its first
        ``await`` happens in that order); a `SkulkError` becomes the error answer, any other exception ``internal`` with
        a traceback in the log. More than ``max_calls`` at once: ``overloaded``. A call that comes after its caller's
        deadline is dropped and counted.
        """
        ...

    async def flush(self, timeout_s: float = 2.0) -> None:
        """Returns when the server has taken everything sent so far."""
        ...

    async def close(self) -> None:
        """Ends every subscription and service, then the connection."""
        ...
