"""The runner's end of streams: numbers chunks, publishes them in order, keeps them for those who missed some.

    engine thread ──call_soon──> StreamWriter.send ──> backlog ──one task──> stream.<gateway>.<request>.<attempt>
                                       └──────────────> kept until 30 s after the end ──resend──> gateway
    every 0.5 s, per gateway:  alive {request: attempt, last seq, phase, step age}

`send` and `end` are plain calls of the event loop's thread, so chunks keep the order of the calls. While the bus is
disconnected chunks are only kept: the next ``alive`` tells the gateway what it missed, and it asks.

An ended stream stays in ``alive`` until the gateway confirmed the end (it asks to resend from behind the last number)
or 30 s have passed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import deque
from typing import Final

import msgspec

from skulk.bus.port import Bus, BusState
from skulk.bus.subjects import ALIVE, STREAM
from skulk.clock import Clock
from skulk.cluster.liveness import CHUNKS_KEPT_S, GATEWAY_SILENT_S, STREAM_ALIVE_S
from skulk.errors import ServiceError, SkulkError, UnavailableError
from skulk.units import KIB, MIB
from skulk.wire.beats import GatewayBeat
from skulk.wire.generation import (
    Alive,
    Chunk,
    FinishReason,
    Generate,
    Resend,
    Resent,
    StreamEnd,
    StreamPhase,
    StreamState,
)

KEPT_BYTES: Final = 64 * MIB
RESENT_BYTES: Final = 128 * KIB
PIECE_CHARACTERS: Final = 16 * KIB
TOKENS_LIMIT: Final = 16 * KIB
BACKLOG_LIMIT: Final = 65_536
YIELD_EVERY: Final = 128
LATE_TICK_S: Final = 1.0

_CHUNK_BYTES: Final = 256
_TOKEN_BYTES: Final = 8
_logger = logging.getLogger(__name__)


def chunk_bytes(chunk: Chunk) -> int:
    """About what a chunk takes in memory, and the most it takes on the wire (escaped text aside)."""
    return _CHUNK_BYTES + 4 * len(chunk.text) + _TOKEN_BYTES * len(chunk.tokens)


class OutboxCounters(msgspec.Struct, kw_only=True):
    """``only_kept``: chunks that weren't published when they were made; ``dropped``: kept ones given up for room."""

    chunks: int = 0
    only_kept: int = 0
    resends: int = 0
    dropped: int = 0


class StreamWriter:
    """One attempt's stream. Ends exactly once: the first `end` counts, later calls of `send` and `end` do nothing."""

    def __init__(self, outbox: Outbox, request: Generate, now: float) -> None:
        self._outbox = outbox
        self.request = request
        self.opened_at = now
        self.ended_at: float | None = None
        self.is_confirmed = False
        self.passed_seq = -1
        self.kept: deque[Chunk] = deque()
        self._seq = 0
        self._phase: StreamPhase = "queued"
        self._processed = 0
        self._total = 0

    @property
    def next_seq(self) -> int:
        return self._seq

    def send(
        self,
        choice: int,
        text: str,
        tokens: tuple[int, ...] = (),
        finish_reason: FinishReason | None = None,
    ) -> bool:
        """Appends text and token ids of one choice; very long text goes in several chunks.

        Args:
            choice: which of the ``n`` choices.
            text: new text of it.
            tokens: the ids behind the text.
            finish_reason: of this choice, which ends with this text.

        Returns:
            False: the stream had ended, nothing was sent.
        """
        if self.ended_at is not None:
            return False
        *first, last = _pieces(text)
        for piece in first:
            self._append(self._chunk(choice, piece, (), None, None))
        self._append(self._chunk(choice, last, tokens, finish_reason, None))
        return True

    def end(
        self,
        end: StreamEnd,
        *,
        choice: int = 0,
        text: str = "",
        tokens: tuple[int, ...] = (),
        finish_reason: FinishReason | None = None,
    ) -> bool:
        """Sends the terminal chunk, with the last text of one choice if there is any.

        Returns:
            False: the stream had ended already; that end stands.
        """
        if self.ended_at is not None:
            return False
        *first, last = _pieces(text)
        for piece in first:
            self._append(self._chunk(choice, piece, (), None, None))
        self.ended_at = self._outbox.clock.now()
        self._phase = "ended"
        self._append(self._chunk(choice, last, tokens, finish_reason, end))
        return True

    def set_phase(self, phase: StreamPhase, processed: int = 0, total: int = 0) -> None:
        """What ``alive`` shows; ``processed`` of ``total`` prompt tokens."""
        if self.ended_at is None:
            assert phase != "ended", "only end() ends a stream"
            self._phase, self._processed, self._total = phase, processed, total

    def state(self, step_age_s: float) -> StreamState:
        return StreamState(
            attempt=self.request.attempt,
            last_seq=self.passed_seq,
            phase="ended" if self._phase == "ended" and self.passed_seq == self._seq - 1 else self._open_phase(),
            processed=self._processed,
            total=self._total,
            step_age_s=step_age_s,
        )

    def _open_phase(self) -> StreamPhase:
        return "decode" if self._phase == "ended" else self._phase

    def _chunk(
        self,
        choice: int,
        text: str,
        tokens: tuple[int, ...],
        finish_reason: FinishReason | None,
        end: StreamEnd | None,
    ) -> Chunk:
        assert len(tokens) <= TOKENS_LIMIT, f"{len(tokens)} token ids in one chunk"
        seq = self._seq
        self._seq += 1
        return Chunk(
            request_id=self.request.request_id,
            attempt=self.request.attempt,
            seq=seq,
            runner_id=self._outbox.runner_id,
            choice=choice,
            text=text,
            tokens=tokens,
            finish_reason=finish_reason,
            end=end,
        )

    def _append(self, chunk: Chunk) -> None:
        self._outbox.take(self, chunk)


class Outbox:
    """All streams of one runner. `run` must be running for anything to go out.

    Args:
        bus: of the runner.
        kept_bytes: the most that kept chunks may take; beyond it ended streams go first, then the oldest chunks.
    """

    def __init__(self, bus: Bus, runner_id: str, clock: Clock, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._bus = bus
        self.runner_id = runner_id
        self.clock = clock
        self.counters = OutboxCounters()
        self._streams: dict[tuple[str, int], StreamWriter] = {}
        self._backlog: deque[tuple[StreamWriter, Chunk]] = deque()
        self._wake = asyncio.Event()
        self._kept_limit = kept_bytes
        self._kept_bytes = 0
        self._step_at = clock.now()
        self._gateways: dict[str, tuple[str, float]] = {}
        self._clocks_from = clock.now()
        self._ticked_at = clock.now()

    def open(self, request: Generate) -> StreamWriter:
        """A new stream; its attempt must be unknown here (`knows`)."""
        key = (request.request_id, request.attempt)
        assert key not in self._streams, f"attempt {request.attempt} of {request.request_id} has a stream"
        now = self.clock.now()
        # The request itself is the newest that is known of its gateway's life: it may be ahead of the first beat.
        self._gateways[request.gateway_id] = (request.gateway_incarnation, now)
        writer = self._streams[key] = StreamWriter(self, request, now)
        return writer

    def knows(self, request_id: str, attempt: int) -> bool:
        """Whether this attempt has a stream, open or lately ended: a repeated `Generate` is not begun again."""
        return (request_id, attempt) in self._streams

    def take(self, writer: StreamWriter, chunk: Chunk) -> None:
        """Keeps a chunk and puts it into the backlog; called by writers."""
        self.counters.chunks += 1
        writer.kept.append(chunk)
        self._kept_bytes += chunk_bytes(chunk)
        if self._kept_bytes > self._kept_limit:
            self._make_room(writer)
        if len(self._backlog) >= BACKLOG_LIMIT:
            self._only_kept(*self._backlog.popleft())
        self._backlog.append((writer, chunk))
        self._wake.set()

    def resend(self, ask: Resend) -> Resent:
        """The chunks from a number on, as many as one answer takes; the asker goes on from the last.

        Asked from behind the last chunk of an ended stream it is the confirmation that the end arrived.

        Raises:
            ServiceError: ``stream_lost``: the attempt is unknown here, or those chunks are no longer kept.
        """
        writer = self._streams.get((ask.request_id, ask.attempt))
        if writer is None:
            raise self._lost(ask, "unknown here (any more)")
        if ask.start >= writer.next_seq:
            if writer.ended_at is not None:
                self._forget(writer)
                writer.is_confirmed = True
            return Resent(request_id=ask.request_id, attempt=ask.attempt, chunks=())
        if not writer.kept or ask.start < writer.kept[0].seq:
            raise self._lost(ask, "no longer kept from that number on")
        self.counters.resends += 1
        return Resent(request_id=ask.request_id, attempt=ask.attempt, chunks=_first_of(writer.kept, ask.start))

    def step_finished(self, now: float) -> None:
        """The engine finished a step: ``alive`` tells its age."""
        self._step_at = now

    def gateway_heard(self, beat: GatewayBeat) -> None:
        """Notes a gateway's beat."""
        self._gateways[beat.gateway_id] = (beat.incarnation, self.clock.now())

    def orphans(self, now: float) -> list[str]:
        """Open requests whose gateway is gone: silent for 5 s of connected time, or back in another life."""
        found: list[str] = []
        for writer in self._streams.values():
            request = writer.request
            incarnation, heard_at = self._gateways.get(request.gateway_id, (request.gateway_incarnation, 0.0))
            silent_since = max(heard_at, writer.opened_at, self._clocks_from)
            is_gone = self._bus.state == "connected" and min(now, self._bus.heard_at) - silent_since >= GATEWAY_SILENT_S
            if writer.ended_at is None and (is_gone or incarnation != request.gateway_incarnation):
                found.append(request.request_id)
        return found

    async def run(self) -> None:
        """Publishes chunks and ``alive`` until it is cancelled."""
        end = self._bus.on_state(self._bus_changed)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._publish_backlog(), name="publish chunks")
                group.create_task(self._beat(), name="publish alive")
        finally:
            end()

    async def tick(self, now: float) -> None:
        """One ``alive`` to each gateway that has streams here, and what is too old is forgotten."""
        if now - self._ticked_at > STREAM_ALIVE_S + LATE_TICK_S:
            self._clocks_from = now
        self._ticked_at = now
        self._forget_old(now)
        for gateway_id, streams in self._by_gateway(now).items():
            alive = Alive(runner_id=self.runner_id, gateway_id=gateway_id, at=self.clock.wall(), streams=streams)
            try:
                await self._bus.publish(ALIVE, alive, gateway=gateway_id, runner=self.runner_id)
            except UnavailableError:
                return
            except SkulkError as error:
                _logger.warning("an alive message for %s can't be sent: %s", gateway_id, error)

    def _bus_changed(self, state: BusState) -> None:
        if state == "connected":
            self._clocks_from = self.clock.now()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(STREAM_ALIVE_S)
            await self.tick(self.clock.now())

    async def _publish_backlog(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            count = 0
            while self._backlog:
                writer, chunk = self._backlog.popleft()
                await self._publish(writer, chunk)
                count += 1
                if count % YIELD_EVERY == 0:
                    await asyncio.sleep(0)

    async def _publish(self, writer: StreamWriter, chunk: Chunk) -> None:
        request = writer.request
        try:
            await self._bus.publish(
                STREAM,
                chunk,
                gateway=request.gateway_id,
                request=request.request_id,
                attempt=str(request.attempt),
            )
        except SkulkError as error:
            if not isinstance(error, UnavailableError):
                _logger.warning("chunk %d of %s can't be published: %s", chunk.seq, request.request_id, error)
            self._only_kept(writer, chunk)
        else:
            writer.passed_seq = chunk.seq

    def _only_kept(self, writer: StreamWriter, chunk: Chunk) -> None:
        self.counters.only_kept += 1
        writer.passed_seq = chunk.seq

    def _by_gateway(self, now: float) -> dict[str, dict[str, StreamState]]:
        found: dict[str, dict[str, StreamState]] = {}
        step_age_s = now - self._step_at
        newest: dict[str, int] = {}
        for (request_id, attempt), writer in self._streams.items():
            if attempt >= newest.get(request_id, 0):
                newest[request_id] = attempt
                streams = found.setdefault(writer.request.gateway_id, {})
                streams[request_id] = writer.state(step_age_s)
        return found

    def _forget_old(self, now: float) -> None:
        for writer in tuple(self._streams.values()):
            if writer.ended_at is not None and now - writer.ended_at >= CHUNKS_KEPT_S:
                self._forget(writer)
        used = {writer.request.gateway_id for writer in self._streams.values()}
        for gateway_id, (_, heard_at) in tuple(self._gateways.items()):
            if gateway_id not in used and now - heard_at >= CHUNKS_KEPT_S:
                del self._gateways[gateway_id]

    def _forget(self, writer: StreamWriter) -> None:
        self._streams.pop((writer.request.request_id, writer.request.attempt), None)
        self._kept_bytes -= sum(map(chunk_bytes, writer.kept))
        writer.kept.clear()

    def _make_room(self, current: StreamWriter) -> None:
        ended = [writer for writer in self._streams.values() if writer.ended_at is not None and writer is not current]
        for writer in ended:
            if self._kept_bytes <= self._kept_limit:
                return
            self.counters.dropped += len(writer.kept)
            self._forget(writer)
        while self._kept_bytes > self._kept_limit and len(current.kept) > 1:
            self._kept_bytes -= chunk_bytes(current.kept.popleft())
            self.counters.dropped += 1

    def _lost(self, ask: Resend, why: str) -> ServiceError:
        return ServiceError(
            "stream_lost",
            f"attempt {ask.attempt} of request {ask.request_id} is {why}; it can't be resent from {ask.start}",
        )


def _pieces(text: str) -> list[str]:
    if len(text) <= PIECE_CHARACTERS:
        return [text]
    return [text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS)]


def _first_of(kept: deque[Chunk], start: int) -> tuple[Chunk, ...]:
    """At least one chunk, and as many as fit into one answer."""
    found: list[Chunk] = []
    size = 0
    for chunk in itertools.islice(kept, start - kept[0].seq, None):
        size += chunk_bytes(chunk)
        if found and size > RESENT_BYTES:
            break
        found.append(chunk)
    return tuple(found)
