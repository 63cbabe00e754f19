"""Bodies beyond 512 KiB, both ways, on both forms of the bus."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from skulk.bus.parcels import PARCEL_OVER_BYTES
from skulk.bus.port import Call
from skulk.bus.subjects import RUNNER_CANCEL, RUNNER_GENERATE, TRANSFER_PART
from skulk.bus.transport import PARCEL, Raw
from skulk.errors import RequestError, ServiceError, SkulkError, UnavailableError
from skulk.units import MIB
from skulk.wire.base import ErrorBody, decode, encode
from skulk.wire.generation import Accepted, Cancel, Cancelled, Generate, TextPrompt
from skulk.wire.transfer import Parcel, PartRequest
from tests.support.bus import BusWorld, Collector
from tests.support.messages import generate


async def accepted(call: Call[Generate]) -> Accepted:
    assert isinstance(call.message.prompt, TextPrompt)
    return Accepted(request_id=call.message.request_id, runner_id="r-1", prompt_tokens=len(call.message.prompt.text))


async def echo(call: Call[Cancel]) -> Cancelled:
    return Cancelled(request_id=call.message.request_id, was_running=True)


@pytest.mark.parametrize("size", [10, 511 * 1024, 513 * 1024, 3 * MIB + 7])
async def test_large_questions_and_answers_arrive_whole(world: BusWorld, size: int) -> None:
    asker, answerer = await world.bus("asker"), await world.bus("answerer")
    await answerer.serve("runner", {RUNNER_CANCEL: echo}, runner="r-1")
    text = ("0123456789abcdef" * (size // 16 + 1))[:size]
    answer = await asker.request(RUNNER_CANCEL, Cancel(request_id=text), timeout_s=20.0, runner="r-1")
    assert answer.request_id == text
    assert (asker.parcels.kept_bytes, answerer.parcels.kept_bytes) == (0, 0)
    assert (answerer.counters.requests > 0) == (size > PARCEL_OVER_BYTES)


async def test_where_messages_are_small_parcels_begin_earlier(small_world: BusWorld) -> None:
    asker, answerer = await small_world.bus("asker"), await small_world.bus("answerer")
    await answerer.serve("runner", {RUNNER_CANCEL: echo}, runner="r-1")
    for size in (61_000, 62_000, 65_536, 70_000, 400_000):
        answer = await asker.request(RUNNER_CANCEL, Cancel(request_id="x" * size), timeout_s=20.0, runner="r-1")
        assert len(answer.request_id) == size


async def test_every_listener_of_a_large_question_gets_all_of_it(world: BusWorld) -> None:
    """A request's parcel stays until the answer, however many fetch it."""
    asker = await world.bus("asker")
    heard: Collector[int] = Collector()
    both = asyncio.Event()

    async def handler(call: Call[Generate]) -> Accepted:
        answer = await accepted(call)
        heard(answer.prompt_tokens)
        if len(heard.items) == 2:
            both.set()
        await both.wait()
        return answer

    for name in ("one", "two"):
        bus = await world.bus(name)
        await bus.serve("runner", {RUNNER_GENERATE: handler}, runner="r-1")
    question = generate(text="x" * 1_500_000)
    answer = await asker.request(RUNNER_GENERATE, question, timeout_s=20.0, runner="r-1")
    assert answer.prompt_tokens == 1_500_000
    assert await heard.wait(2) == [1_500_000, 1_500_000]


async def test_over_the_limit_is_refused_with_both_numbers(world: BusWorld) -> None:
    asker = await world.bus("asker", parcels_limit_bytes=2 * MIB)
    small = await world.bus("small", parcels_limit_bytes=1 * MIB)
    await small.serve("runner", {RUNNER_CANCEL: echo}, runner="r-1")
    with pytest.raises(RequestError) as refused:
        await asker.request(RUNNER_CANCEL, Cancel(request_id="x" * 2 * MIB), timeout_s=5.0, runner="r-1")
    assert refused.value.code == "message_too_large"
    assert str(2 * MIB) in refused.value.detail
    with pytest.raises(RequestError) as refused_there:
        await asker.request(RUNNER_CANCEL, Cancel(request_id="x" * 1_500_000), timeout_s=5.0, runner="r-1")
    assert refused_there.value.code == "message_too_large"
    assert str(1 * MIB) in refused_there.value.detail
    assert (asker.parcels.kept_bytes, small.parcels.kept_bytes) == (0, 0)


async def test_what_waits_to_be_fetched_is_bounded(world: BusWorld) -> None:
    asker = await world.bus("asker", parcels_limit_bytes=2 * MIB)
    answerer = await world.bus("answerer")
    let_go = asyncio.Event()

    async def slow(call: Call[Cancel]) -> Cancelled:
        await let_go.wait()
        return Cancelled(request_id="", was_running=True)

    await answerer.serve("runner", {RUNNER_CANCEL: slow}, runner="r-1")
    question = Cancel(request_id="x" * 1_500_000)
    first = asyncio.create_task(asker.request(RUNNER_CANCEL, question, timeout_s=20.0, runner="r-1"))
    while answerer.counters.served < 1:
        await asker.flush()
    with pytest.raises(UnavailableError) as refused:
        await asker.request(RUNNER_CANCEL, question, timeout_s=20.0, runner="r-1")
    assert refused.value.code == "overloaded"
    let_go.set()
    await first
    assert asker.parcels.kept_bytes == 0
    await asker.request(RUNNER_CANCEL, question, timeout_s=20.0, runner="r-1")


async def parcel_of(bus_world: BusWorld, change: dict[str, Any]) -> SkulkError:
    """What comes of a question whose parcel isn't what it says."""
    asker, answerer = await bus_world.bus("asker"), await bus_world.bus("answerer")
    await answerer.serve("runner", {RUNNER_CANCEL: echo}, runner="r-1")
    packed = await asker.parcels.pack(encode(Cancel(request_id="x" * 600_000)), once=False)
    honest = decode(packed.body, Parcel)
    fields: dict[str, Any] = {name: getattr(honest, name) for name in honest.__struct_fields__}
    heard: Collector[Raw] = Collector()
    await asker.listen("answers.here", heard)
    await asker.settle()
    subject = RUNNER_CANCEL.subject(asker.cluster, runner="r-1")
    await asker.send(Raw(subject, encode(Parcel(**{**fields, **change})), "answers.here", {PARCEL: "1"}))
    (answer,) = await heard.wait(1)
    asker.parcels.release(packed.parcel_id)
    return decode_error(answer)


def decode_error(answer: Raw) -> SkulkError:
    return decode(answer.body, ErrorBody).to_error()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"sha256": "0" * 64}, "invalid_message"),
        ({"parcel_id": "another"}, "invalid_request"),
        ({"size_bytes": 1_000_000}, "invalid_request"),
        ({"size_bytes": 10**12}, "message_too_large"),
        ({"owner": "no.token"}, "invalid_request"),
        ({"owner": "nobody"}, "unreachable"),
    ],
)
async def test_a_parcel_that_is_not_what_it_says_is_refused(world: BusWorld, change: dict[str, Any], code: str) -> None:
    error = await parcel_of(world, change)
    assert error.code == code


async def test_parts_beyond_a_parcel_are_refused(world: BusWorld) -> None:
    owner, other = await world.bus("owner"), await world.bus("other")
    packed = await owner.parcels.pack(b"x" * 600_000, once=True)
    parcel = decode(packed.body, Parcel)
    for offset, length in ((-1, 10), (0, 0), (0, 600_001), (600_000, 1), (10, -5), (0, 600_000)):
        ask = PartRequest(parcel_id=parcel.parcel_id, offset=offset, length=length)
        with pytest.raises(RequestError) as refused:
            await other.request(TRANSFER_PART, ask, timeout_s=5.0, owner=parcel.owner)
        assert refused.value.code == "invalid_request"
    assert owner.parcels.kept_bytes == 600_000
    body = await other.parcels.unpack(Raw("s", packed.body, "", packed.headers), deadline=None)
    assert body == b"x" * 600_000
    assert owner.parcels.kept_bytes == 0
    with pytest.raises(RequestError):
        await other.parcels.unpack(Raw("s", packed.body, "", packed.headers), deadline=None)


async def test_a_fetch_ends_with_its_deadline(world: BusWorld) -> None:
    bus = await world.bus("one")

    async def silent(call: Call[PartRequest]) -> bytes:
        await asyncio.Event().wait()
        return b""

    await bus.serve("transfer", {TRANSFER_PART: silent}, owner="stuck")
    parcel = Parcel(owner="stuck", parcel_id="p", size_bytes=600_000, sha256="0" * 64)
    with pytest.raises(ServiceError) as refused:
        await bus.parcels.unpack(Raw("s", encode(parcel), "", {PARCEL: "1"}), deadline=bus.clock.now() + 0.1)
    assert refused.value.code == "deadline_exceeded"


@pytest.mark.parametrize("size", [-1, -(2**62)])
async def test_a_parcel_of_less_than_nothing_is_refused(world: BusWorld, size: int) -> None:
    bus = await world.bus("one")
    parcel = Parcel(owner="nobody", parcel_id="p", size_bytes=size, sha256="0" * 64)
    with pytest.raises(ServiceError) as refused:
        await bus.parcels.unpack(Raw("s", encode(parcel), "", {PARCEL: "1"}), deadline=None)
    assert refused.value.code == "invalid_message"
