"""The typed bus over any transport: ids and JSON, questions and answers, services, parcels.

    publish    message -> JSON -> size check -> transport
    request    the same with an inbox of our own; answers are told apart by the last token of their subject
    flush      a message to our own inbox: when it is back, the server has had everything before it

`NatsBus` and `MemoryBus` are this, with a transport each.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

from skulk.bus.parcels import PARCELS_LIMIT_BYTES, Packed, Parcels
from skulk.bus.port import BusCounters, BusState, Call, Received, Service, Subscription
from skulk.bus.services import ServedService, raise_error_answer
from skulk.bus.subjects import Channel, Endpoint, Template
from skulk.bus.transport import (
    MESSAGE_ID,
    NO_HEADERS,
    NO_RESPONDERS,
    REMAINING_MS,
    STATUS,
    Raw,
    Receive,
    Transport,
    check_size,
    disconnected,
)
from skulk.clock import Clock
from skulk.errors import RequestError, ServiceError, UnavailableError
from skulk.ids import is_token
from skulk.wire.base import decode, encode

M = TypeVar("M")
Q = TypeVar("Q")
R = TypeVar("R")

WAITING_LIMIT: Final = 16_384
SUBJECTS_KEPT: Final = 4_096
SETTLE_S: Final = 2.0

_logger = logging.getLogger(__name__)


class CoreBus:
    """See `skulk.bus.port.Bus`, whose docstrings hold here.

    Args:
        transport: what moves the bytes.
        cluster: second token of every subject.
        new_id: random tokens; a seeded one makes runs repeatable.
        parcels_limit_bytes: the most that large bodies may take, kept and being fetched each.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        cluster: str,
        name: str,
        clock: Clock,
        counters: BusCounters,
        new_id: Callable[[], str],
        parcels_limit_bytes: int = PARCELS_LIMIT_BYTES,
    ) -> None:
        assert is_token(cluster), f"cluster {cluster!r} is no subject token"
        self.name = name
        self._cluster = cluster
        self._transport = transport
        self._clock = clock
        self._counters = counters
        self._new_id = new_id
        self._parcels = Parcels(self, owner=new_id(), clock=clock, new_id=new_id, limit_bytes=parcels_limit_bytes)
        self._services: set[ServedService] = set()
        self._inbox = f"_INBOX.{new_id()}"
        self._listening: asyncio.Task[Subscription] | None = None
        self._waiting: dict[str, asyncio.Future[Raw | None]] = {}
        self._asked = 0
        self._packing: dict[tuple[str, ...], asyncio.Future[None]] = {}
        self._subjects: dict[tuple[str, ...], str] = {}
        self._end_watch = transport.on_state(self._state_changed)

    @property
    def cluster(self) -> str:
        return self._cluster

    @property
    def state(self) -> BusState:
        return self._transport.state

    @property
    def heard_at(self) -> float:
        return self._transport.heard_at

    @property
    def max_payload(self) -> int:
        return self._transport.max_payload

    @property
    def transport(self) -> Transport:
        return self._transport

    @property
    def counters(self) -> BusCounters:
        return self._counters

    @property
    def clock(self) -> Clock:
        return self._clock

    @property
    def parcels(self) -> Parcels:
        return self._parcels

    def on_state(self, callback: Callable[[BusState], None]) -> Callable[[], None]:
        return self._transport.on_state(callback)

    # The plain operations

    async def send(self, message: Raw) -> None:
        """Sends one raw message, having checked its size with headers."""
        if self._transport.state != "connected":
            raise disconnected(self._transport.state)
        check_size(message, self._transport.max_payload)
        await self._transport.publish(message)

    async def listen(self, subject: str, receive: Receive, *, queue: str = "") -> Subscription:
        """Subscribes; `settle` tells when the server knows of it."""
        return await self._transport.subscribe(subject, receive, queue=queue)

    async def ask(self, subject: str, body: bytes, timeout_s: float) -> bytes:
        """Asks on a subject that isn't ours, such as JetStream's API.

        Raises:
            UnavailableError: ``bus_disconnected``; ``unreachable``: nobody listens there.
            ServiceError: ``deadline_exceeded``.
        """
        return (await self._ask(subject, body, {}, self._clock.now() + timeout_s)).body

    async def settle(self) -> None:
        """Returns when the server knows of all subscriptions; at once if it can't be asked: they are replayed."""
        try:
            await self.flush(SETTLE_S)
        except (UnavailableError, ServiceError):
            _logger.debug("subscribed without a connection")

    # Bus

    async def publish(self, channel: Channel[M], message: M, **ids: str) -> None:
        headers = NO_HEADERS if channel.message_id is None else {MESSAGE_ID: channel.message_id(message)}
        await self.send(Raw(self._subject(channel, ids), encode(message), headers=headers))
        self._counters.published += 1

    async def subscribe(
        self,
        channel: Channel[M],
        handler: Callable[[Received[M]], None],
        **ids: str,
    ) -> Subscription:
        for name, value in ids.items():
            if not is_token(value):
                raise RequestError("invalid_request", f"{name} {value!r} can't stand in a subject", param=name)
        counters = self._counters

        def receive(raw: Raw) -> None:
            counters.received += 1
            found = channel.parse(raw.subject)
            if found is None:
                counters.undecodable += 1
                _logger.debug("a message on %s: that is no subject of %s", raw.subject, channel.text)
                return
            try:
                message = decode(raw.body, channel.payload)
            except ServiceError as error:
                counters.undecodable += 1
                _logger.debug("a message on %s is not readable: %s", raw.subject, error)
                return
            try:
                handler(Received(message=message, subject=raw.subject, ids=found))
            except Exception:  # the border: a defect in a handler loses this message, not the subscription
                counters.handler_errors += 1
                _logger.exception("the handler of %s failed", channel.text)

        subscription = await self.listen(channel.pattern(self._cluster, **ids), receive)
        await self.settle()
        return subscription

    async def request(self, endpoint: Endpoint[Q, R], message: Q, *, timeout_s: float, **ids: str) -> R:
        subject = endpoint.subject(self._cluster, **ids)
        deadline = self._clock.now() + timeout_s
        self._counters.requests += 1
        packed = await self._pack_in_order(encode(message), (endpoint.plane, *ids.values()))
        try:
            answer = await self._ask(subject, packed.body, packed.headers, deadline)
            raise_error_answer(answer)
            body = await self._parcels.unpack(answer, deadline=deadline)
        finally:
            self._parcels.release(packed.parcel_id)
        return body if endpoint.reply is bytes else decode(body, endpoint.reply)  # pyright: ignore[reportReturnType]

    async def serve(
        self,
        service: str,
        handlers: Mapping[Endpoint[Any, Any], Callable[[Call[Any]], Awaitable[Any]]],
        *,
        metadata: Mapping[str, str] | None = None,
        max_calls: int = 256,
        **ids: str,
    ) -> Service:
        served = ServedService(
            self,
            service,
            handlers,
            service_id=self._new_id(),
            metadata={"client": self.name, **(metadata or {})},
            max_calls=max_calls,
            ids=ids,
        )
        self._services.add(served)
        await served.start()
        return served

    def forget_service(self, service: ServedService) -> None:
        """Called by a service that has closed."""
        self._services.discard(service)

    async def flush(self, timeout_s: float = 2.0) -> None:
        await self._ask("", b"", {}, self._clock.now() + timeout_s)

    async def close(self) -> None:
        for service in tuple(self._services):
            await service.close(0.0)
        await self._parcels.close()
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait({self._listening})
        await self._transport.close()
        self._end_watch()

    # Questions and answers

    def _subject(self, template: Template, ids: dict[str, str]) -> str:
        """The subject, checked and formatted once for ids that come again and again (a stream's chunks)."""
        key = (template.text, *(ids.get(name, "") for name in template.ids))
        subject = self._subjects.get(key)
        if subject is None:
            subject = template.subject(self._cluster, **ids)
            if len(self._subjects) >= SUBJECTS_KEPT:
                self._subjects.clear()
            self._subjects[key] = subject
        return subject

    async def _pack_in_order(self, body: bytes, receiver: tuple[str, ...]) -> Packed:
        """Packs a request behind those to the same receiver that are still being packed.

        Without this, a small one (a cancel) would overtake a large one (its request).
        """
        before = self._packing.get(receiver)
        if before is None and len(body) <= self._parcels.inline_limit:
            return Packed(body, {})
        packed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._packing[receiver] = packed
        try:
            await self._listen_for_answers()
            if before is not None:
                await asyncio.shield(before)
            return await self._parcels.pack(body, once=False)
        finally:
            packed.set_result(None)
            if self._packing.get(receiver) is packed:
                del self._packing[receiver]

    async def _ask(self, subject: str, body: bytes, headers: dict[str, str], deadline: float) -> Raw:
        """One question to ``subject``, or, where that is empty, one message to our own inbox."""
        remaining_s = deadline - self._clock.now()
        if remaining_s <= 0:
            raise _late(subject)
        if len(self._waiting) >= WAITING_LIMIT:
            raise UnavailableError("overloaded", f"{WAITING_LIMIT} requests wait for answers: try again in a second")
        self._asked += 1
        token = str(self._asked)
        inbox = f"{self._inbox}.{token}"
        answered: asyncio.Future[Raw | None] = asyncio.get_running_loop().create_future()
        self._waiting[token] = answered
        try:
            async with asyncio.timeout(remaining_s):
                await self._listen_for_answers()
                if subject:
                    remaining_ms = max(1, math.floor((deadline - self._clock.now()) * 1000))
                    await self.send(Raw(subject, body, inbox, {**headers, REMAINING_MS: str(remaining_ms)}))
                else:
                    await self.send(Raw(inbox, body))
                answer = await answered
        except TimeoutError as error:
            raise _late(subject) from error
        finally:
            del self._waiting[token]
        if answer is None:
            raise disconnected("it broke before the answer came")
        if answer.headers.get(STATUS) == NO_RESPONDERS:
            raise UnavailableError("unreachable", f"nobody listens on {subject} now: try again in a moment")
        return answer

    async def _listen_for_answers(self) -> None:
        if self._listening is None:
            listening = self._transport.subscribe(f"{self._inbox}.*", self._on_answer)
            self._listening = asyncio.create_task(_subscribed(listening), name="subscribe to the inbox")
        if not self._listening.done():
            await asyncio.shield(self._listening)

    def _on_answer(self, answer: Raw) -> None:
        waiting = self._waiting.get(answer.subject.rpartition(".")[2])
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def _state_changed(self, state: BusState) -> None:
        if state == "connected":
            return
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_result(None)


async def _subscribed(subscribing: Awaitable[Subscription]) -> Subscription:
    return await subscribing


def _late(subject: str) -> ServiceError:
    what = f"{subject} gave no answer" if subject else "the bus took no message"
    return ServiceError("deadline_exceeded", f"{what} in the time it was given: try again or allow more")
