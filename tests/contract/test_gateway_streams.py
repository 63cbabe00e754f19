"""Chat over real sockets: the bytes of a stream, its ends, and what cancels it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from skulk.bus.streams import StreamWriter
from skulk.errors import RequestError, UnavailableError
from skulk.gateway.app import INBOX
from skulk.gateway.keys import DISPATCHER, METRICS
from skulk.placement.prefixes import filter_of, prefix_of
from skulk.wire.base import ErrorBody
from skulk.wire.generation import ChatMessage, ChatPrompt, StreamEnd, TextPrompt
from tests.support.child_processes import no_process_left
from tests.support.failover import fake_runner, replicas
from tests.support.http import (
    END,
    MODEL,
    WAIT_S,
    FakeRunner,
    Gateway,
    chat_body,
    events_of,
    hold,
    running_gateway,
    spec,
    two_words,
)
from tests.support.nats import NatsServer


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tmp_path) as running:
        yield running


def golden(request_id: str, created: int) -> str:
    def event(choices: str, usage: str = "null") -> str:
        return (
            f'data: {{"id":"chatcmpl-{request_id}","object":"chat.completion.chunk","created":{created},'
            f'"model":"{MODEL}","choices":[{choices}],"usage":{usage}}}\n\n'
        )

    def choice(delta: str, finish: str = "null") -> str:
        return event(f'{{"index":0,"delta":{delta},"logprobs":null,"finish_reason":{finish}}}')

    return (
        f": command_id {request_id}\n\n"
        + choice('{"role":"assistant","content":""}')
        + choice('{"content":"Hello"}')
        + choice('{"content":" world"}')
        + choice("{}", '"stop"')
        + event(
            "",
            '{"prompt_tokens":5,"completion_tokens":2,"total_tokens":7,"prompt_tokens_details":{"cached_tokens":1}}',
        )
        + ': generation_stats {"prompt_tps":8.0,"generation_tps":8.0,"prompt_tokens":5,"generation_tokens":2,'
        '"peak_memory_usage":{"inBytes":0},"serving_batches":1,"in_flight_at_admission":0}\n\n'
        "data: [DONE]\n\n"
    )


async def test_a_stream_to_the_letter(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    answer = await gateway.chat(stream=True, stream_options={"include_usage": True})
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    request_id = runner.asked[0].request_id
    created = events_of(answer.body)[1]["created"]
    assert answer.body.decode() == golden(request_id, created)


async def test_without_the_option_no_event_has_usage(gateway: Gateway) -> None:
    await gateway.serve_model()
    events = events_of((await gateway.chat(stream=True)).body)
    assert not [event for event in events if isinstance(event, dict) and "usage" in event]
    assert events[-1] == "[DONE]"


async def test_a_whole_answer(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    answer = await gateway.chat(user="me", temperature=0, max_tokens=7, stop="\n", seed=3)
    assert answer.status == 200
    assert answer.headers["X-Skulk-Inert"] == "user"
    body = answer.json
    created = body.pop("created")
    assert body == {
        "id": f"chatcmpl-{runner.asked[0].request_id}",
        "object": "chat.completion",
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello world", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }
    assert created > 1_700_000_000
    asked = runner.asked[0]
    assert asked.prompt == ChatPrompt(messages=(ChatMessage(role="user", content="Name three rivers."),))
    assert (asked.sampling.temperature, asked.sampling.seed) == (0, 3)
    assert (asked.limits.max_tokens, asked.limits.stop) == (7, ("\n",))
    assert asked.timeout_s is not None
    assert 0 < asked.timeout_s <= 30


async def test_choices_begin_and_end_once_each(gateway: Gateway) -> None:
    await gateway.serve_model()
    events = [event for event in events_of((await gateway.chat(stream=True, n=3)).body) if isinstance(event, dict)]
    choices = [event["choices"][0] for event in events]
    for index in range(3):
        own = [choice for choice in choices if choice["index"] == index]
        assert [bool(choice["delta"].get("role")) for choice in own] == [True, False, False, False]
        assert [choice["finish_reason"] for choice in own] == [None, None, None, "stop"]
        assert "".join(choice["delta"].get("content", "") for choice in own) == "Hello world"
    whole = (await gateway.chat(n=3)).json
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["Hello world"] * 3


async def test_a_choice_that_never_spoke_still_ends(gateway: Gateway) -> None:
    runner = await gateway.serve_model()

    async def silent(_runner: FakeRunner, writer: StreamWriter) -> None:
        writer.end(StreamEnd(reason="length", usage=END.usage))

    runner.script = silent
    events = [event for event in events_of((await gateway.chat(stream=True)).body) if isinstance(event, dict)]
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, "length"]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


async def test_text_completions(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    whole = (await gateway.call("POST", "/v1/completions", {"model": MODEL, "prompt": "Once"})).json
    assert whole["object"] == "text_completion"
    assert whole["choices"] == [{"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}]
    assert whole["usage"]["total_tokens"] == 7
    assert runner.asked[0].prompt == TextPrompt(text="Once")
    assert runner.asked[0].limits.max_tokens == 16
    body = {"model": MODEL, "prompt": ["Once"], "stream": True, "stream_options": {"include_usage": True}}
    events = events_of((await gateway.call("POST", "/v1/completions", body)).body)
    texts = [event["choices"][0]["text"] for event in events if isinstance(event, dict) and event["choices"]]
    assert texts == ["Hello", " world"]
    assert events[-3]["usage"]["completion_tokens"] == 2
    assert events[-1] == "[DONE]"


@pytest.mark.parametrize(
    ("prompt", "echo"), [("Once", "Once"), ([5, 6], "<5><6>"), ([[5, 6]], "<5><6>")], ids=["text", "tokens", "nested"]
)
async def test_an_echo_begins_each_choice_with_the_prompt(gateway: Gateway, prompt: Any, echo: str) -> None:
    await gateway.serve_model()
    body = {"model": MODEL, "prompt": prompt, "echo": True, "n": 2}
    whole = (await gateway.call("POST", "/v1/completions", body)).json
    assert [choice["text"] for choice in whole["choices"]] == [f"{echo}Hello world"] * 2
    events = events_of((await gateway.call("POST", "/v1/completions", {**body, "stream": True})).body)
    choices = [event["choices"][0] for event in events if isinstance(event, dict)]
    for index in range(2):
        assert [one["text"] for one in choices if one["index"] == index] == [echo, "Hello", " world"]


async def test_an_echo_of_a_choice_that_never_spoke(gateway: Gateway) -> None:
    runner = await gateway.serve_model()

    async def say_nothing(_runner: FakeRunner, writer: StreamWriter) -> None:
        writer.end(END)

    runner.script = say_nothing
    body = {"model": MODEL, "prompt": "Once", "echo": True, "stream": True}
    events = events_of((await gateway.call("POST", "/v1/completions", body)).body)
    choices = [event["choices"][0] for event in events if isinstance(event, dict)]
    assert [(one["text"], one["finish_reason"]) for one in choices] == [("Once", None), ("", "stop")]


async def test_the_bench_call_tells_its_statistics(gateway: Gateway) -> None:
    await gateway.serve_model()
    body = (await gateway.call("POST", "/bench/chat/completions", chat_body(stream=False))).json
    assert body["generation_stats"]["generation_tps"] == 8.0
    refused = await gateway.call("POST", "/bench/chat/completions", chat_body(stream=True))
    assert (refused.status, refused.error["param"]) == (400, "stream")


async def test_a_refusal_has_its_true_status_also_for_a_stream(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.refusal = RequestError("context_length_exceeded", "5 + 90 tokens are over 64", param="max_tokens")
    for stream in (True, False):
        answer = await gateway.chat(stream=stream, max_tokens=90)
        assert answer.status == 400
        assert answer.error == {
            "message": "5 + 90 tokens are over 64",
            "type": "invalid_request_error",
            "param": "max_tokens",
            "code": "context_length_exceeded",
        }
    assert not runner.cancels


async def test_a_full_runner_is_429_with_retry_after_and_another_one_is_asked_first(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.refusal = UnavailableError("overloaded", "64 requests wait", retry_after_s=3)
    answer = await gateway.chat(stream=True)
    assert (answer.status, answer.headers["Retry-After"]) == (429, "3")
    assert answer.error["type"] == "rate_limit_error"
    other = await gateway.serve_model("i2", active=1)
    assert (await gateway.chat()).status == 200
    assert [ask.attempt for ask in other.asked] == [2]
    assert runner.asked[-1].request_id == other.asked[0].request_id
    first, second, third = *runner.asked, other.asked[0]
    assert second.sampling == third.sampling, (
        "an attempt draws as the one before it, with the seed that was chosen for it"
    )
    assert second.sampling.seed not in (None, first.sampling.seed)


async def test_keep_alives_come_while_nothing_else_does(tmp_path: Path) -> None:
    assert spec(tmp_path).keep_alive_s == 10.0, "unless told otherwise; clients give up after 120 s of silence"
    async with running_gateway(tmp_path, keep_alive_s=0.05) as gateway:
        runner = await gateway.serve_model()
        go_on = asyncio.Event()

        async def slow(_runner: FakeRunner, writer: StreamWriter) -> None:
            await go_on.wait()
            writer.send(0, "late", (1,), finish_reason="stop")
            writer.end(END)

        runner.script = slow
        async with gateway.open_chat() as response, asyncio.timeout(WAIT_S):
            assert (
                await response.content.readuntil(b"\n\n") == f": command_id {runner.asked[0].request_id}\n\n".encode()
            )
            for _ in range(3):
                assert await response.content.readuntil(b"\n\n") == b": keep-alive\n\n"
            go_on.set()
            rest = events_of(await response.read())
        spoken = [event for event in rest if isinstance(event, dict)]
        assert [event["choices"][0]["delta"].get("content") for event in spoken] == ["", "late", None]


async def test_an_error_in_the_stream_is_an_event_and_no_done(gateway: Gateway) -> None:
    runner = await gateway.serve_model()

    async def fail(_runner: FakeRunner, writer: StreamWriter) -> None:
        writer.send(0, "Hello", (1,))
        writer.end(StreamEnd(reason="error", error=ErrorBody(code="runner_failed", detail="out of memory")))

    runner.script = fail
    events = events_of((await gateway.chat(stream=True)).body)
    assert events[-1] == {
        "error": {"message": "out of memory", "type": "server_error", "param": None, "code": "runner_failed"}
    }
    assert "[DONE]" not in events
    assert events[-2]["choices"][0]["delta"] == {"content": "Hello"}
    assert gateway.app[METRICS].stream_errors["runner_failed"] == 1
    whole = await gateway.chat(max_tokens=9)
    assert (whole.status, whole.error["code"]) == (502, "runner_failed")


async def test_a_runner_that_dies_ends_its_streams_with_an_error_object(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.script = hold
    async with gateway.open_chat() as response, asyncio.timeout(WAIT_S):
        await _first_text(response)
        whole = asyncio.create_task(gateway.chat())
        await _asked(runner, 2)
        await gateway.cluster.kill("i1")
        events = events_of(await response.read())
        assert events[-1]["error"]["code"] == "runner_failed"
        assert "killed by signal 9" in events[-1]["error"]["message"]
        refused = await whole
    assert (refused.status, refused.error["code"]) == (502, "runner_failed")


async def test_a_runner_that_came_back_before_anybody_looked_goes_on_in_its_next_life(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.script = hold
    async with gateway.open_chat() as response, asyncio.timeout(WAIT_S):
        await _first_text(response)
        runner.script = two_words
        await gateway.cluster.set_phase("i1", "ready", restarts=1)
        assert events_of(await response.read())[-1] == "[DONE]"
    assert [asked.resume is not None for asked in runner.asked] == [False, True]


async def test_a_silent_runner_ends_its_streams_too(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.script = hold
    async with gateway.open_chat() as response, asyncio.timeout(WAIT_S):
        await _first_text(response)
        await runner.die()
        assert events_of(await response.read())[-1]["error"]["code"] == "stream_lost"


async def test_a_runner_that_dies_while_it_is_asked(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.held_back = asyncio.Event()
    answer = asyncio.create_task(gateway.chat())
    await _asked(runner, 1)
    await gateway.cluster.kill("i1")
    refused = await answer
    assert (refused.status, refused.error["code"]) == (502, "runner_failed")
    assert "killed by signal 9" in refused.error["message"]


async def test_a_client_that_goes_away_cancels(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.script = hold
    async with gateway.open_chat() as response:
        await _first_text(response)
        response.close()
    async with asyncio.timeout(WAIT_S):
        await runner.cancelled.wait()
        await gateway.app[DISPATCHER].wait_idle()
    assert runner.cancels == [runner.asked[0].request_id]


async def test_a_client_that_goes_away_before_the_answer_cancels(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.held_back = asyncio.Event()
    waiting = asyncio.create_task(gateway.chat())
    await _asked(runner, 1)
    waiting.cancel()
    async with asyncio.timeout(WAIT_S):
        await runner.cancelled.wait()
        await gateway.app[DISPATCHER].wait_idle()


async def test_cancel_by_id(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.script = hold
    async with gateway.open_chat() as response, asyncio.timeout(WAIT_S):
        command_id = await _first_text(response)
        answer = await gateway.call("POST", f"/v1/cancel/{command_id}")
        assert (answer.status, answer.json["command_id"]) == (200, command_id)
        events = events_of(await response.read())
    assert events[-1] == "[DONE]"
    assert [event["choices"][0]["finish_reason"] for event in events if isinstance(event, dict)][-1] == "stop"
    unknown = await gateway.call("POST", "/v1/cancel/nothing")
    assert (unknown.status, unknown.error["code"]) == (404, "command_not_found")


async def test_cancel_of_another_gateways_generation(gateway: Gateway, tmp_path: Path) -> None:
    runner = await gateway.serve_model()
    runner.asked.append(msgspec.convert({"request_id": "elsewhere"}, _Named))  # type: ignore[arg-type]
    answer = await gateway.call("POST", "/v1/cancel/elsewhere")
    assert answer.status == 200
    assert runner.cancels == ["elsewhere"]


async def test_the_requests_own_deadline(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.script = hold
    body = msgspec.json.encode(chat_body())
    async with gateway.client.post("/v1/chat/completions", data=body, headers={"X-Request-Timeout": "0.2"}) as response:
        assert response.status == 504
        assert (await response.json())["error"]["code"] == "deadline_exceeded"
    async with asyncio.timeout(WAIT_S):
        await runner.cancelled.wait()
    wrong = await gateway.call("POST", "/v1/chat/completions", chat_body(), headers={"X-Request-Timeout": "nan"})
    assert (wrong.status, wrong.error["param"]) == (400, "X-Request-Timeout")


async def test_chunks_that_are_ready_together_are_one_write(gateway: Gateway, monkeypatch: Any) -> None:
    writes: list[bytes] = []
    write = web.StreamResponse.write

    async def counted(self: Any, body: Any) -> None:
        writes.append(bytes(body))
        await write(self, body)

    monkeypatch.setattr(web.StreamResponse, "write", counted)
    runner = await gateway.serve_model()

    async def burst(_runner: FakeRunner, writer: StreamWriter) -> None:
        for number in range(50):
            writer.send(0, f"{number} ", (number,))
        writer.end(END)

    runner.script = burst
    events = events_of((await gateway.chat(stream=True)).body)
    assert sum("content" in event["choices"][0]["delta"] for event in events if isinstance(event, dict)) == 51
    assert len(writes) <= 4, "command id, the burst (in at most two parts), the tail"


async def test_a_client_that_reads_nothing_is_given_up_and_memory_stays_bounded(
    gateway: Gateway, monkeypatch: Any
) -> None:
    monkeypatch.setattr("skulk.gateway.generations.STALLED_S", 0.3)
    monkeypatch.setattr("skulk.gateway.generations.LAST_WORD_S", 0.1)
    runner = await gateway.serve_model()

    async def flood(_runner: FakeRunner, writer: StreamWriter) -> None:
        for _ in range(200_000):
            if runner.cancelled.is_set():
                return
            writer.send(0, "x" * 1000, (1,))
            await asyncio.sleep(0)

    runner.script = flood
    body = msgspec.json.encode(chat_body(stream=True))
    reader, writer = await asyncio.open_connection(*gateway.address, limit=1024)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    async with asyncio.timeout(WAIT_S):
        await runner.cancelled.wait()
        await gateway.app[DISPATCHER].wait_idle()
    assert gateway.app[METRICS].stream_errors["stream_lost"] == 1
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    del reader


class _Named(msgspec.Struct):
    request_id: str
    part_of: str = ""


async def _first_text(response: aiohttp.ClientResponse) -> str:
    """Reads up to the first text of a stream; returns its command id."""
    command = await response.content.readuntil(b"\n\n")
    await response.content.readuntil(b'"Hello"')
    await response.content.readuntil(b"\n\n")
    return command.decode().removeprefix(": command_id ").strip()


async def _asked(runner: FakeRunner, count: int) -> None:
    async with asyncio.timeout(WAIT_S):
        while len(runner.asked) < count:
            runner.asked_once.clear()
            await runner.asked_once.wait()


async def test_a_slow_reader_gets_all_of_the_text_in_fewer_events(gateway: Gateway) -> None:
    """What it doesn't take is joined meanwhile: nothing is lost, and nothing grows but the text itself."""
    runner = await gateway.serve_model()
    words = [f"{number} " for number in range(20_000)]
    pause = asyncio.Event()

    async def fast(_runner: FakeRunner, writer: StreamWriter) -> None:
        writer.send(0, "Hello", (1,))
        await pause.wait()
        for number, word in enumerate(words):
            writer.send(0, word, (number,))
            if number % 500 == 0:
                await asyncio.sleep(0)
        writer.end(END)

    runner.script = fast
    body = msgspec.json.encode(chat_body(stream=True))
    reader, writer = await asyncio.open_connection(*gateway.address, limit=1024)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}"
    writer.write(head.encode() + b"\r\n\r\n" + body)
    async with asyncio.timeout(WAIT_S):
        await reader.readuntil(b'"Hello"')
        pause.set()
        # this side takes nothing until all has come to the gateway
        while not gateway.app[INBOX].counters.chunks > len(words):  # noqa: ASYNC110 - a counter tells nobody
            await asyncio.sleep(0.01)
        rest = await reader.read(-1)
    writer.close()
    text = b"".join(part.partition(b'"')[0] for part in rest.split(b'"content":"')[1:])
    assert text.decode() == "".join(words)
    assert b"[DONE]" in rest
    assert rest.count(b'"content":"') < len(words)


async def test_long_prompts_cross_the_bus_whatever_its_limit_is(tmp_path: Path) -> None:
    """A prompt of 200 KB, and its token ids on the way back, over messages of at most 64 KiB."""
    with no_process_left(), NatsServer("max_payload: 65536\n") as server:
        async with replicas(tmp_path, server.url) as world:
            size = {"context_length": 400_000, "kv_cells": 400_000, "n_parallel": 1}
            await world.serve("a", fake_runner(tmp_path, "a", server.url, **size))
            long = [{"role": "user", "content": "x" * 200_000}]
            whole = await world.whole(messages=long, temperature=0, max_tokens=100)
            assert len(world.runs[-1].prompt_ids) > 200_000
            assert len(whole.texts()[0].encode()) == 60


async def test_who_waits_for_a_runners_slot_hears_keep_alives_until_it_is_free(tmp_path: Path) -> None:
    """A runner process with one slot, which another answer has taken."""
    with no_process_left(), NatsServer() as server:
        async with replicas(tmp_path, server.url, keep_alive_s=0.05) as world:
            size: dict[str, Any] = {
                "n_parallel": 1,
                "answer_tokens": 100_000,
                "step_s": 0.01,
                "context_length": 100_000,
            }
            await world.serve("a", fake_runner(tmp_path, "a", server.url, kv_cells=100_000, **size))
            async with world.open() as (first, heard), asyncio.timeout(WAIT_S):
                while not heard.texts():
                    heard.body += await first.content.readany()
                async with world.open(max_tokens=3) as (second, waiting):
                    while waiting.events.count(": keep-alive") < 3:
                        waiting.body += await second.content.readany()
                    assert waiting.texts() == {}, "accepted, and in the runner's queue"
                    first.close()
                    waiting.body += await second.read()
            assert waiting.is_whole and waiting.texts()[0]


async def test_the_replica_that_has_the_conversation_is_asked(gateway: Gateway) -> None:
    """Three replicas, one of which tells that it has computed this beginning; it is the busier one."""
    told = [{"role": "user", "content": "Name three rivers, and what lies on their banks. " * 40}]
    runners = [await gateway.serve_model(f"i{number}") for number in (1, 2, 3)]
    assert (await gateway.chat(messages=told)).status == 200
    (first,) = [runner for runner in runners if runner.asked]
    marks = prefix_of(first.asked[0].prompt).marks
    chosen = next(name for name, runner in zip(("i1", "i2", "i3"), runners, strict=True) if runner is not first)
    await gateway.set_phase(chosen, "ready", active=1, prefixes=filter_of(mark.digest for mark in marks))
    await gateway.sees(lambda view: any(status.prefixes for status in view.runners.values()))
    longer = [*told, {"role": "assistant", "content": "The Rhine."}, {"role": "user", "content": "Go on."}]
    for _ in range(5):
        assert (await gateway.chat(messages=longer)).status == 200
    asked = {name: len(runner.asked) for name, runner in zip(("i1", "i2", "i3"), runners, strict=True)}
    assert asked[chosen] == 5
