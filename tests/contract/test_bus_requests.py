"""Questions and answers, on both forms of the bus."""

from __future__ import annotations

import asyncio

import pytest

from skulk.bus.port import Call
from skulk.bus.services import raise_error_answer
from skulk.bus.subjects import EVENTS_HISTORY, RUNNER_CANCEL, RUNNER_GENERATE, RUNNER_RESEND
from skulk.bus.transport import REMAINING_MS, Raw
from skulk.errors import RequestError, ServiceError, SkulkError, UnavailableError
from skulk.wire.base import encode
from skulk.wire.commands import History, HistoryRequest
from skulk.wire.generation import Accepted, Cancel, Cancelled, Generate, Resend
from tests.support.bus import BusWorld, Collector
from tests.support.messages import generate


async def cancelled(call: Call[Cancel]) -> Cancelled:
    return Cancelled(request_id=call.message.request_id, was_running=True)


async def accepted(call: Call[Generate]) -> Accepted:
    return Accepted(request_id=call.message.request_id, runner_id=call.ids["runner"], prompt_tokens=1)


async def test_a_question_is_answered_with_ids_and_deadline(world: BusWorld) -> None:
    asker, answerer = await world.bus("asker"), await world.bus("answerer")
    calls: list[Call[Cancel]] = []

    async def handler(call: Call[Cancel]) -> Cancelled:
        calls.append(call)
        return await cancelled(call)

    await answerer.serve("runner", {RUNNER_CANCEL: handler}, runner="r-1")
    before = answerer.clock.now()
    answer = await asker.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=5.0, runner="r-1")
    assert answer == Cancelled(request_id="q", was_running=True)
    (call,) = calls
    assert call.message == Cancel(request_id="q")
    assert call.ids == {"cluster": world.cluster, "runner": "r-1"}
    assert call.deadline is not None
    assert before + 4.0 < call.deadline <= answerer.clock.now() + 5.0
    assert (asker.counters.requests, answerer.counters.served) == (1, 1)


async def test_many_questions_at_once_find_their_own_answers(world: BusWorld) -> None:
    asker, answerer = await world.bus("asker"), await world.bus("answerer")
    await answerer.serve("runner", {RUNNER_CANCEL: cancelled}, max_calls=512, runner="r-1")
    answers = await asyncio.gather(
        *(
            asker.request(RUNNER_CANCEL, Cancel(request_id=f"q{number}"), timeout_s=20.0, runner="r-1")
            for number in range(300)
        )
    )
    assert [answer.request_id for answer in answers] == [f"q{number}" for number in range(300)]


@pytest.mark.parametrize(
    "error",
    [
        RequestError("model_not_found", "no model z: see GET /models", param="model"),
        UnavailableError("draining", "this node drains", retry_after_s=3.0),
        ServiceError("runner_failed", "it crashed:\r\nX-Evil: 1\n\tsecond line ü"),
    ],
)
async def test_what_a_handler_refuses_reaches_the_caller_whole(world: BusWorld, error: SkulkError) -> None:
    bus = await world.bus("one")

    async def refuse(call: Call[Cancel]) -> Cancelled:
        raise error

    await bus.serve("runner", {RUNNER_CANCEL: refuse}, runner="r-1")
    with pytest.raises(type(error)) as refused:
        await bus.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=5.0, runner="r-1")
    got = refused.value
    assert (got.code, got.detail, got.param, got.retry_after_s) == (
        error.code,
        error.detail,
        error.param,
        error.retry_after_s,
    )


async def test_a_defect_in_a_handler_is_internal_and_ends_nothing(
    world: BusWorld, caplog: pytest.LogCaptureFixture
) -> None:
    bus = await world.bus("one")

    async def fail(call: Call[Cancel]) -> Cancelled:
        if call.message.request_id == "bad":
            raise KeyError("secret")
        return await cancelled(call)

    await bus.serve("runner", {RUNNER_CANCEL: fail}, runner="r-1")
    with pytest.raises(ServiceError) as refused:
        await bus.request(RUNNER_CANCEL, Cancel(request_id="bad"), timeout_s=5.0, runner="r-1")
    assert refused.value.code == "internal"
    assert "secret" not in refused.value.detail
    assert "secret" in caplog.text
    answer = await bus.request(RUNNER_CANCEL, Cancel(request_id="good"), timeout_s=5.0, runner="r-1")
    assert answer.was_running


async def test_nobody_there_is_said_at_once(world: BusWorld) -> None:
    bus = await world.bus("one")
    with pytest.raises(UnavailableError) as refused:
        await bus.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=60.0, runner="nobody")
    assert refused.value.code == "unreachable"


async def test_a_service_that_closed_is_nobody(world: BusWorld) -> None:
    bus = await world.bus("one")
    service = await bus.serve("runner", {RUNNER_CANCEL: cancelled}, runner="r-1")
    await bus.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=5.0, runner="r-1")
    await service.close()
    await bus.flush()
    with pytest.raises(UnavailableError) as refused:
        await bus.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=60.0, runner="r-1")
    assert refused.value.code == "unreachable"


async def test_no_answer_in_time(world: BusWorld) -> None:
    bus = await world.bus("one")
    let_go = asyncio.Event()

    async def slow(call: Call[Cancel]) -> Cancelled:
        await let_go.wait()
        return await cancelled(call)

    service = await bus.serve("runner", {RUNNER_CANCEL: slow}, runner="r-1")
    for timeout_s in (0.05, 0.0, -1.0):
        with pytest.raises(ServiceError) as refused:
            await bus.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=timeout_s, runner="r-1")
        assert refused.value.code == "deadline_exceeded"
    let_go.set()
    await service.close()
    assert bus.state == "connected"


async def test_a_late_call_is_dropped_and_counted(world: BusWorld) -> None:
    bus = await world.bus("one")
    calls: Collector[str] = Collector()

    async def handler(call: Call[Cancel]) -> Cancelled:
        calls(call.message.request_id)
        return await cancelled(call)

    await bus.serve("runner", {RUNNER_CANCEL: handler}, runner="r-1")
    subject = RUNNER_CANCEL.subject(bus.cluster, runner="r-1")
    for name, remaining in (("late", "0"), ("later", "-250"), ("in-time", "5000"), ("silent", "")):
        headers = {REMAINING_MS: remaining} if remaining else {}
        await bus.send(Raw(subject, encode(Cancel(request_id=name)), "", headers))
    assert await calls.wait(2) == ["in-time", "silent"]
    assert bus.counters.refused_late == 2


async def test_an_unknown_noun_and_an_unreadable_question(world: BusWorld) -> None:
    bus = await world.bus("one")
    await bus.serve("runner", {RUNNER_CANCEL: cancelled}, runner="r-1")
    with pytest.raises(RequestError) as refused:
        await bus.request(RUNNER_RESEND, Resend(request_id="q", attempt=1, start=0), timeout_s=5.0, runner="r-1")
    assert refused.value.code == "route_not_found"
    heard: Collector[Raw] = Collector()
    await bus.listen("answers.here", heard)
    await bus.settle()
    await bus.send(Raw(RUNNER_CANCEL.subject(bus.cluster, runner="r-1"), b"[1, 2", "answers.here"))
    (answer,) = await heard.wait(1)
    assert answer.headers["Nats-Service-Error-Code"] == "40001"
    assert b'"invalid_request"' in answer.body


async def test_an_answer_that_cannot_be_read(world: BusWorld) -> None:
    asker, answerer = await world.bus("asker"), await world.bus("answerer")

    def answer(question: Raw) -> None:
        task = asyncio.ensure_future(answerer.send(Raw(question.reply, b'{"request_id": 1}')))
        tasks.append(task)

    tasks: list[asyncio.Future[None]] = []
    await answerer.listen(RUNNER_CANCEL.subject(world.cluster, runner="r-1"), answer)
    await answerer.settle()
    with pytest.raises(ServiceError) as refused:
        await asker.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=5.0, runner="r-1")
    assert refused.value.code == "invalid_message"
    await asyncio.gather(*tasks)


async def test_calls_begin_in_the_order_they_were_sent(world: BusWorld) -> None:
    """Generate and cancel come in on one subscription, and a small cancel doesn't overtake its large generate."""
    asker, answerer = await world.bus("asker"), await world.bus("answerer")
    begun: list[str] = []

    async def begin(call: Call[Generate]) -> Accepted:
        begun.append(f"generate {call.message.request_id}")
        return await accepted(call)

    async def stop(call: Call[Cancel]) -> Cancelled:
        begun.append(f"cancel {call.message.request_id}")
        return await cancelled(call)

    await answerer.serve("runner", {RUNNER_GENERATE: begin, RUNNER_CANCEL: stop}, runner="r-1")
    for number in range(6):
        text = "x" * (700_000 if number % 2 else 10)
        question, cancel = generate(f"q{number}", text=text), Cancel(request_id=f"q{number}")
        sent = [
            asyncio.create_task(asker.request(RUNNER_GENERATE, question, timeout_s=20.0, runner="r-1")),
            asyncio.create_task(asker.request(RUNNER_CANCEL, cancel, timeout_s=20.0, runner="r-1")),
        ]
        await asyncio.wait(sent)
    assert begun == [f"{noun} q{number}" for number in range(6) for noun in ("generate", "cancel")]


async def test_too_many_calls_at_once_are_refused(world: BusWorld) -> None:
    bus = await world.bus("one")
    let_go = asyncio.Event()

    async def slow(call: Call[Cancel]) -> Cancelled:
        await let_go.wait()
        return await cancelled(call)

    await bus.serve("runner", {RUNNER_CANCEL: slow}, max_calls=2, runner="r-1")
    ask = [
        asyncio.create_task(bus.request(RUNNER_CANCEL, Cancel(request_id=f"q{n}"), timeout_s=20.0, runner="r-1"))
        for n in range(3)
    ]
    done, running = await asyncio.wait(ask, return_when=asyncio.FIRST_COMPLETED)
    (refused,) = (task.exception() for task in done)
    assert isinstance(refused, UnavailableError)
    assert refused.code == "overloaded"
    let_go.set()
    assert len([await task for task in running]) == 2


async def test_a_closing_service_lets_running_calls_finish_and_cancels_those_that_do_not(world: BusWorld) -> None:
    bus = await world.bus("one")
    begun, let_go = asyncio.Event(), asyncio.Event()
    was_cancelled: list[str] = []

    async def slow(call: Call[Cancel]) -> Cancelled:
        begun.set()
        try:
            await let_go.wait()
        except asyncio.CancelledError:
            was_cancelled.append(call.message.request_id)
            raise
        return await cancelled(call)

    service = await bus.serve("runner", {RUNNER_CANCEL: slow}, runner="r-1")
    asking = asyncio.create_task(bus.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=20.0, runner="r-1"))
    await begun.wait()
    closing = asyncio.create_task(service.close(20.0))
    await asyncio.sleep(0)
    let_go.set()
    await closing
    assert (await asking).was_running
    begun.clear()
    let_go.clear()
    service = await bus.serve("runner", {RUNNER_CANCEL: slow}, runner="r-2")
    asking = asyncio.create_task(bus.request(RUNNER_CANCEL, Cancel(request_id="z"), timeout_s=0.5, runner="r-2"))
    await begun.wait()
    await service.close(0.0)
    assert was_cancelled == ["z"]
    with pytest.raises(ServiceError):
        await asking


async def test_a_queue_group_answers_once_and_others_all(world: BusWorld) -> None:
    asker = await world.bus("asker")
    histories: Collector[str] = Collector()
    cancels: Collector[str] = Collector()

    def history_of(name: str) -> object:
        async def history(call: Call[HistoryRequest]) -> History:
            histories(name)
            return History(node_id="n", events=())

        return history

    def cancel_of(name: str) -> object:
        async def cancel(call: Call[Cancel]) -> Cancelled:
            cancels(name)
            return await cancelled(call)

        return cancel

    for name in ("a", "b", "c"):
        bus = await world.bus(name)
        await bus.serve("events", {EVENTS_HISTORY: history_of(name)})  # type: ignore[dict-item]
        await bus.serve("runner", {RUNNER_CANCEL: cancel_of(name)}, runner="r-1")  # type: ignore[dict-item]
    for _ in range(30):
        await asker.request(EVENTS_HISTORY, HistoryRequest(), timeout_s=5.0)
    assert len(histories.items) == 30
    assert len(set(histories.items)) > 1
    await asker.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=5.0, runner="r-1")
    assert sorted(await cancels.wait(3)) == ["a", "b", "c"]


async def test_an_empty_question_from_a_person_is_an_empty_object(world: BusWorld) -> None:
    """``nats req … ''`` sends nothing; where every field has a default that is a question."""
    bus = await world.bus("one")

    async def history(call: Call[HistoryRequest]) -> History:
        return History(node_id="n", events=())

    await bus.serve("events", {EVENTS_HISTORY: history})
    heard: Collector[Raw] = Collector()
    await bus.listen("answers.here", heard)
    await bus.settle()
    await bus.send(Raw(EVENTS_HISTORY.subject(bus.cluster), b"", "answers.here"))
    (answer,) = await heard.wait(1)
    assert answer.body == encode(History(node_id="n", events=()))


@pytest.mark.parametrize("remaining", ["--5", "9" * 400, "9" * 4400, "\u0661", "soon", "-"])
async def test_an_unreadable_deadline_counts_as_none(world: BusWorld, remaining: str) -> None:
    bus = await world.bus("one")
    calls: Collector[float | None] = Collector()

    async def handler(call: Call[Cancel]) -> Cancelled:
        calls(call.deadline)
        return await cancelled(call)

    await bus.serve("runner", {RUNNER_CANCEL: handler}, runner="r-1")
    subject = RUNNER_CANCEL.subject(bus.cluster, runner="r-1")
    await bus.send(Raw(subject, encode(Cancel(request_id="q")), "", {REMAINING_MS: remaining}))
    assert await calls.wait(1) == [None]


async def test_a_question_nested_without_end_is_refused(world: BusWorld) -> None:
    bus = await world.bus("one")
    await bus.serve("runner", {RUNNER_CANCEL: cancelled}, runner="r-1")
    heard: Collector[Raw] = Collector()
    await bus.listen("answers", heard)
    subject = RUNNER_CANCEL.subject(bus.cluster, runner="r-1")
    await bus.settle()
    await bus.send(Raw(subject, b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "answers"))
    (answer,) = await heard.wait(1)
    with pytest.raises(RequestError) as refused:
        raise_error_answer(answer)
    assert refused.value.code == "invalid_request"
