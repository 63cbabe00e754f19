"""The runner's requests as the event loop knows them: from the call that brings one until 30 s after its end.

    preparing ──admitted──> computing ──the engine thread's Ended──> ended ──35 s──> forgotten
        ├──refused──────────────────────────────────────────────────────────────────> forgotten
        └──admitted, but ended meanwhile (cancel, drain)──────────────> ended

A request is preparing while its prompt is rendered and tokenised. One key (request, attempt) is prepared and computed
once, however often it is asked; every asker gets the same answer.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Final, Literal

from skulk.batching.requests import RequestKey
from skulk.bus.streams import StreamWriter
from skulk.cluster.liveness import CHUNKS_KEPT_S
from skulk.wire.generation import Accepted, Generate, StreamEnd

# Longer than the outbox keeps its chunks: an attempt that it still knows is never begun again.
ANSWERS_KEPT_S: Final = CHUNKS_KEPT_S + 5.0
_NEW_SHARE: Final = 0.2

State = Literal["preparing", "computing", "ended"]


class OpenRequest:
    """One request.

    Attributes:
        accepted: the answer to all who ask for it.
        wanted_until: when the last of the askers stops waiting for that answer.
        wanted_end: how it shall end once it is admitted, because somebody ended it before.
        end_asked: the engine thread was told to end it.
        has_started: it got a slot.
    """

    def __init__(self, generate: Generate, arrived_at: float) -> None:
        self.generate = generate
        self.key = RequestKey(generate.request_id, generate.attempt)
        self.arrived_at = arrived_at
        self.accepted: asyncio.Future[Accepted] = asyncio.get_running_loop().create_future()
        # An answer that nobody waits for any more is no defect.
        self.accepted.add_done_callback(_retrieve)
        self.wanted_until = 0.0
        self.state: State = "preparing"
        self.wanted_end: StreamEnd | None = None
        self.end_asked = False
        self.has_started = False
        self.ended_at = 0.0
        self.writer: StreamWriter | None = None

    def wait_until(self, deadline: float | None) -> None:
        """One more asker, who waits until then; None: as long as it takes."""
        self.wanted_until = max(self.wanted_until, math.inf if deadline is None else deadline)


class RequestTable:
    """All requests by key. Only the event loop touches it.

    Attributes:
        request_s: seconds from slot to end of lately completed requests; 0 before the first.
        changed: set whenever a request ended, was refused, or its gateway confirmed its end.
    """

    def __init__(self) -> None:
        self._requests: dict[RequestKey, OpenRequest] = {}
        self.request_s = 0.0
        self.changed = asyncio.Event()

    def get(self, key: RequestKey) -> OpenRequest | None:
        return self._requests.get(key)

    def open(self, generate: Generate, now: float) -> OpenRequest:
        """Enters a new request; from here on it counts as open."""
        request = OpenRequest(generate, now)
        assert request.key not in self._requests, f"{request.key} is here already"
        self._requests[request.key] = request
        return request

    def open_requests(self) -> tuple[OpenRequest, ...]:
        """All that haven't ended."""
        return tuple(request for request in self._requests.values() if request.state != "ended")

    def attempts(self, request_id: str) -> Iterator[OpenRequest]:
        """The open attempts of a request."""
        return (request for request in self.open_requests() if request.key.request_id == request_id)

    def known_as(self, request_id: str) -> Iterator[OpenRequest]:
        """The open attempts of a request, and those of the prompts that are part of it."""
        return (
            request
            for request in self.open_requests()
            if request.key.request_id == request_id or request.generate.part_of == request_id != ""
        )

    @property
    def open_sequences(self) -> int:
        return sum(request.generate.n for request in self.open_requests())

    @property
    def active(self) -> int:
        """Requests that have a slot."""
        return sum(1 for request in self.open_requests() if request.has_started)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return sum(1 for request in self.open_requests() if not request.has_started)

    @property
    def preparing(self) -> int:
        return sum(1 for request in self._requests.values() if request.state == "preparing")

    def remove(self, request: OpenRequest) -> None:
        """Forgets a refused request: the same call later is a new one."""
        del self._requests[request.key]
        self.changed.set()

    def ended(self, request: OpenRequest, now: float, took_s: float | None) -> None:
        """Notes a request's end; its answer is kept for those who ask again.

        Args:
            request: an open one.
            now: seconds of the runner's clock.
            took_s: from its slot to its end, where it came to its own end.
        """
        assert request.state != "ended", f"{request.key} ended twice"
        request.state = "ended"
        request.ended_at = now
        if took_s is not None:
            self.request_s += (_NEW_SHARE if self.request_s else 1.0) * (took_s - self.request_s)
        self.changed.set()

    def unconfirmed(self) -> bool:
        """Whether a gateway may still lack the end of a stream."""
        return any(
            request.writer is not None and not request.writer.is_confirmed for request in self._requests.values()
        )

    def forget_old(self, now: float) -> None:
        """Forgets what ended long ago."""
        for key, request in tuple(self._requests.items()):
            if request.state == "ended" and now - request.ended_at >= ANSWERS_KEPT_S:
                del self._requests[key]


def _retrieve(answer: asyncio.Future[Accepted]) -> None:
    if not answer.cancelled():
        answer.exception()
