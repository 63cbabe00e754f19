"""The runner's end of streams: numbers, one end, what is kept, who is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest

from skulk.bus.memory_bus import MemoryBus, MemoryHub
from skulk.bus.outbox import BACKLOG_LIMIT, PIECE_CHARACTERS, Outbox, StreamWriter
from skulk.bus.port import Received
from skulk.bus.subjects import ALIVE, STREAM
from skulk.errors import ServiceError
from skulk.wire.base import ErrorBody
from skulk.wire.generation import Alive, Chunk, Resend, Resent, StreamEnd
from tests.support.bus import Collector, ManualClock
from tests.support.messages import GATEWAY, REQUEST, RUNNER, gateway_beat, generate, stopped, texts
from tests.support.streams import cancel_and_wait, only_kept


class Rig:
    """An outbox on a hub, and someone who hears what it says."""

    def __init__(self, **options: int) -> None:
        self.clock = ManualClock()
        self.hub = MemoryHub()
        self.bus = MemoryBus(self.hub, name="runner", clock=self.clock)
        self.listener = MemoryBus(self.hub, name="listener")
        self.outbox = Outbox(self.bus, RUNNER, self.clock, **options)
        self.chunks: Collector[Received[Chunk]] = Collector()
        self.alive: Collector[Received[Alive]] = Collector()

    async def beat(self) -> Alive:
        """What one tick says, which must be one message."""
        before = len(self.alive.items)
        await self.outbox.tick(self.clock.now())
        heard = await self.alive.wait(before + 1)
        return heard[-1].message

    def resend(self, start: int, request_id: str = REQUEST, attempt: int = 1) -> Resent:
        return self.outbox.resend(Resend(request_id=request_id, attempt=attempt, start=start))


@asynccontextmanager
async def rig(**options: int) -> AsyncGenerator[Rig]:
    """With the backlog's task running, without the clock's beats."""
    made = Rig(**options)
    await made.listener.subscribe(STREAM, made.chunks, gateway=GATEWAY)
    await made.listener.subscribe(ALIVE, made.alive, gateway=GATEWAY)
    running = asyncio.create_task(made.outbox.run(), name="outbox")
    await asyncio.sleep(0)
    try:
        yield made
    finally:
        await cancel_and_wait(running)
        await made.bus.close()
        await made.listener.close()


def write(writer: StreamWriter, *words: str) -> None:
    for word in words:
        assert writer.send(0, word, (1,))


async def test_chunks_are_numbered_without_a_hole_and_end_once() -> None:
    async with rig() as it:
        writer = it.outbox.open(generate())
        write(writer, "one ", "two ")
        assert writer.end(stopped(), text="three", finish_reason="stop")
        assert not writer.end(StreamEnd(reason="error", error=ErrorBody(code="internal", detail="late")))
        assert not writer.send(0, "late")
        received = [one.message for one in await it.chunks.wait(3)]
        await it.bus.flush()
        assert len(it.chunks.items) == 3
        assert [one.seq for one in received] == [0, 1, 2]
        assert texts(received) == "one two three"
        assert [one.end for one in received] == [None, None, stopped()]
        assert received[2].finish_reason == "stop"
        assert it.chunks.items[0].subject.endswith(f"stream.{GATEWAY}.{REQUEST}.1")


async def test_long_text_goes_in_pieces_and_its_tokens_with_the_last() -> None:
    async with rig() as it:
        writer = it.outbox.open(generate())
        text = "ab" * PIECE_CHARACTERS
        writer.send(1, text, (1, 2, 3), "length")
        received = [one.message for one in await it.chunks.wait(2)]
        assert texts(received) == text
        assert [one.tokens for one in received] == [(), (1, 2, 3)]
        assert [one.finish_reason for one in received] == [None, "length"]
        assert {one.choice for one in received} == {1}


async def test_alive_tells_last_number_phase_and_age_of_the_step() -> None:
    async with rig() as it:
        it.outbox.step_finished(it.clock.now())
        writer = it.outbox.open(generate())
        assert (await it.beat()).streams[REQUEST].last_seq == -1
        writer.set_phase("prefill", 64, 512)
        it.clock.time += 0.4
        state = (await it.beat()).streams[REQUEST]
        assert (state.phase, state.processed, state.total, state.attempt) == ("prefill", 64, 512, 1)
        assert state.step_age_s == pytest.approx(0.4)
        write(writer, "a", "b")
        await it.chunks.wait(2)
        assert (await it.beat()).streams[REQUEST].last_seq == 1
        writer.end(stopped())
        await it.chunks.wait(3)
        state = (await it.beat()).streams[REQUEST]
        assert (state.phase, state.last_seq) == ("ended", 2)


async def test_alive_never_names_a_number_that_was_not_sent_yet() -> None:
    """Else a gateway would ask for chunks that are about to come by themselves."""
    async with rig() as it:
        writer = it.outbox.open(generate())
        write(writer, "a")
        writer.end(stopped())
        state = writer.state(0.0)
        assert (state.last_seq, state.phase) == (-1, "decode")
        await it.chunks.wait(2)
        assert (writer.state(0.0).last_seq, writer.state(0.0).phase) == (1, "ended")


async def test_an_ended_stream_is_named_until_it_is_confirmed() -> None:
    async with rig() as it:
        writer = it.outbox.open(generate())
        write(writer, "a")
        writer.end(stopped())
        await it.chunks.wait(2)
        assert REQUEST in (await it.beat()).streams
        assert it.resend(1).chunks[0].end == stopped()
        assert REQUEST in (await it.beat()).streams
        assert it.resend(2).chunks == ()
        other = it.outbox.open(generate("another"))
        assert set((await it.beat()).streams) == {"another"}
        other.end(stopped())
        with pytest.raises(ServiceError) as lost:
            it.resend(0)
        assert lost.value.code == "stream_lost"


async def test_an_ended_stream_is_forgotten_after_30_seconds() -> None:
    async with rig() as it:
        writer = it.outbox.open(generate())
        writer.end(stopped())
        await it.chunks.wait(1)
        it.clock.time += 29.9
        assert REQUEST in (await it.beat()).streams
        assert it.outbox.knows(REQUEST, 1)
        it.clock.time += 0.2
        await it.outbox.tick(it.clock.now())
        assert not it.outbox.knows(REQUEST, 1)


async def test_only_the_newest_attempt_of_a_request_is_named() -> None:
    async with rig() as it:
        it.outbox.open(generate(attempt=2))
        it.outbox.open(generate(attempt=1))
        assert (await it.beat()).streams[REQUEST].attempt == 2


async def test_what_is_asked_for_again_comes_in_answers_of_bounded_size() -> None:
    async with rig() as it:
        writer = it.outbox.open(generate())
        for _ in range(100):
            writer.send(0, "x" * 8_000)
        writer.end(stopped())
        await it.chunks.wait(101)
        got: list[Chunk] = []
        answers = 0
        while not got or got[-1].end is None:
            answer = it.resend(len(got)).chunks
            assert 0 < sum(len(one.text) for one in answer) < 512 * 1024
            got += answer
            answers += 1
        assert [one.seq for one in got] == list(range(101))
        assert answers > 5


async def test_chunks_made_while_disconnected_are_kept_and_named_later() -> None:
    async with rig() as it:
        writer = it.outbox.open(generate())
        write(writer, "a")
        await it.chunks.wait(1)
        it.hub.disconnect(it.bus)
        write(writer, "b", "c")
        await only_kept(it.outbox, 2)
        await it.outbox.tick(it.clock.now())
        it.hub.reconnect(it.bus)
        write(writer, "d")
        received = [one.message for one in await it.chunks.wait(2)]
        assert texts(received) == "ad"
        assert (await it.beat()).streams[REQUEST].last_seq == 3
        assert texts(list(it.resend(1).chunks)) == "bcd"


async def test_what_is_kept_is_bounded_ended_streams_go_first() -> None:
    async with rig(kept_bytes=40_000) as it:
        ended = it.outbox.open(generate("ended"))
        ended.end(stopped(), text="x" * 4_000)
        writer = it.outbox.open(generate())
        for _ in range(30):
            writer.send(0, "y" * 1_000)
        await it.chunks.wait(31)
        with pytest.raises(ServiceError):
            it.resend(0, "ended")
        with pytest.raises(ServiceError) as lost:
            it.resend(0)
        assert lost.value.code == "stream_lost"
        assert it.resend(29).chunks[0].text == "y" * 1_000
        assert it.outbox.counters.dropped > 20


async def test_a_backlog_beyond_its_bound_is_only_kept() -> None:
    async with rig() as it:
        writer = it.outbox.open(generate())
        for _ in range(BACKLOG_LIMIT + 10):
            writer.send(0, "")
        assert it.outbox.counters.only_kept == 10
        assert it.resend(0).chunks[0].seq == 0


async def test_one_request_has_one_stream_an_attempt() -> None:
    async with rig() as it:
        it.outbox.open(generate())
        assert it.outbox.knows(REQUEST, 1)
        assert not it.outbox.knows(REQUEST, 2)
        with pytest.raises(AssertionError):
            it.outbox.open(generate())


async def test_requests_of_a_silent_gateway_are_orphans() -> None:
    async with rig() as it:
        writer = it.outbox.open(generate())
        done = it.outbox.open(generate("done"))
        done.end(stopped())
        it.clock.time += 4.9
        assert it.outbox.orphans(it.clock.now()) == []
        it.outbox.gateway_heard(gateway_beat())
        it.clock.time += 4.9
        assert it.outbox.orphans(it.clock.now()) == []
        it.clock.time += 0.2
        assert it.outbox.orphans(it.clock.now()) == [REQUEST]
        writer.end(StreamEnd(reason="cancelled"))
        assert it.outbox.orphans(it.clock.now()) == []


async def test_requests_of_a_gateways_earlier_life_are_orphans_at_once() -> None:
    async with rig() as it:
        it.outbox.open(generate())
        it.outbox.gateway_heard(gateway_beat(incarnation="life2"))
        assert it.outbox.orphans(it.clock.now()) == [REQUEST]


async def test_a_request_may_be_ahead_of_its_gateways_first_beat() -> None:
    async with rig() as it:
        it.outbox.gateway_heard(gateway_beat(incarnation="life1"))
        it.outbox.open(generate(incarnation="life2"))
        assert it.outbox.orphans(it.clock.now()) == []


async def test_silence_is_not_counted_while_disconnected_or_after_a_late_tick() -> None:
    async with rig() as it:
        it.outbox.open(generate())
        await it.outbox.tick(it.clock.now())
        it.hub.disconnect(it.bus)
        it.clock.time += 60.0
        assert it.outbox.orphans(it.clock.now()) == []
        it.hub.reconnect(it.bus)
        assert it.outbox.orphans(it.clock.now()) == []
        it.clock.time += 4.0
        await it.outbox.tick(it.clock.now())
        it.clock.time += 4.0
        assert it.outbox.orphans(it.clock.now()) == []
