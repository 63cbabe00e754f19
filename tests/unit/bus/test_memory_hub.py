"""The broker in the process: routing, and what tests can do to it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.bus.memory_bus import MemoryBus, MemoryHub, subject_matches
from skulk.bus.port import Call, Received
from skulk.bus.subjects import GATEWAY_BEAT, RUNNER_CANCEL
from skulk.bus.transport import Raw
from skulk.errors import UnavailableError
from skulk.wire.beats import GatewayBeat
from skulk.wire.generation import Cancel, Cancelled
from tests.support.bus import Collector
from tests.support.messages import gateway_beat

TOKENS = st.lists(st.sampled_from("ab"), min_size=1, max_size=4)


@pytest.mark.parametrize(
    ("pattern", "subject", "matches"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.b.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a", True),
        ("*.b.>", "a.b.c", True),
        ("*.b.>", "a.c.c", False),
    ],
)
def test_subjects_match_as_in_nats(pattern: str, subject: str, *, matches: bool) -> None:
    assert subject_matches(pattern.split("."), subject.split(".")) is matches


@given(TOKENS, TOKENS)
def test_without_wildcards_matching_is_being_equal(pattern: list[str], tokens: list[str]) -> None:
    assert subject_matches(pattern, tokens) == (pattern == tokens)
    assert subject_matches(["*"] * len(tokens), tokens)
    assert subject_matches([">"], tokens)


async def cancelled(call: Call[Cancel]) -> Cancelled:
    return Cancelled(request_id=call.message.request_id, was_running=True)


async def heard_by(bus: MemoryBus) -> Collector[Received[GatewayBeat]]:
    collector: Collector[Received[GatewayBeat]] = Collector()
    await bus.subscribe(GATEWAY_BEAT, collector)
    return collector


def numbers(collector: Collector[Received[GatewayBeat]]) -> list[int]:
    return [one.message.open_streams for one in collector.items]


async def test_a_disconnected_bus_hears_and_says_nothing_and_has_its_subscriptions_back() -> None:
    hub = MemoryHub()
    one, two = MemoryBus(hub, name="one"), MemoryBus(hub, name="two")
    heard = await heard_by(one)
    await one.serve("runner", {RUNNER_CANCEL: cancelled}, runner="r-1")
    await two.publish(GATEWAY_BEAT, gateway_beat(1), gateway="g")
    hub.disconnect(one)
    await two.publish(GATEWAY_BEAT, gateway_beat(2), gateway="g")
    with pytest.raises(UnavailableError):
        await one.publish(GATEWAY_BEAT, gateway_beat(3), gateway="g")
    with pytest.raises(UnavailableError) as refused:
        await two.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=60.0, runner="r-1")
    assert refused.value.code == "unreachable"
    hub.reconnect(one)
    await two.publish(GATEWAY_BEAT, gateway_beat(4), gateway="g")
    await two.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=5.0, runner="r-1")
    assert numbers(heard) == [4]
    assert one.counters.reconnects == 1
    await one.close()
    await two.close()


async def test_a_request_under_way_fails_when_the_connection_breaks() -> None:
    hub = MemoryHub()
    one, two = MemoryBus(hub, name="one"), MemoryBus(hub, name="two")
    begun = asyncio.Event()

    async def never(call: Call[Cancel]) -> Cancelled:
        begun.set()
        await asyncio.Event().wait()
        return await cancelled(call)

    await two.serve("runner", {RUNNER_CANCEL: never}, runner="r-1")
    asking = asyncio.create_task(one.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=60.0, runner="r-1"))
    await begun.wait()
    hub.disconnect(one)
    with pytest.raises(UnavailableError) as refused:
        await asking
    assert refused.value.code == "bus_disconnected"
    await one.close()
    await two.close()


async def test_sides_of_a_split_do_not_know_each_other() -> None:
    hub = MemoryHub()
    one, two, three = (MemoryBus(hub, name=name) for name in ("one", "two", "three"))
    heard = [await heard_by(bus) for bus in (one, two, three)]
    await three.serve("runner", {RUNNER_CANCEL: cancelled}, runner="r-1")
    hub.split({"one", "two"})
    await one.publish(GATEWAY_BEAT, gateway_beat(1), gateway="g")
    with pytest.raises(UnavailableError):
        await one.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=60.0, runner="r-1")
    assert (one.state, three.state) == ("connected", "connected")
    hub.heal()
    await one.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=5.0, runner="r-1")
    await one.publish(GATEWAY_BEAT, gateway_beat(2), gateway="g")
    await one.flush()
    assert [numbers(collector) for collector in heard] == [[1, 2], [1, 2], [2]]
    for bus in (one, two, three):
        await bus.close()


async def test_messages_can_be_dropped_doubled_and_delayed() -> None:
    hub = MemoryHub()
    one, two = MemoryBus(hub, name="one"), MemoryBus(hub, name="two")
    heard = await heard_by(two)
    plans = iter([(), (0.0, 0.0), (0.05,), (0.0,)])
    seen: list[tuple[str, str, str]] = []

    def disturb(sender: str, receiver: str, message: Raw) -> tuple[float, ...]:
        if "beat" not in message.subject:
            return (0.0,)
        seen.append((sender, receiver, message.subject))
        return next(plans)

    hub.disturb = disturb
    for number in range(4):
        await one.publish(GATEWAY_BEAT, gateway_beat(number), gateway="g")
    await heard.wait(4)
    assert numbers(heard) == [1, 1, 3, 2]
    assert seen == [("one", "two", GATEWAY_BEAT.subject("home", gateway="g"))] * 4
    await one.close()
    await two.close()


async def test_a_delayed_message_does_not_survive_a_break() -> None:
    hub = MemoryHub()
    one, two = MemoryBus(hub, name="one"), MemoryBus(hub, name="two")
    heard = await heard_by(two)
    hub.disturb = lambda sender, receiver, message: (0.03,)
    await one.publish(GATEWAY_BEAT, gateway_beat(1), gateway="g")
    hub.disconnect(two)
    hub.reconnect(two)
    hub.disturb = lambda sender, receiver, message: (0.06,)
    await one.publish(GATEWAY_BEAT, gateway_beat(2), gateway="g")
    await heard.wait(1)
    assert numbers(heard) == [2]
    await one.close()
    await two.close()


async def test_one_receivers_defect_does_not_end_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    bus = MemoryBus(MemoryHub())

    def broken(message: Raw) -> None:
        raise ValueError("a defect")

    heard: Collector[Raw] = Collector()
    await bus.listen("raw", broken)
    await bus.listen("raw", heard)
    await bus.send(Raw("raw", b""))
    await bus.send(Raw("raw", b""))
    assert len(await heard.wait(2)) == 2
    assert bus.counters.client_errors == 2
    assert "a defect" in caplog.text
    await bus.close()


async def test_two_runs_are_the_same_run() -> None:
    async def run() -> list[tuple[str, bytes]]:
        hub = MemoryHub(seed=7)
        one, two = MemoryBus(hub, name="one"), MemoryBus(hub, name="two")
        log: list[tuple[str, bytes]] = []
        hub.disturb = lambda sender, receiver, message: log.append((message.subject, message.body)) or (0.0,)
        await two.serve("runner", {RUNNER_CANCEL: cancelled}, runner="r-1")
        for number in range(5):
            await one.request(RUNNER_CANCEL, Cancel(request_id=f"q{number}"), timeout_s=5.0, runner="r-1")
        await one.close()
        await two.close()
        return log

    assert await run() == await run()
