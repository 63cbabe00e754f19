"""The gateway's end of streams: puts chunks in order, asks for what is missing, notices who is gone.

    stream.<gateway>.>  ──append──> StreamReader ──take()──> the client's answer
    alive.<gateway>.*   ──note────> last numbers, life signs ──> resend {request, attempt, start}

    a stream ends with      when
    its terminal chunk      it came, in order
    runner_failed           the runner's supervisor says so (`Inbox.runner_died`), after what had come in order
    stream_lost             no sign of life for 2.5 s, a hole that stayed for 2.5 s, the runner forgot it, or the
                            reader is 256 KiB behind (`StreamReader.is_overrun`)

Silence is counted only as far as our own server was heard (`Bus.heard_at`), and only if our own tick was on time; a
reconnect restarts all clocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final

import msgspec

from skulk.bus.joining import Pending
from skulk.bus.port import Bus, BusState, Received, Subscription
from skulk.bus.sequence import StreamSequence
from skulk.bus.subjects import ALIVE, RUNNER_RESEND, STREAM
from skulk.clock import Clock
from skulk.cluster.liveness import STREAM_DEAD_S
from skulk.errors import ServiceError, SkulkError
from skulk.units import KIB
from skulk.wire.base import ErrorBody
from skulk.wire.generation import Alive, Chunk, Resend, StreamState

BUFFER_BYTES: Final = 256 * KIB
TICK_S: Final = 0.25
LATE_TICK_S: Final = 1.0
RESEND_TIMEOUT_S: Final = 0.5
RESEND_PAUSE_S: Final = 0.1
CONFIRM_TIMEOUT_S: Final = 1.0
CONFIRMING_LIMIT: Final = 64


class InboxCounters(msgspec.Struct, kw_only=True):
    """``ignored``: chunks of streams that nobody reads here (any more), or of other attempts."""

    chunks: int = 0
    ignored: int = 0
    resends: int = 0
    healed: int = 0
    lost: int = 0
    overrun: int = 0


class StreamReader:
    """One attempt's stream, in order and each chunk once. Made by `Inbox.open`; one task reads it."""

    def __init__(self, inbox: Inbox, request_id: str, attempt: int, runner_id: str) -> None:
        self._inbox = inbox
        self.request_id = request_id
        self.attempt = attempt
        self.runner_id = runner_id
        self.sequence = StreamSequence()
        self.is_overrun = False
        self.is_closed = False
        self.healing: asyncio.Task[None] | None = None
        self.state: StreamState | None = None
        self.counted_from: float | None = None
        self.pending = Pending()
        self._error: SkulkError | None = None
        self._is_read_out = False
        self._changed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Nothing more comes: it ended, failed or was closed."""
        return self.sequence.has_ended or self._error is not None

    async def take(self) -> list[Chunk]:
        """All chunks that are ready, at least one; the last chunk of a stream carries ``end``.

        Call it when the runner has accepted the request: from the first call (or chunk) on, silence counts.

        Raises:
            SkulkError: the stream failed (see the module), after everything that had come in order was taken.
        """
        while not (ready := self.ready()):
            await self.wait()
        return ready

    def ready(self) -> list[Chunk]:
        """As `take`, without waiting: empty where nothing is ready."""
        assert not self._is_read_out, "a stream is not read beyond its end"
        if self.counted_from is None:
            self.begin_to_count()
        if not self.pending:
            if self._error is not None:
                raise self._error
            return []
        ready = self.pending.take()
        self._is_read_out = ready[-1].end is not None
        return ready

    async def wait(self) -> None:
        """Returns when `ready` may tell something new."""
        self._changed.clear()
        await self._changed.wait()

    def wake(self) -> None:
        """Ends a `wait`."""
        self._changed.set()

    async def close(self) -> None:
        """Releases it; the gateway cancels the request itself, where it still runs."""
        self.is_closed = True
        self._inbox.release(self)
        healing = self.healing
        if healing is not None and healing is not asyncio.current_task():
            healing.cancel()
            await asyncio.wait({healing})

    def begin_to_count(self) -> None:
        """Lets silence count from now on; later calls change nothing."""
        if self.counted_from is None:
            self.counted_from = self._inbox.clock.now()

    def accept(self, chunk: Chunk) -> None:
        """Takes one chunk as it came; called by the inbox."""
        if self.is_over:
            return
        for ready in self.sequence.feed(chunk):
            self.pending.add(ready)
        if self.pending:
            self._changed.set()
        if self.pending.size_bytes > BUFFER_BYTES and not self.sequence.has_ended:
            self.is_overrun = True
            self._inbox.counters.overrun += 1
            self.fail(
                ServiceError(
                    "stream_lost",
                    f"the reader of {self.request_id} is more than {BUFFER_BYTES // KIB} KiB behind: read faster",
                )
            )

    def fail(self, error: SkulkError) -> None:
        """Ends it with an error; the first end stands."""
        if not self.is_over:
            self._error = error
            self._changed.set()


class _Runner:
    """What the inbox knows of one runner's life."""

    def __init__(self, now: float) -> None:
        self.heard_at = now
        self.readers: dict[tuple[str, int], StreamReader] = {}


class Inbox:
    """All streams of one gateway. `start` once, `close` at the end, `run` in between.

    Args:
        bus: of the gateway.
        gateway_id: whose stream subjects are listened to.
    """

    def __init__(self, bus: Bus, gateway_id: str, clock: Clock) -> None:
        self._bus = bus
        self._gateway_id = gateway_id
        self.clock = clock
        self.counters = InboxCounters()
        self._readers: dict[str, StreamReader] = {}
        self._runners: dict[str, _Runner] = {}
        self._subscriptions: list[Subscription] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._confirming: set[tuple[str, int]] = set()
        self._ticked_at = clock.now()
        self._connected = asyncio.Event()
        self._bus_changed(bus.state)
        self._end_watch = bus.on_state(self._bus_changed)

    @property
    def open_streams(self) -> int:
        return len(self._readers)

    async def start(self) -> None:
        """Subscribes; only then may requests be sent."""
        self._subscriptions.append(await self._bus.subscribe(STREAM, self._on_chunk, gateway=self._gateway_id))
        self._subscriptions.append(await self._bus.subscribe(ALIVE, self._on_alive, gateway=self._gateway_id))

    async def run(self) -> None:
        """Watches for silence until it is cancelled."""
        while True:
            await asyncio.sleep(TICK_S)
            self.tick(self.clock.now())

    async def close(self) -> None:
        """Ends the subscriptions and every open stream."""
        for reader in tuple(self._readers.values()):
            reader.fail(ServiceError("stream_lost", "this gateway is stopping: send the request to another one"))
        for subscription in self._subscriptions:
            await subscription.close()
        self._subscriptions.clear()
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))
        self._end_watch()

    def open(self, request_id: str, attempt: int, runner_id: str) -> StreamReader:
        """Begins to collect the chunks of one attempt; call it before the runner is asked.

        A new attempt of a request takes the place of the earlier one, whose chunks are ignored from now on.
        """
        earlier = self._readers.get(request_id)
        assert earlier is None or earlier.attempt < attempt, f"attempt {attempt} of {request_id} is not a new one"
        if earlier is not None:
            self.release(earlier)
        reader = self._readers[request_id] = StreamReader(self, request_id, attempt, runner_id)
        runner = self._runners.setdefault(runner_id, _Runner(self.clock.now()))
        runner.readers[request_id, attempt] = reader
        return reader

    def release(self, reader: StreamReader) -> None:
        """Forgets a reader; called by `StreamReader.close`."""
        if self._readers.get(reader.request_id) is reader:
            del self._readers[reader.request_id]
        runner = self._runners.get(reader.runner_id)
        if runner is not None:
            runner.readers.pop((reader.request_id, reader.attempt), None)
            if not runner.readers:
                del self._runners[reader.runner_id]

    def runner_died(self, runner_id: str, error: ErrorBody) -> None:
        """Its supervisor saw it end: its open streams end with ``runner_failed`` after what had come in order."""
        runner = self._runners.get(runner_id)
        for reader in tuple(runner.readers.values()) if runner is not None else ():
            reader.fail(ServiceError("runner_failed", error.detail))

    def tick(self, now: float) -> None:
        """Ends the streams of runners that were silent for 2.5 s, and asks after those that a runner doesn't name."""
        was_late = now - self._ticked_at > TICK_S + LATE_TICK_S
        self._ticked_at = now
        if self._bus.state != "connected" or was_late:
            self._restart_clocks(now)
            return
        for runner_id, runner in tuple(self._runners.items()):
            for reader in tuple(runner.readers.values()):
                if reader.counted_from is None or reader.is_over:
                    continue
                silent_s = self._bus.heard_at - max(runner.heard_at, reader.counted_from)
                if silent_s > STREAM_DEAD_S:
                    text = f"the runner {runner_id} has been silent for {silent_s:.1f} s: send the request again"
                    self._lose(reader, text)

    # What comes in

    def _on_chunk(self, received: Received[Chunk]) -> None:
        chunk = received.message
        reader = self._readers.get(chunk.request_id)
        if reader is None or (reader.attempt, reader.runner_id) != (chunk.attempt, chunk.runner_id):
            self.counters.ignored += 1
            return
        self.counters.chunks += 1
        reader.begin_to_count()
        self._runners[reader.runner_id].heard_at = self.clock.now()
        reader.accept(chunk)
        if reader.sequence.missing_from is not None:
            self._heal(reader)

    def _on_alive(self, received: Received[Alive]) -> None:
        alive = received.message
        now = self.clock.now()
        runner = self._runners.get(alive.runner_id)
        readers = {} if runner is None else runner.readers
        if runner is not None:
            runner.heard_at = now
        for request_id, state in alive.streams.items():
            reader = readers.get((request_id, state.attempt))
            if reader is not None:
                reader.state = state
                reader.begin_to_count()
                reader.sequence.note_last(state.last_seq)
            if state.phase == "ended" and (reader is None or reader.is_over):
                self._confirm(alive.runner_id, request_id, state)
        # Chunks that came in before this message may still be on their way through the loop.
        asyncio.get_running_loop().call_soon(self._look_for_holes, alive, now)

    def _look_for_holes(self, alive: Alive, now: float) -> None:
        runner = self._runners.get(alive.runner_id)
        for (request_id, attempt), reader in tuple(runner.readers.items()) if runner is not None else ():
            state = alive.streams.get(request_id)
            is_named = state is not None and state.attempt >= attempt
            counted_s = 0.0 if reader.counted_from is None else now - reader.counted_from
            if reader.sequence.missing_from is not None or (not is_named and counted_s > STREAM_DEAD_S):
                self._heal(reader)

    def _bus_changed(self, state: BusState) -> None:
        if state == "connected":
            self._restart_clocks(self.clock.now())
            self._connected.set()
        else:
            self._connected.clear()

    def _restart_clocks(self, now: float) -> None:
        for runner in self._runners.values():
            runner.heard_at = now

    # What is asked for

    def _heal(self, reader: StreamReader) -> None:
        if reader.healing is None and not reader.is_over:
            name = f"resend {reader.request_id} {reader.attempt}"
            reader.healing = self._own(self._fetch_missing(reader), name)
            reader.healing.add_done_callback(lambda _: self._healed(reader))

    def _healed(self, reader: StreamReader) -> None:
        reader.healing = None
        if reader.sequence.missing_from is not None and self._readers.get(reader.request_id) is reader:
            self._heal(reader)

    async def _fetch_missing(self, reader: StreamReader) -> None:
        """Asks until nothing is missing. Each answer that brings something restarts the 2.5 s that it may take."""
        left_s = STREAM_DEAD_S
        has_asked = False
        while not reader.is_over and (reader.sequence.missing_from is not None or not has_asked):
            await self._connected.wait()
            started = self._bus.heard_at
            start = reader.sequence.next_seq
            try:
                await self._ask_again(reader, start)
            except SkulkError as error:
                if error.code == "stream_lost":
                    self._lose(reader, error.detail)
                    return
            else:
                has_asked = True
            if reader.sequence.next_seq > start:
                left_s = STREAM_DEAD_S
                continue
            if reader.sequence.missing_from is None and has_asked:
                break
            await asyncio.sleep(RESEND_PAUSE_S)
            left_s -= max(0.0, self._bus.heard_at - started)
            if left_s <= 0:
                self._lose(reader, f"chunk {start} of request {reader.request_id} never came: send the request again")
                return
        if reader.sequence.missing_from is None:
            self.counters.healed += 1

    async def _ask_again(self, reader: StreamReader, start: int) -> None:
        self.counters.resends += 1
        ask = Resend(request_id=reader.request_id, attempt=reader.attempt, start=start)
        answer = await self._bus.request(RUNNER_RESEND, ask, timeout_s=RESEND_TIMEOUT_S, runner=reader.runner_id)
        runner = self._runners.get(reader.runner_id)
        if runner is not None:
            runner.heard_at = self.clock.now()
        for chunk in answer.chunks:
            reader.accept(chunk)

    def _confirm(self, runner_id: str, request_id: str, state: StreamState) -> None:
        """Tells a runner that an end arrived (or is of no interest), so that it stops naming the stream."""
        key = (request_id, state.attempt)
        if key not in self._confirming and len(self._confirming) < CONFIRMING_LIMIT:
            self._confirming.add(key)
            ask = Resend(request_id=request_id, attempt=state.attempt, start=state.last_seq + 1)
            task = self._own(self._ask_for_nothing(runner_id, ask), f"confirm {request_id}")
            task.add_done_callback(lambda _: self._confirming.discard(key))

    async def _ask_for_nothing(self, runner_id: str, ask: Resend) -> None:
        try:
            await self._bus.request(RUNNER_RESEND, ask, timeout_s=CONFIRM_TIMEOUT_S, runner=runner_id)
        except SkulkError:
            return  # the next alive message asks again, or the runner forgets the stream by itself

    def _lose(self, reader: StreamReader, text: str) -> None:
        self.counters.lost += 1
        reader.fail(ServiceError("stream_lost", text))

    def _own(self, coroutine: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
