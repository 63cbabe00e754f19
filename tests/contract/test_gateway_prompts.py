"""Several prompts in one completion request: their choices in order, one end, and never more at work than slots."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from skulk.bus.streams import StreamWriter
from skulk.clock import SystemClock
from skulk.errors import RequestError, UnavailableError
from skulk.gateway.keys import DISPATCHER
from skulk.gateway.prompts import Prompts
from skulk.gateway.run import Generation
from skulk.wire.base import ErrorBody
from skulk.wire.generation import Limits, Sampling, StreamEnd, TextPrompt, TokenPrompt
from tests.support.http import END, MODEL, WAIT_S, FakeRunner, Gateway, events_of, hold, running_gateway

SLOTS = 4
"""Of the scripted instance."""


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tmp_path) as running:
        yield running


async def named(_runner: FakeRunner, writer: StreamWriter) -> None:
    """Each choice says which prompt it goes on with."""
    prompt = writer.request.prompt
    name = prompt.text if isinstance(prompt, TextPrompt) else str(prompt)
    for choice in range(writer.request.n):
        writer.send(choice, f"{name}-", (1,))
        writer.send(choice, f"{choice}", (2,), finish_reason="stop")
    writer.end(END)


def body_of(*prompts: Any, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": list(prompts), **fields}


async def complete(gateway: Gateway, *prompts: Any, **fields: Any) -> Any:
    return await gateway.call("POST", "/v1/completions", body_of(*prompts, **fields))


def choices_of(body: bytes) -> list[dict[str, Any]]:
    return [choice for event in events_of(body) if isinstance(event, dict) for choice in event.get("choices", ())]


async def asked(runner: FakeRunner, count: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while len(runner.asked) < count:  # noqa: ASYNC110 - a list tells nobody
            await asyncio.sleep(0.005)


async def test_choices_come_in_the_order_of_their_prompts(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.script = named
    whole = (await complete(gateway, "a", "b", "c", n=2, echo=True, seed=3)).json
    assert [(one["index"], one["text"], one["finish_reason"]) for one in whole["choices"]] == [
        (0, "aa-0", "stop"),
        (1, "aa-1", "stop"),
        (2, "bb-0", "stop"),
        (3, "bb-1", "stop"),
        (4, "cc-0", "stop"),
        (5, "cc-1", "stop"),
    ]
    details = {"cached_tokens": 3}
    usage = {"prompt_tokens": 15, "completion_tokens": 6, "total_tokens": 21, "prompt_tokens_details": details}
    assert whole["usage"] == usage
    assert {one.sampling.seed for one in runner.asked} == {3}


async def test_a_stream_tells_them_side_by_side_and_ends_once(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.script = named
    answer = await complete(gateway, "a", [1, 2], "c", stream=True, stream_options={"include_usage": True})
    events = events_of(answer.body)
    assert len({event["id"] for event in events if isinstance(event, dict)}) == 1
    assert events[-1] == "[DONE]" and events.count("[DONE]") == 1
    assert events[-3]["usage"]["total_tokens"] == 21
    told = choices_of(answer.body)
    assert "".join(one["text"] for one in told if one["index"] == 0) == "a-0"
    assert "".join(one["text"] for one in told if one["index"] == 2) == "c-0"
    assert [one["index"] for one in told if one["finish_reason"] is not None].count(1) == 1
    assert [one.prompt for one in runner.asked].count(TokenPrompt(tokens=(1, 2))) == 1
    assert '"generation_tokens":6' in events[-2]


async def test_an_end_for_all_choices_is_that_of_each(gateway: Gateway) -> None:
    runner = await gateway.serve_model()

    async def cut(_runner: FakeRunner, writer: StreamWriter) -> None:
        writer.send(0, "x", (1,))
        writer.end(msgspec.structs.replace(END, reason="length"))

    runner.script = cut
    whole = (await complete(gateway, "a", "b", n=2)).json
    assert [(one["text"], one["finish_reason"]) for one in whole["choices"]] == [("x", "length"), ("", "length")] * 2


async def test_no_more_of_them_are_at_work_than_there_are_slots(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    let = asyncio.Semaphore(0)

    async def wait(_runner: FakeRunner, writer: StreamWriter) -> None:
        await let.acquire()
        await named(_runner, writer)

    runner.script = wait
    many = asyncio.create_task(complete(gateway, *map(str, range(3 * SLOTS))))
    await asked(runner, SLOTS)
    other = asyncio.create_task(gateway.chat())
    await asked(runner, SLOTS + 1)
    assert [one.part_of for one in runner.asked].count("") == 1, "who comes later passes what waits"
    assert gateway.app[DISPATCHER].queued == 0, "the others aren't in the queue, which is everybody's"
    for _ in range(3 * SLOTS + 1):
        let.release()
    async with asyncio.timeout(WAIT_S):
        assert (await other).status == 200
        whole = (await many).json
    assert [one["text"] for one in whole["choices"]] == [f"{index}-0" for index in range(3 * SLOTS)]


async def test_a_prompt_that_is_refused_refuses_the_request_and_ends_the_others(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.script = hold
    first = asyncio.create_task(complete(gateway, "a", "b", stream=True))
    runner.held_back = asyncio.Event()
    await asked(runner, 1)
    runner.refusal = RequestError("context_length_exceeded", "too long by 3 tokens", param="prompt")
    runner.held_back.set()
    answer = await first
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    await gateway.app[DISPATCHER].wait_idle()


async def test_one_that_fails_later_ends_the_stream_with_its_error_once(gateway: Gateway) -> None:
    runner = await gateway.serve_model()

    async def fail_b(held: FakeRunner, writer: StreamWriter) -> None:
        prompt = writer.request.prompt
        if isinstance(prompt, TextPrompt) and prompt.text == "b":
            writer.send(0, "b", (1,))
            writer.end(StreamEnd(reason="error", error=ErrorBody(code="context_length_exceeded", detail="no answer")))
            return
        await hold(held, writer)

    runner.script = fail_b
    events = events_of((await complete(gateway, "a", "b", "c", stream=True)).body)
    assert [event for event in events if isinstance(event, dict) and "error" in event] == [events[-1]]
    assert events[-1]["error"]["code"] == "context_length_exceeded" and "[DONE]" not in events
    async with asyncio.timeout(WAIT_S):
        await gateway.app[DISPATCHER].wait_idle()
        while len(runner.cancels) < 2:  # noqa: ASYNC110 - a list tells nobody
            await asyncio.sleep(0.005)
    whole = await complete(gateway, "b", "b")
    assert (whole.status, whole.error["code"]) == (400, "context_length_exceeded")


def held_until_let(runner: FakeRunner) -> asyncio.Event:
    """Has the runner answer nobody before the event is set, and then as `named` does."""
    let = asyncio.Event()

    async def wait(_runner: FakeRunner, writer: StreamWriter) -> None:
        await let.wait()
        await named(_runner, writer)

    runner.script = wait
    return let


async def test_one_id_cancels_them_all_and_begins_no_more(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.script = hold
    body = msgspec.json.encode(body_of(*map(str, range(2 * SLOTS)), stream=True))
    async with gateway.client.post("/v1/completions", data=body) as response, asyncio.timeout(WAIT_S):
        command_id = (await response.content.readline()).decode().split()[-1]
        await asked(runner, SLOTS)
        assert (await gateway.call("POST", f"/v1/cancel/{command_id}")).status == 200
        rest = events_of(b": x\n\n" + (await response.read()).removeprefix(b"\n"))
    assert rest[-1] == "[DONE]"
    ended = [one for event in rest if isinstance(event, dict) for one in event["choices"] if one["finish_reason"]]
    assert {(one["index"], one["finish_reason"]) for one in ended} == {(index, "stop") for index in range(2 * SLOTS)}
    assert len(ended) == 2 * SLOTS and len(runner.asked) == SLOTS
    assert {one.part_of for one in runner.asked} == {command_id}
    async with asyncio.timeout(WAIT_S):
        while len(runner.cancels) < SLOTS:  # noqa: ASYNC110 - a list tells nobody
            await asyncio.sleep(0.005)


async def test_one_id_cancels_them_while_none_is_at_a_runner(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    let = held_until_let(runner)
    body = msgspec.json.encode(body_of(*map(str, range(2 * SLOTS)), stream=True))
    async with gateway.client.post("/v1/completions", data=body) as response, asyncio.timeout(WAIT_S):
        command_id = (await response.content.readline()).decode().split()[-1]
        await gateway.set_phase("i1", "loading")
        gateway.waits.clear()
        let.set()
        await gateway.waits.wait()
        assert (await gateway.call("POST", f"/v1/cancel/{command_id}")).status == 200
        assert (await response.read()).endswith(b"data: [DONE]\n\n")
        await gateway.app[DISPATCHER].wait_idle()
    assert len(runner.asked) == SLOTS
    assert (await gateway.call("POST", f"/v1/cancel/{command_id}")).status == 404


async def test_who_was_let_in_is_not_refused_for_a_full_queue_later(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    let = held_until_let(runner)
    many = asyncio.create_task(complete(gateway, *map(str, range(3 * SLOTS))))
    await asked(runner, SLOTS)
    others = [asyncio.create_task(gateway.chat()) for _ in range(30)]
    async with asyncio.timeout(WAIT_S):
        done, _ = await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
        assert done.pop().result().status == 429
        let.set()
        whole = await many
        assert {(await other).status for other in others} == {200, 429}
    assert whole.status == 200
    assert [one["text"] for one in whole.json["choices"]] == [f"{index}-0" for index in range(3 * SLOTS)]


async def test_nothing_begins_after_the_end(gateway: Gateway) -> None:
    await gateway.serve_model()
    dispatcher, clock = gateway.app[DISPATCHER], SystemClock()
    generation = Generation(model_id=MODEL, prompt=TextPrompt(text="a"), sampling=Sampling(), limits=Limits())
    closed = Prompts(dispatcher, [generation] * 2, clock, clock.now() + WAIT_S)
    await closed.close()
    failed = Prompts(dispatcher, [generation] * 2, clock, clock.now() + WAIT_S)
    failed.stop(UnavailableError("draining", "ask another node"))
    for prompts in (closed, failed):
        prompts._fill()
        assert not prompts._tasks


async def test_a_client_that_goes_away_cancels_them_all(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.script = hold
    async with gateway.client.post(
        "/v1/completions", data=msgspec.json.encode(body_of("a", "b", "c", stream=True))
    ) as response:
        await response.content.readline()
        response.close()
    async with asyncio.timeout(WAIT_S):
        await gateway.app[DISPATCHER].wait_idle()
        while len(runner.cancels) < 3:  # noqa: ASYNC110 - a list tells nobody
            await asyncio.sleep(0.005)
    assert sorted(runner.cancels) == sorted(one.request_id for one in runner.asked)


async def test_one_whose_runner_dies_goes_on_elsewhere(gateway: Gateway) -> None:
    first = await gateway.serve_model("i1")
    first.script = hold
    many = asyncio.create_task(complete(gateway, "a", "b", stream=True))
    await asked(first, 2)
    second = await gateway.serve_model("i2")
    second.script = named
    await gateway.cluster.kill("i1")
    async with asyncio.timeout(WAIT_S):
        told = choices_of((await many).body)
    resumed = {one.part_of for one in second.asked if one.resume is not None}
    assert len(resumed) == 1 and len(second.asked) == 2
    for index, name in enumerate("ab"):
        assert "".join(one["text"] for one in told if one["index"] == index) == f"Hello{name}-0"


async def test_a_deadline_is_that_of_them_all(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.script = hold
    late = await gateway.call("POST", "/v1/completions", body_of("a", "b"), headers={"X-Request-Timeout": "0.2"})
    assert (late.status, late.error["code"]) == (504, "deadline_exceeded")
    await gateway.app[DISPATCHER].wait_idle()


async def test_a_gateway_that_stops_ends_them_with_its_reason(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.script = hold
    many = asyncio.create_task(complete(gateway, "a", "b", stream=True))
    await asked(runner, 2)
    async with asyncio.timeout(WAIT_S):
        while not gateway.app[DISPATCHER].open_runs:  # noqa: ASYNC110 - a number tells nobody
            await asyncio.sleep(0.005)
        gateway.app[DISPATCHER].stop_all(UnavailableError("draining", "ask another node", retry_after_s=5))
        answer = await many
    code = answer.error["code"] if answer.status != 200 else events_of(answer.body)[-1]["error"]["code"]
    assert code == "draining"


async def test_the_openai_client_reads_them(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.script = named
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        whole = await client.completions.create(model=MODEL, prompt=["a", "b"], n=2)
        assert [choice.text for choice in whole.choices] == ["a-0", "a-1", "b-0", "b-1"]
        stream = await client.completions.create(model=MODEL, prompt=["a", "b"], stream=True)
        texts = ["", ""]
        async for event in stream:
            for choice in event.choices:
                texts[choice.index] += choice.text
        assert texts == ["a-0", "b-0"]
