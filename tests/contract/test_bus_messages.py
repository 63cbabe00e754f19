"""Publish and subscribe, on both forms of the bus."""

from __future__ import annotations

import pytest

from skulk.bus.memory_bus import MemoryBus
from skulk.bus.port import Received
from skulk.bus.subjects import GATEWAY_BEAT, NODE_BEAT, STREAM
from skulk.bus.transport import Raw, encoded_headers_size
from skulk.errors import RequestError, UnavailableError
from skulk.wire.beats import GatewayBeat
from skulk.wire.generation import Chunk
from tests.support.bus import BusWorld, Collector
from tests.support.messages import GATEWAY, REQUEST, chunk, gateway_beat


async def test_messages_come_typed_with_their_ids_and_in_order(world: BusWorld) -> None:
    speaker, listener = await world.bus("speaker"), await world.bus("listener")
    heard: Collector[Received[Chunk]] = Collector()
    await listener.subscribe(STREAM, heard, gateway=GATEWAY)
    for seq in range(2_000):
        await speaker.publish(STREAM, chunk(seq), gateway=GATEWAY, request=REQUEST, attempt="1")
    received = await heard.wait(2_000)
    assert [one.message.seq for one in received] == list(range(2_000))
    assert received[0].message == chunk(0)
    assert received[0].ids == {"cluster": world.cluster, "gateway": GATEWAY, "request": REQUEST, "attempt": "1"}
    assert received[0].subject == f"skulk.{world.cluster}.v1.stream.{GATEWAY}.{REQUEST}.1"
    assert speaker.counters.published == 2_000
    assert listener.counters.received == 2_000


async def test_only_what_the_ids_say_comes(world: BusWorld) -> None:
    bus = await world.bus("one")
    mine: Collector[Received[GatewayBeat]] = Collector()
    everybodys: Collector[Received[GatewayBeat]] = Collector()
    await bus.subscribe(GATEWAY_BEAT, mine, gateway="a")
    await bus.subscribe(GATEWAY_BEAT, everybodys)
    for name in ("a", "b", "a-b", "a"):
        await bus.publish(GATEWAY_BEAT, gateway_beat(gateway_id=name), gateway=name)
    assert [one.ids["gateway"] for one in await everybodys.wait(4)] == ["a", "b", "a-b", "a"]
    assert [one.ids["gateway"] for one in await mine.wait(2)] == ["a", "a"]
    assert len(mine.items) == 2


async def test_a_publisher_hears_itself_and_every_listener_hears_once(world: BusWorld) -> None:
    one, two = await world.bus("one"), await world.bus("two")
    heard_one: Collector[Received[GatewayBeat]] = Collector()
    heard_two: Collector[Received[GatewayBeat]] = Collector()
    await one.subscribe(GATEWAY_BEAT, heard_one)
    await two.subscribe(GATEWAY_BEAT, heard_two)
    for number in range(3):
        await one.publish(GATEWAY_BEAT, gateway_beat(number), gateway="g")
    for heard in (heard_one, heard_two):
        assert [beat.message.open_streams for beat in await heard.wait(3)] == [0, 1, 2]


async def test_clusters_do_not_hear_each_other(world: BusWorld) -> None:
    ours = await world.bus("ours")
    world.cluster += "x"
    theirs = await world.bus("theirs")
    heard: Collector[Received[GatewayBeat]] = Collector()
    heard_there: Collector[Received[GatewayBeat]] = Collector()
    await ours.subscribe(GATEWAY_BEAT, heard)
    await theirs.subscribe(GATEWAY_BEAT, heard_there)
    await theirs.publish(GATEWAY_BEAT, gateway_beat(1), gateway="g")
    await theirs.flush()
    await ours.publish(GATEWAY_BEAT, gateway_beat(2), gateway="g")
    assert [beat.message.open_streams for beat in await heard.wait(1)] == [2]
    assert [beat.message.open_streams for beat in await heard_there.wait(1)] == [1]


async def test_a_closed_subscription_hears_nothing_more(world: BusWorld) -> None:
    bus = await world.bus("one")
    ended: Collector[Received[GatewayBeat]] = Collector()
    goes_on: Collector[Received[GatewayBeat]] = Collector()
    subscription = await bus.subscribe(GATEWAY_BEAT, ended)
    await bus.subscribe(GATEWAY_BEAT, goes_on)
    await bus.publish(GATEWAY_BEAT, gateway_beat(1), gateway="g")
    await ended.wait(1)
    await subscription.close()
    await bus.publish(GATEWAY_BEAT, gateway_beat(2), gateway="g")
    await goes_on.wait(2)
    assert len(ended.items) == 1


async def test_what_cannot_be_read_is_counted_and_what_a_handler_throws_too(world: BusWorld) -> None:
    bus = await world.bus("one")
    heard: Collector[Received[GatewayBeat]] = Collector()

    def handler(received: Received[GatewayBeat]) -> None:
        if received.message.open_streams == 1:
            raise ValueError("a defect")
        heard(received)

    await bus.subscribe(GATEWAY_BEAT, handler)
    subject = GATEWAY_BEAT.subject(bus.cluster, gateway="g")
    await bus.send(Raw(subject, b"{not json"))
    await bus.send(Raw(subject, b'{"gateway_id": 7}'))
    await bus.send(Raw(subject, b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"))
    await bus.send(Raw(subject.removesuffix("g") + "G", b"{}"))
    for number in (1, 2):
        await bus.publish(GATEWAY_BEAT, gateway_beat(number), gateway="g")
    assert [one.message.open_streams for one in await heard.wait(1)] == [2]
    assert (bus.counters.undecodable, bus.counters.handler_errors) == (4, 1)


async def test_an_id_that_is_no_token_is_refused(world: BusWorld) -> None:
    bus = await world.bus("one")
    for bad in ("a.b", "A", "", "a b", "*", ">", "ä"):
        with pytest.raises(RequestError) as refused:
            await bus.publish(GATEWAY_BEAT, gateway_beat(), gateway=bad)
        assert (refused.value.code, refused.value.param) == ("invalid_request", "gateway")
        with pytest.raises(RequestError):
            await bus.subscribe(NODE_BEAT, print, node=bad)


async def test_a_message_of_exactly_the_limit_goes_and_one_byte_of_header_more_is_refused(world: BusWorld) -> None:
    """The limit counts headers as the server does: were ours lower the first would be refused, were it higher the
    server would end the connection."""
    bus = await world.bus("one")
    heard: Collector[Raw] = Collector()
    await bus.listen("raw.size", heard)
    await bus.settle()
    headers = {"Some": "header", "Another": "ü"}
    body = b"x" * (bus.max_payload - encoded_headers_size(headers))
    await bus.send(Raw("raw.size", body, "", headers))
    (whole,) = await heard.wait(1)
    assert (len(whole.body), dict(whole.headers)) == (len(body), headers)
    with pytest.raises(RequestError) as refused:
        await bus.send(Raw("raw.size", body, "", {**headers, "Some": "header."}))
    assert refused.value.code == "message_too_large"
    assert str(bus.max_payload) in refused.value.detail
    assert str(bus.max_payload + 1) in refused.value.detail
    await bus.flush()
    assert (bus.state, bus.counters.replaced_clients, len(heard.items)) == ("connected", 0, 1)


async def test_an_oversized_publish_is_refused_before_it_is_sent(small_world: BusWorld) -> None:
    bus = await small_world.bus("one")
    assert bus.max_payload == 65_536
    with pytest.raises(RequestError) as refused:
        await bus.publish(STREAM, chunk(0, "x" * 65_536), gateway=GATEWAY, request=REQUEST, attempt="1")
    assert refused.value.code == "message_too_large"
    await bus.flush()
    assert bus.state == "connected"


async def test_after_close_everything_is_refused(world: BusWorld) -> None:
    bus = await world.bus("one")
    states: list[str] = []
    bus.on_state(states.append)
    await bus.close()
    assert bus.state == "closed"
    assert states[-1] == "closed"
    with pytest.raises(UnavailableError) as refused:
        await bus.publish(GATEWAY_BEAT, gateway_beat(), gateway="g")
    assert refused.value.code == "bus_disconnected"
    with pytest.raises(UnavailableError):
        await bus.flush()


async def test_slow_subscriptions_drop_and_count(world: BusWorld) -> None:
    """A burst beyond a subscription's bound is cut; what was kept is the beginning, in order."""
    speaker = await world.bus("speaker")
    if world.kind == "memory":
        listener = await world.bus("listener")
        assert isinstance(listener, MemoryBus)
        listener.memory.hub.pending_limit = 16
    else:
        listener = await world.bus("listener", subscription_limit=16)
    heard: Collector[Received[GatewayBeat]] = Collector()
    await listener.subscribe(GATEWAY_BEAT, heard)
    for number in range(5_000):
        await speaker.publish(GATEWAY_BEAT, gateway_beat(number), gateway="g")
    await speaker.flush()
    await listener.flush()
    got = [one.message.open_streams for one in heard.items]
    assert got == sorted(got)
    assert got[:16] == list(range(16))
    assert listener.counters.dropped_slow == 5_000 - len(got) > 0
