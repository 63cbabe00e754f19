"""Streams from an outbox to an inbox, on both forms of the bus."""

from __future__ import annotations

import asyncio
import random

import pytest

from skulk.bus.memory_bus import MemoryBus
from skulk.bus.transport import Raw
from skulk.errors import ServiceError
from skulk.wire.base import ErrorBody
from skulk.wire.generation import StreamEnd
from tests.support.bus import BusWorld, MemoryWorld
from tests.support.messages import RUNNER, generate, stopped, texts
from tests.support.streams import StreamPair, only_kept, read_all


async def pair_of(world: BusWorld) -> StreamPair:
    return StreamPair(await world.bus("runner"), await world.bus("gateway"))


async def test_a_stream_arrives_whole_and_ends_once(world: BusWorld) -> None:
    async with await pair_of(world) as pair:
        reader = pair.inbox.open(generate().request_id, 1, RUNNER)
        writer = pair.outbox.open(generate())
        words = [f"word{number} " for number in range(500)]
        for number, word in enumerate(words):
            writer.send(0, word, (number,))
        writer.end(stopped(), finish_reason="stop")
        chunks = await read_all(reader)
        assert texts(chunks) == "".join(words)
        assert [token for one in chunks for token in one.tokens] == list(range(500))
        assert [one.seq for one in chunks] == list(range(501))
        assert [one.end is not None for one in chunks].count(True) == 1
        await reader.close()


async def test_many_streams_at_once_stay_apart(world: BusWorld) -> None:
    async with await pair_of(world) as pair:
        names = [f"request-{number}" for number in range(50)]
        readers = [pair.inbox.open(name, 1, RUNNER) for name in names]
        writers = [pair.outbox.open(generate(name)) for name in names]
        for step in range(40):
            for writer in writers:
                writer.send(0, f"{writer.request.request_id}:{step} ", (step,))
            await asyncio.sleep(0)
        for writer in writers:
            writer.end(stopped())
        for name, chunks in zip(names, await asyncio.gather(*map(read_all, readers)), strict=True):
            assert texts(chunks) == "".join(f"{name}:{step} " for step in range(40))


async def test_ended_streams_are_confirmed_and_forgotten(world: BusWorld) -> None:
    async with await pair_of(world) as pair:
        names = [f"request-{number}" for number in range(20)]
        readers = [pair.inbox.open(name, 1, RUNNER) for name in names]
        for name in names:
            pair.outbox.open(generate(name)).end(stopped(), text=name)
        for reader in readers:
            await read_all(reader)
            await reader.close()
        await pair.confirmed.wait(len(names))
        assert not any(pair.outbox.knows(name, 1) for name in names)
        assert pair.inbox.counters.lost == 0


async def test_a_runner_that_dies_ends_its_streams_with_its_reason(world: BusWorld) -> None:
    async with await pair_of(world) as pair:
        reader = pair.inbox.open(generate().request_id, 1, RUNNER)
        writer = pair.outbox.open(generate())
        writer.send(0, "so far ", (1,))
        assert texts(await reader.take()) == "so far "
        pair.inbox.runner_died(RUNNER, ErrorBody(code="runner_failed", detail="ended by signal 9"))
        with pytest.raises(ServiceError) as failed:
            async with asyncio.timeout(10.0):
                await reader.take()
        assert failed.value.code == "runner_failed"


async def test_an_error_is_an_end_like_any_other(world: BusWorld) -> None:
    async with await pair_of(world) as pair:
        reader = pair.inbox.open(generate().request_id, 1, RUNNER)
        writer = pair.outbox.open(generate())
        failed = StreamEnd(reason="error", error=ErrorBody(code="context_length_exceeded", detail="9 of 8"))
        writer.end(failed)
        (last,) = await read_all(reader)
        assert last.end == failed


async def test_whatever_the_network_loses_doubles_or_delays_the_text_is_the_same() -> None:
    """Seeded: a fifth of the chunks lost (ends too), some twice, some late; alive and resend suffer as well."""
    for seed in range(5):
        chance = random.Random(seed)

        def disturb(sender: str, receiver: str, message: Raw, chance: random.Random = chance) -> tuple[float, ...]:
            if ".stream." not in message.subject and ".alive." not in message.subject:
                return (0.0,) if chance.random() < 0.9 else ()
            return chance.choice(((0.0,), (0.0,), (0.0,), (), (0.0, 0.0), (0.02,), (0.0, 0.05)))

        async with MemoryWorld() as world:
            runner, gateway = await world.bus("runner"), await world.bus("gateway")
            async with StreamPair(runner, gateway) as pair:
                world.hub.disturb = disturb
                names = [f"request-{number}" for number in range(8)]
                readers = [pair.inbox.open(name, 1, RUNNER) for name in names]
                writers = [pair.outbox.open(generate(name)) for name in names]
                for step in range(30):
                    for writer in writers:
                        writer.send(0, f"{step} ", (step,))
                    await asyncio.sleep(0.002)
                for writer in writers:
                    writer.end(stopped())
                for chunks in await asyncio.gather(*map(read_all, readers)):
                    assert texts(chunks) == "".join(f"{step} " for step in range(30)), f"seed {seed}"
                    assert [one.seq for one in chunks] == list(range(31)), f"seed {seed}"
                assert pair.inbox.counters.resends > 0
                world.hub.disturb = None


async def test_a_runner_that_was_cut_off_heals_its_streams() -> None:
    async with MemoryWorld() as world:
        runner, gateway = await world.bus("runner"), await world.bus("gateway")
        assert isinstance(runner, MemoryBus)
        async with StreamPair(runner, gateway) as pair:
            reader = pair.inbox.open(generate().request_id, 1, RUNNER)
            writer = pair.outbox.open(generate())
            writer.send(0, "before ", (1,))
            assert texts(await reader.take()) == "before "
            world.hub.disconnect(runner)
            writer.send(0, "while ", (2,))
            writer.end(stopped(), text="away")
            await only_kept(pair.outbox, 2)
            world.hub.reconnect(runner)
            chunks = await read_all(reader)
            assert texts(chunks) == "while away"
