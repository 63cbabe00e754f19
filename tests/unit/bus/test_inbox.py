"""The gateway's end of streams: holes, silence, death, slow readers. The runner is played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import pytest

from skulk.bus.inbox import BUFFER_BYTES, Inbox, StreamReader
from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.port import Call
from skulk.bus.subjects import ALIVE, RUNNER_RESEND, STREAM
from skulk.errors import ServiceError, SkulkError
from skulk.wire.base import ErrorBody
from skulk.wire.generation import Alive, Chunk, Resend, Resent, StreamPhase, StreamState
from tests.support.bus import Collector, ManualClock
from tests.support.messages import GATEWAY, REQUEST, RUNNER, chunk, stopped, texts

Answer = Callable[[Resend], tuple[Chunk, ...]]


class Rig:
    """An inbox on a hub with a clock of the test's, and a runner that says what the test wants."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.hub = MemoryHub()
        self.bus = MemoryBus(self.hub, name="gateway", clock=self.clock)
        self.runner = MemoryBus(self.hub, name="runner")
        self.inbox = Inbox(self.bus, GATEWAY, self.clock)
        self.asked: Collector[Resend] = Collector()
        self.answer: Answer = lambda ask: ()

    async def resend(self, call: Call[Resend]) -> Resent:
        self.asked(call.message)
        chunks = self.answer(call.message)
        return Resent(request_id=call.message.request_id, attempt=call.message.attempt, chunks=chunks)

    async def send(self, *chunks: Chunk) -> None:
        for one in chunks:
            await self.runner.publish(STREAM, one, gateway=GATEWAY, request=one.request_id, attempt=str(one.attempt))
        await self.settle()

    async def alive(self, last_seq: int | None, phase: StreamPhase = "decode", attempt: int = 1) -> None:
        """One alive message; ``last_seq`` None: it doesn't name the stream."""
        streams: dict[str, StreamState] = {}
        if last_seq is not None:
            streams[REQUEST] = StreamState(attempt=attempt, last_seq=last_seq, phase=phase)
        message = Alive(runner_id=RUNNER, gateway_id=GATEWAY, at=0.0, streams=streams)
        await self.runner.publish(ALIVE, message, gateway=GATEWAY, runner=RUNNER)
        await self.settle()

    async def settle(self) -> None:
        """Lets everything that is under way arrive, answers to what it causes included."""
        for _ in range(6):
            await self.runner.flush()
            await self.bus.flush()

    def open(self, attempt: int = 1) -> StreamReader:
        reader = self.inbox.open(REQUEST, attempt, RUNNER)
        reader.begin_to_count()
        return reader

    def pass_time(self, seconds: float, step_s: float = 0.25) -> None:
        """Ticks on time, as a running inbox would."""
        for _ in range(round(seconds / step_s)):
            self.clock.time += step_s
            self.inbox.tick(self.clock.now())


@asynccontextmanager
async def rig() -> AsyncGenerator[Rig]:
    made = Rig()
    await made.inbox.start()
    await made.runner.serve("runner", {RUNNER_RESEND: made.resend}, runner=RUNNER)
    try:
        yield made
    finally:
        await made.inbox.close()
        await made.bus.close()
        await made.runner.close()


async def failure(reader: StreamReader) -> SkulkError:
    with pytest.raises(ServiceError) as failed:
        async with asyncio.timeout(10.0):
            await reader.take()
    return failed.value


async def test_take_gives_all_that_is_ready_and_waits_for_at_least_one() -> None:
    async with rig() as it:
        reader = it.open()
        taking = asyncio.create_task(reader.take())
        await it.settle()
        assert not taking.done()
        await it.send(chunk(0, "a"))
        assert await taking == [chunk(0, "a")]
        await it.send(chunk(1, "b"), chunk(2, "c"), chunk(3, "d", stopped()))
        last = await reader.take()
        assert texts(last) == "bcd"
        assert last[-1].end == stopped()
        assert reader.is_over
        with pytest.raises(AssertionError):
            await reader.take()


async def test_a_hole_is_asked_for_at_once_and_filled() -> None:
    async with rig() as it:
        it.answer = lambda ask: (chunk(1, "b"), chunk(2, "c"))
        reader = it.open()
        await it.send(chunk(0, "a"), chunk(2, "c"), chunk(3, "d"))
        assert await it.asked.wait(1) == [Resend(request_id=REQUEST, attempt=1, start=1)]
        assert texts(await reader.take()) == "abcd"
        assert it.inbox.counters.healed == 1


async def test_duplicates_strangers_and_other_attempts_are_ignored() -> None:
    async with rig() as it:
        reader = it.open(attempt=2)
        await it.send(chunk(0, "old", attempt=1), chunk(0, "new", attempt=2), chunk(0, "new", attempt=2))
        await it.send(chunk(0, "stranger", request_id="unknown"))
        assert texts(await reader.take()) == "new"
        await it.send(chunk(1, "!", stopped(), attempt=2))
        assert texts(await reader.take()) == "!"
        assert it.inbox.counters.ignored == 2


async def test_a_lost_tail_is_found_by_alive() -> None:
    async with rig() as it:
        it.answer = lambda ask: (chunk(1, "b"), chunk(2, "c", stopped()))[ask.start - 1 :]
        reader = it.open()
        await it.send(chunk(0, "a"))
        await it.alive(2, "ended")
        await it.asked.wait(1)
        await it.settle()
        chunks = await reader.take()
        assert texts(chunks) == "abc"
        assert chunks[-1].end == stopped()


async def test_an_alive_message_beside_its_chunks_asks_for_nothing() -> None:
    async with rig() as it:
        reader = it.open()
        message = Alive(
            runner_id=RUNNER,
            gateway_id=GATEWAY,
            at=0.0,
            streams={REQUEST: StreamState(attempt=1, last_seq=0, phase="decode")},
        )
        await it.runner.publish(ALIVE, message, gateway=GATEWAY, runner=RUNNER)
        await it.runner.publish(STREAM, chunk(0, "a"), gateway=GATEWAY, request=REQUEST, attempt="1")
        await it.settle()
        assert texts(await reader.take()) == "a"
        assert it.asked.items == []


async def test_a_resend_in_several_answers_goes_on_from_the_last() -> None:
    async with rig() as it:
        it.answer = lambda ask: (chunk(ask.start, f"{ask.start} ", stopped() if ask.start == 5 else None),)
        reader = it.open()
        await it.alive(5, "ended")
        await it.asked.wait(6)
        await it.settle()
        assert texts(await reader.take()) == "0 1 2 3 4 5 "
        assert [ask.start for ask in it.asked.items][:6] == [0, 1, 2, 3, 4, 5]


async def test_a_runner_that_lost_the_chunks_loses_the_stream_after_what_came() -> None:
    def gone(ask: Resend) -> tuple[Chunk, ...]:
        raise ServiceError("stream_lost", "no longer kept")

    async with rig() as it:
        it.answer = gone
        reader = it.open()
        await it.send(chunk(0, "a"), chunk(2, "c"))
        await it.asked.wait(1)
        await it.settle()
        assert texts(await reader.take()) == "a"
        error = await failure(reader)
        assert (error.code, error.detail) == ("stream_lost", "no longer kept")


async def test_a_hole_that_stays_for_its_time_loses_the_stream() -> None:
    async with rig() as it:

        def nothing(ask: Resend) -> tuple[Chunk, ...]:
            it.clock.time += 0.5
            return ()

        it.answer = nothing
        reader = it.open()
        await it.send(chunk(1, "b"))
        error = await failure(reader)
        assert error.code == "stream_lost"
        assert 4 <= len(it.asked.items) <= 6


async def test_a_stream_that_a_runner_does_not_name_is_asked_about() -> None:
    def unknown(ask: Resend) -> tuple[Chunk, ...]:
        raise ServiceError("stream_lost", "unknown here")

    async with rig() as it:
        it.answer = unknown
        reader = it.open()
        for _ in range(5):
            await it.alive(None)
            it.pass_time(0.5)
        assert it.asked.items == []
        it.pass_time(0.25)
        await it.alive(None)
        assert (await failure(reader)).detail == "unknown here"


async def test_a_runner_that_is_silent_loses_its_streams() -> None:
    async with rig() as it:
        reader = it.open()
        it.pass_time(2.0)
        await it.alive(-1)
        it.pass_time(2.5)
        assert not reader.is_over
        it.pass_time(0.25)
        error = await failure(reader)
        assert error.code == "stream_lost"
        assert "2.8 s" in error.detail


async def test_before_the_runner_was_asked_silence_does_not_count() -> None:
    async with rig() as it:
        reader = it.inbox.open(REQUEST, 1, RUNNER)
        it.pass_time(10.0)
        taking = asyncio.create_task(reader.take())
        await asyncio.sleep(0)
        it.pass_time(2.5)
        assert not taking.done()
        it.pass_time(0.5)
        with pytest.raises(ServiceError):
            await taking


async def test_silence_is_not_counted_while_disconnected_or_after_a_late_tick() -> None:
    async with rig() as it:
        reader = it.open()
        it.pass_time(2.0)
        it.hub.disconnect(it.bus)
        it.pass_time(10.0)
        it.hub.reconnect(it.bus)
        it.pass_time(2.5)
        assert not reader.is_over
        it.pass_time(5.0, step_s=5.0)
        it.pass_time(2.5)
        assert not reader.is_over
        it.pass_time(0.25)
        assert reader.is_over


async def test_a_dead_runner_ends_its_streams_after_what_came() -> None:
    async with rig() as it:
        reader = it.open()
        await it.send(chunk(0, "a"), chunk(1, "b"))
        it.inbox.runner_died("another", ErrorBody(code="runner_failed", detail="not ours"))
        it.inbox.runner_died(RUNNER, ErrorBody(code="internal", detail="ended by SIGKILL"))
        assert texts(await reader.take()) == "ab"
        error = await failure(reader)
        assert (error.code, error.detail) == ("runner_failed", "ended by SIGKILL")


async def test_a_stream_that_had_ended_does_not_fail() -> None:
    async with rig() as it:
        reader = it.open()
        await it.send(chunk(0, "a", stopped()))
        it.inbox.runner_died(RUNNER, ErrorBody(code="runner_failed", detail="later"))
        it.pass_time(10.0)
        assert (await reader.take())[-1].end == stopped()


async def test_a_reader_too_far_behind_is_ended() -> None:
    async with rig() as it:
        reader = it.open()
        other = it.inbox.open("other", 1, RUNNER)
        pieces = BUFFER_BYTES // 1_000
        await it.send(*(chunk(seq, "x" * 1_000) for seq in range(pieces + 10)))
        assert reader.is_overrun
        got = await reader.take()
        assert [one.seq for one in got] == list(range(len(got)))
        assert len(got) <= pieces + 1
        assert (await failure(reader)).code == "stream_lost"
        await it.send(chunk(0, "fine", request_id="other"))
        assert texts(await other.take()) == "fine"


async def test_a_confirmation_is_sent_for_what_ended_and_for_what_nobody_reads() -> None:
    async with rig() as it:
        reader = it.open()
        await it.send(chunk(0, "a", stopped()))
        await it.alive(0, "ended")
        assert await it.asked.wait(1) == [Resend(request_id=REQUEST, attempt=1, start=1)]
        await reader.take()
        await reader.close()
        await it.alive(0, "ended")
        assert len(await it.asked.wait(2)) == 2
        await it.alive(0, "decode")
        assert len(it.asked.items) == 2


async def test_closing_releases_and_a_new_attempt_takes_the_place_of_the_old() -> None:
    async with rig() as it:
        old = it.open()
        await it.send(chunk(1, "hole"))
        new = it.open(attempt=2)
        await old.close()
        assert it.inbox.open_streams == 1
        await it.send(chunk(0, "late"), chunk(0, "new", attempt=2))
        assert texts(await new.take()) == "new"
        await new.close()
        assert it.inbox.open_streams == 0
        with pytest.raises(AssertionError):
            it.open(attempt=1)
            it.open(attempt=1)


async def test_closing_the_inbox_ends_what_is_open() -> None:
    async with rig() as it:
        reader = it.open()
        await it.inbox.close()
        assert (await failure(reader)).code == "stream_lost"
