"""Served endpoints, by the service protocol of NATS (its ADR-32), over the plain operations of any bus of ours.

    caller ──request──> one wildcard subscription ──noun──> handler, in a task of its own ──> answer | error answer
    nats micro ls ────> $SRV.PING|INFO|STATS[.name[.id]] ──────────────────────────────────> who we are

Why it isn't nats-py's ``nats.micro``: ADR ``subjects/decisions/0003-services-over-our-bus.md``.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Protocol

import msgspec

from skulk import __version__
from skulk.bus.parcels import Parcels
from skulk.bus.port import BusCounters, Call, Subscription
from skulk.bus.subjects import Endpoint
from skulk.bus.transport import (
    NO_HEADERS,
    PARCEL,
    REMAINING_MS,
    SERVICE_ERROR,
    SERVICE_ERROR_CODE,
    Raw,
    Receive,
    one_line,
)
from skulk.clock import Clock
from skulk.errors import RequestError, ServiceError, SkulkError, UnavailableError
from skulk.wire.base import ErrorBody, decode, encode
from skulk.wire.services import EndpointInfo, EndpointStats, ServiceInfo, ServicePing, ServiceStats

Handler = Callable[[Call[Any]], Awaitable[Any]]

DISCOVERY: Final = "$SRV"
VERBS: Final = ("PING", "INFO", "STATS")
REFUSALS_AT_ONCE: Final = 1024
ANSWERS_DRAIN_S: Final = 1.0

_SEMVER: Final = re.compile(r"\d+\.\d+\.\d+")
_WHOLE_NUMBER: Final = re.compile(r"-?[0-9]{1,15}")
_NOUN: Final = 4
_logger = logging.getLogger(__name__)


class Host(Protocol):
    """What a service needs of its bus."""

    @property
    def cluster(self) -> str: ...
    @property
    def clock(self) -> Clock: ...
    @property
    def counters(self) -> BusCounters: ...
    @property
    def parcels(self) -> Parcels: ...
    async def send(self, message: Raw) -> None: ...
    async def listen(self, subject: str, receive: Receive, *, queue: str = "") -> Subscription: ...
    async def settle(self) -> None: ...
    def forget_service(self, service: ServedService) -> None: ...


class _Served(msgspec.Struct):
    """One endpoint and what it has done. Times in nanoseconds."""

    endpoint: Endpoint[Any, Any]
    handler: Handler
    subject: str
    requests: int = 0
    errors: int = 0
    last_error: str = ""
    processing_ns: int = 0

    def info(self) -> EndpointInfo:
        return EndpointInfo(name=self.endpoint.name, subject=self.subject, queue_group=self.endpoint.queue_group)

    def stats(self) -> EndpointStats:
        return EndpointStats(
            name=self.endpoint.name,
            subject=self.subject,
            queue_group=self.endpoint.queue_group,
            num_requests=self.requests,
            num_errors=self.errors,
            last_error=self.last_error,
            processing_time=self.processing_ns,
            average_processing_time=self.processing_ns // max(1, self.requests),
        )


def version() -> str:
    """Our version as the protocol wants it: the first three numbers."""
    match = _SEMVER.match(__version__)
    return match.group() if match else "0.0.0"


def error_answer(error: SkulkError, subject: str) -> Raw:
    """The message that carries ``error`` back to a caller, ours or anybody's."""
    headers = {SERVICE_ERROR: one_line(error.detail) or error.code, SERVICE_ERROR_CODE: str(error.number)}
    return Raw(subject, encode(ErrorBody.of(error)), "", headers)


def raise_error_answer(answer: Raw) -> None:
    """Raises what an answer carries, if it is an error answer; foreign services' errors become ``internal``."""
    text = answer.headers.get(SERVICE_ERROR)
    number = answer.headers.get(SERVICE_ERROR_CODE)
    if text is None and number is None:
        return
    try:
        body = decode(answer.body, ErrorBody)
    except ServiceError:
        body = ErrorBody(code="internal", detail=f"{text or 'the service failed'} ({number or 'no number'})")
    raise body.to_error()


def common_of(handlers: Mapping[Endpoint[Any, Any], Handler], service: str) -> Endpoint[Any, Any]:
    """Any of the endpoints, having checked that they are one service: same plane, ids and queue group."""
    assert handlers, "a service without endpoints"
    first = next(iter(handlers))
    for endpoint in handlers:
        assert endpoint.service == service, f"{endpoint.name} belongs to the service {endpoint.service}, not {service}"
        shape = (endpoint.plane, endpoint.ids, endpoint.queue_group)
        assert shape == (first.plane, first.ids, first.queue_group), f"{endpoint.name} and {first.name} differ in shape"
    return first


class ServedService:
    """One running service instance. Its numbers outlive reconnects, for it isn't bound to a connection.

    Args:
        host: the bus.
        service_id: of this instance.
        metadata: shown by INFO beside the cluster and the ids.
        max_calls: how many calls may run at once; more are answered ``overloaded``.
        ids: of every endpoint's subject.
    """

    def __init__(
        self,
        host: Host,
        service: str,
        handlers: Mapping[Endpoint[Any, Any], Handler],
        *,
        service_id: str,
        metadata: Mapping[str, str],
        max_calls: int,
        ids: Mapping[str, str],
    ) -> None:
        self._host = host
        self.name = service
        self._id = service_id
        self._common = common_of(handlers, service)
        self._served = {
            endpoint.noun: _Served(endpoint, handler, endpoint.subject(host.cluster, **ids))
            for endpoint, handler in handlers.items()
        }
        self._metadata = {"cluster": host.cluster, **ids, **metadata}
        self._max_calls = max_calls
        self._started = dt.datetime.fromtimestamp(host.clock.wall(), dt.UTC)
        self._calls: set[asyncio.Task[None]] = set()
        self._answers: set[asyncio.Task[None]] = set()
        self._subscriptions: list[Subscription] = []
        self._gates: dict[str, asyncio.Future[None]] = {}

    @property
    def service_id(self) -> str:
        return self._id

    async def start(self) -> None:
        """Subscribes: calls first, so that what discovery shows can be called."""
        group = self._common.queue_group
        for subject in self._call_subjects():
            self._subscriptions.append(await self._host.listen(subject, self._on_call, queue=group))
        for verb in VERBS:
            for name in ("", f".{self.name}", f".{self.name}.{self._id}"):
                listening = await self._host.listen(f"{DISCOVERY}.{verb}{name}", self._on_discovery)
                self._subscriptions.append(listening)
        await self._host.settle()

    async def close(self, drain_s: float = 5.0) -> None:
        """Takes no more calls, lets running ones finish for ``drain_s`` seconds, then cancels them."""
        for subscription in self._subscriptions:
            await subscription.close()
        self._subscriptions.clear()
        await _settle(self._calls, drain_s)
        await _settle(self._answers, min(drain_s, ANSWERS_DRAIN_S))
        self._host.forget_service(self)

    def _call_subjects(self) -> list[str]:
        """One wildcard over the nouns; without ids each endpoint's own subject, for there ``*`` would catch more."""
        if not self._common.ids:
            return [served.subject for served in self._served.values()]
        tokens = next(iter(self._served.values())).subject.split(".")
        tokens[_NOUN] = "*"
        return [".".join(tokens)]

    # Discovery

    def ping(self) -> ServicePing:
        return ServicePing(name=self.name, id=self._id, version=version(), metadata=self._metadata)

    def info(self) -> ServiceInfo:
        return ServiceInfo(
            name=self.name,
            id=self._id,
            version=version(),
            description=f"Skulk's {self.name} endpoints",
            metadata=self._metadata,
            endpoints=tuple(served.info() for served in self._served.values()),
        )

    def stats(self) -> ServiceStats:
        return ServiceStats(
            name=self.name,
            id=self._id,
            version=version(),
            metadata=self._metadata,
            started=self._started.isoformat(timespec="microseconds").replace("+00:00", "Z"),
            endpoints=tuple(served.stats() for served in self._served.values()),
        )

    def _on_discovery(self, message: Raw) -> None:
        facts = {"PING": self.ping, "INFO": self.info, "STATS": self.stats}[message.subject.split(".")[1]]
        self._answer_later(Raw(message.reply, encode(facts())))

    # Calls

    def _on_call(self, message: Raw) -> None:
        now = self._host.clock.now()
        remaining_s = _remaining_s(message.headers)
        if remaining_s is not None and remaining_s <= 0:
            self._host.counters.refused_late += 1
            return
        noun = message.subject.split(".")[_NOUN]
        served = self._served.get(noun)
        if served is None:
            known = ", ".join(sorted(self._served))
            error = RequestError("route_not_found", f"the service {self.name} has no {noun!r}; it has {known}")
            self._answer_later(error_answer(error, message.reply))
            return
        served.requests += 1
        if len(self._calls) >= self._max_calls:
            text = f"{self.name} is busy with {len(self._calls)} calls: try again in a second"
            self._fail(served, message, UnavailableError("overloaded", text, retry_after_s=1.0))
            return
        deadline = None if remaining_s is None else now + remaining_s
        self._start(served, message, deadline)

    def _start(self, served: _Served, message: Raw, deadline: float | None) -> None:
        """Starts the call's task behind those of the same caller whose bodies are still being fetched.

        Without this, a small message (a cancel) would overtake a large one (its request).
        """
        caller = message.reply.rpartition(".")[0]
        before = self._gates.get(caller)
        gate: asyncio.Future[None] | None = None
        if before is not None or PARCEL in message.headers:
            gate = self._gates[caller] = asyncio.get_running_loop().create_future()
        call = self._call(served, message, deadline, before, gate)
        task = asyncio.create_task(call, name=f"{self.name}.{served.endpoint.noun}")
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        if gate is not None:
            task.add_done_callback(lambda _: self._open_gate(caller, gate))

    def _open_gate(self, caller: str, gate: asyncio.Future[None]) -> None:
        if not gate.done():
            gate.set_result(None)
        if self._gates.get(caller) is gate:
            del self._gates[caller]

    async def _call(
        self,
        served: _Served,
        message: Raw,
        deadline: float | None,
        before: asyncio.Future[None] | None,
        gate: asyncio.Future[None] | None,
    ) -> None:
        host = self._host
        started = time.perf_counter_ns()
        try:
            body = await host.parcels.unpack(message, deadline=deadline)
            if before is not None:
                await asyncio.shield(before)
            if deadline is not None and host.clock.now() >= deadline:
                host.counters.refused_late += 1
                return
            call = self._parse(served, message, body, deadline)
            if gate is not None:
                self._open_gate(message.reply.rpartition(".")[0], gate)
            host.counters.served += 1
            result = await served.handler(call)
            served.processing_ns += time.perf_counter_ns() - started
            await self._answer(served, message, result)
        except SkulkError as error:
            self._fail(served, message, error)
        except Exception as error:  # the border: a defect in a handler ends this call, not the service
            _logger.exception("the handler of %s.%s failed", self.name, served.endpoint.noun)
            text = f"{self.name}.{served.endpoint.noun} failed ({type(error).__name__}): the node's log has the details"
            self._fail(served, message, ServiceError("internal", text))

    def _parse(self, served: _Served, message: Raw, body: bytes, deadline: float | None) -> Call[Any]:
        ids = served.endpoint.parse(message.subject)
        assert ids is not None, f"{message.subject} came in for {served.subject}"
        try:
            request = decode(body or b"{}", served.endpoint.request)
        except ServiceError as error:
            raise RequestError("invalid_request", error.detail) from error
        return Call(message=request, ids=ids, deadline=deadline)

    async def _answer(self, served: _Served, message: Raw, result: Any) -> None:
        if not message.reply:
            return
        body: bytes = result if served.endpoint.reply is bytes else encode(result)
        packed = await self._host.parcels.pack(body, once=True)
        try:
            await self._host.send(Raw(message.reply, packed.body, "", packed.headers or NO_HEADERS))
        except UnavailableError:
            self._host.parcels.release(packed.parcel_id)
            self._host.counters.unsent_answers += 1

    def _fail(self, served: _Served, message: Raw, error: SkulkError) -> None:
        served.errors += 1
        served.last_error = f"{error.number}:{one_line(error.detail)}"
        self._answer_later(error_answer(error, message.reply))

    def _answer_later(self, answer: Raw) -> None:
        if not answer.subject:
            return
        if len(self._answers) >= REFUSALS_AT_ONCE:
            self._host.counters.unsent_answers += 1
            return
        task = asyncio.create_task(self._send_answer(answer), name=f"{self.name} answers")
        self._answers.add(task)
        task.add_done_callback(self._answers.discard)

    async def _send_answer(self, answer: Raw) -> None:
        try:
            await self._host.send(answer)
        except SkulkError:
            self._host.counters.unsent_answers += 1


async def _settle(tasks: set[asyncio.Task[None]], drain_s: float) -> None:
    """Lets tasks finish for ``drain_s`` seconds, then cancels those that haven't."""
    if tasks and drain_s > 0:
        await asyncio.wait(tuple(tasks), timeout=drain_s)
    for task in tuple(tasks):
        task.cancel()
    if tasks:
        await asyncio.wait(tuple(tasks))


def _remaining_s(headers: Mapping[str, str]) -> float | None:
    """What the caller says it still waits, in seconds; None where it says nothing readable."""
    text = headers.get(REMAINING_MS, "")
    return int(text) / 1000 if _WHOLE_NUMBER.fullmatch(text) else None
