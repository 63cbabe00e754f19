"""The bus inside one process: for tests and simulations what `NatsBus` is for nodes; both pass one suite.

Everything above the transport is the same code; messages are really encoded and decoded. `MemoryHub` is the broker:
it delivers by ``call_soon`` in the order of publishing, so a run with the same seed is the same run. What a network
does to messages is in the test's hands:

    hub.disconnect(bus) / reconnect(bus)      as when a client loses its server
    hub.split({"a", "b"}, {"c"}) / heal()     as when routes are cut: the sides don't know each other's subscriptions
    hub.disturb = f(sender, receiver, raw)    delays in seconds, one per copy: () drops, (0.0, 0.2) duplicates
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import re
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from skulk.bus.core import CoreBus
from skulk.bus.parcels import PARCELS_LIMIT_BYTES
from skulk.bus.port import BusCounters, BusState, Subscription
from skulk.bus.transport import NO_RESPONDERS, STATUS, ConnectionState, Raw, Receive, disconnected
from skulk.clock import Clock, SystemClock
from skulk.units import MIB

MAX_PAYLOAD: Final = 1 * MIB
PENDING_LIMIT: Final = 65_536

Disturb = Callable[[str, str, Raw], Sequence[float]]

_AT_ONCE: Final = (0.0,)
_logger = logging.getLogger(__name__)


def subject_matches(pattern: Sequence[str], tokens: Sequence[str]) -> bool:
    """Whether a subject's tokens fall under a pattern's (``*``: one token, ``>``: one or more at the end)."""
    if pattern[-1] == ">":
        return len(tokens) >= len(pattern) and all(map(_token_matches, pattern[:-1], tokens))
    return len(tokens) == len(pattern) and all(map(_token_matches, pattern, tokens))


def _token_matches(pattern: str, token: str) -> bool:
    return pattern in ("*", token)


class _Listening:
    """One subscription of one transport."""

    def __init__(self, transport: MemoryTransport, subject: str, receive: Receive, queue: str) -> None:
        self.transport = transport
        self.pattern = subject.split(".")
        self.head = re.split(r"[*>]", subject, maxsplit=1)[0]
        self.queue = queue
        self.receive = receive
        self.pending = 0

    async def close(self) -> None:
        self.transport.listening.pop(self, None)


class MemoryTransport:
    """One client of a hub."""

    def __init__(self, hub: MemoryHub, name: str, clock: Clock, counters: BusCounters) -> None:
        self.hub = hub
        self.name = name
        self._clock = clock
        self._broke_at = clock.now()
        self.counters = counters
        self.connection = ConnectionState("connected")
        self.listening: dict[_Listening, None] = {}
        self.life = 0
        self.context = contextvars.copy_context()
        self._arrived: deque[tuple[_Listening, Raw]] = deque()
        self._due = False

    @property
    def state(self) -> BusState:
        return self.connection.now

    @property
    def heard_at(self) -> float:
        return self._clock.now() if self.state == "connected" else self._broke_at

    @property
    def max_payload(self) -> int:
        return self.hub.max_payload

    def on_state(self, callback: Callable[[BusState], None]) -> Callable[[], None]:
        return self.connection.tell(callback)

    async def publish(self, message: Raw) -> None:
        if self.state != "connected":
            raise disconnected(self.state)
        self.hub.route(self, message)

    async def subscribe(self, subject: str, receive: Receive, *, queue: str = "") -> Subscription:
        listening = _Listening(self, subject, receive, queue)
        self.listening[listening] = None
        return listening

    async def close(self) -> None:
        self.break_off("closed")
        self.listening.clear()
        self.hub.forget(self)

    def break_off(self, state: BusState) -> None:
        """Loses what is under way to this client."""
        self.life += 1
        self._broke_at = self._clock.now()
        self._arrived.clear()
        for listening in self.listening:
            listening.pending = 0
        self.connection.change(state)

    def arrive(self, listening: _Listening, message: Raw, life: int) -> None:
        """Queues one message for delivery; a full subscription throws it away, as a client of NATS does."""
        if life != self.life:
            return
        if listening.pending >= self.hub.pending_limit:
            self.counters.dropped_slow += 1
            return
        listening.pending += 1
        self._arrived.append((listening, message))
        if not self._due:
            self._due = True
            # in the receiver's name, not the sender's: a simulation can hold a node's callbacks back
            asyncio.get_running_loop().call_soon(self._deliver, context=self.context)

    def _deliver(self) -> None:
        self._due = False
        for _ in range(len(self._arrived)):
            if not self._arrived:
                return
            listening, message = self._arrived.popleft()
            listening.pending -= 1
            if listening in self.listening:
                self._hand_over(listening, message)

    def _hand_over(self, listening: _Listening, message: Raw) -> None:
        try:
            listening.receive(message)
        except Exception as error:  # the border that nats-py has too: one defect doesn't end the connection
            self.counters.client_errors += 1
            self.counters.last_error = repr(error)
            _logger.exception("a receiver of %s failed", message.subject)


class MemoryHub:
    """The broker in the process.

    Args:
        max_payload: bytes of one message, headers included.
        pending_limit: messages that one subscription may have waiting.
        seed: of ids.
    """

    def __init__(self, *, max_payload: int = MAX_PAYLOAD, pending_limit: int = PENDING_LIMIT, seed: int = 0) -> None:
        self.max_payload = max_payload
        self.pending_limit = pending_limit
        self.disturb: Disturb | None = None
        self._random = random.Random(seed)
        self._transports: dict[MemoryTransport, None] = {}
        self._sides: dict[str, int] = {}
        self._turn = 0

    def new_id(self) -> str:
        """The next of this hub's ids: random to look at, the same in every run."""
        return f"{self._random.getrandbits(88):022x}"

    def attach(self, name: str, clock: Clock, counters: BusCounters) -> MemoryTransport:
        """A new client's transport."""
        transport = MemoryTransport(self, name, clock, counters)
        self._transports[transport] = None
        return transport

    def forget(self, transport: MemoryTransport) -> None:
        self._transports.pop(transport, None)

    def disconnect(self, bus: MemoryBus) -> None:
        """Breaks a client's connection; what is under way to it is lost."""
        # what the client does about it is its own doing, whoever broke the connection
        bus.memory.context.run(bus.memory.break_off, "disconnected")

    def reconnect(self, bus: MemoryBus) -> None:
        """Brings it back, its subscriptions included."""
        assert bus.state == "disconnected", bus.state
        bus.counters.reconnects += 1
        bus.memory.context.run(bus.memory.connection.change, "connected")

    def split(self, *sides: set[str]) -> None:
        """Cuts the hub into sides by the names of buses; those in no set are a side of their own."""
        self._sides = {name: number for number, side in enumerate(sides, start=1) for name in side}

    def heal(self) -> None:
        """Ends a split."""
        self._sides = {}

    def route(self, sender: MemoryTransport, message: Raw) -> None:
        """Delivers to every listener, to one of each queue group, or says that there is none."""
        tokens = message.subject.split(".")
        groups: dict[str, list[_Listening]] = {}
        found = False
        for listening in self._listeners(sender, message.subject, tokens):
            found = True
            if listening.queue:
                groups.setdefault(listening.queue, []).append(listening)
            else:
                self._carry(sender, listening, message)
        for members in groups.values():
            self._turn += 1
            self._carry(sender, members[self._turn % len(members)], message)
        if not found and message.reply:
            answer = Raw(message.reply, b"", "", {STATUS: NO_RESPONDERS})
            for listening in self._listeners(sender, message.reply, message.reply.split(".")):
                self._carry(sender, listening, answer)

    def _listeners(self, sender: MemoryTransport, subject: str, tokens: list[str]) -> list[_Listening]:
        return [
            listening
            for transport in self._transports
            if transport.state == "connected" and self._reaches(sender, transport)
            for listening in transport.listening
            if subject.startswith(listening.head) and subject_matches(listening.pattern, tokens)
        ]

    def _reaches(self, one: MemoryTransport, other: MemoryTransport) -> bool:
        return self._sides.get(one.name, 0) == self._sides.get(other.name, 0)

    def _carry(self, sender: MemoryTransport, listening: _Listening, message: Raw) -> None:
        receiver = listening.transport
        delays = _AT_ONCE if self.disturb is None else self.disturb(sender.name, receiver.name, message)
        for delay_s in delays:
            if delay_s > 0:
                loop = asyncio.get_running_loop()
                loop.call_later(delay_s, receiver.arrive, listening, message, receiver.life, context=receiver.context)
            else:
                receiver.arrive(listening, message, receiver.life)


class MemoryBus(CoreBus):
    """A bus over a `MemoryHub`, connected from the start.

    Args:
        hub: shared by all who shall hear each other.
        clock: of deadlines; timers are the event loop's.
    """

    def __init__(
        self,
        hub: MemoryHub,
        *,
        cluster: str = "home",
        name: str = "memory",
        clock: Clock | None = None,
        parcels_limit_bytes: int = PARCELS_LIMIT_BYTES,
    ) -> None:
        counters = BusCounters()
        ours = SystemClock() if clock is None else clock
        self.memory = hub.attach(name, ours, counters)
        super().__init__(
            self.memory,
            cluster=cluster,
            name=name,
            clock=ours,
            counters=counters,
            new_id=hub.new_id,
            parcels_limit_bytes=parcels_limit_bytes,
        )
