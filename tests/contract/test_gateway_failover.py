"""What becomes of a generation whose runner is lost: every way on, and every end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from skulk.bus.streams import StreamWriter
from skulk.gateway.keys import DISPATCHER
from skulk.wire.base import ErrorBody
from skulk.wire.generation import Resume, StreamEnd
from tests.support.http import END, WAIT_S, FakeRunner, Gateway, events_of, hold, running_gateway


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tmp_path) as running:
        yield running


async def the_rest(_runner: FakeRunner, writer: StreamWriter) -> None:
    """Goes on after "Hello" where it is resumed, else says all."""
    resume = writer.request.resume
    if resume is None or not resume.sent_characters:
        writer.send(0, "Hello", (1,))
    writer.send(0, " world", (2,), finish_reason="stop")
    writer.end(END)


async def silent(runner: FakeRunner, _writer: StreamWriter) -> None:
    """Accepts and says nothing."""
    await runner.cancelled.wait()


async def two_replicas(gateway: Gateway) -> tuple[FakeRunner, FakeRunner]:
    """The first is asked first, and holds after "Hello"."""
    first = await gateway.serve_model("i1")
    second = await gateway.serve_model("i2", active=1)
    first.script, second.script = hold, the_rest
    return first, second


async def text_after(gateway: Gateway, loss: Any) -> list[Any]:
    """The events of a stream whose runner is lost after its first word."""
    async with gateway.open_chat() as response, asyncio.timeout(WAIT_S):
        head = await response.content.readuntil(b'"Hello"')
        await loss()
        return events_of(head + await response.read())


def content(events: list[Any]) -> str:
    choices = [choice for event in events if isinstance(event, dict) for choice in event.get("choices", [])]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


@pytest.mark.parametrize("loss", ["killed", "deleted", "stopped", "silent", "forgotten", "came back"])
async def test_whatever_takes_the_runner_the_stream_goes_on_elsewhere(gateway: Gateway, loss: str) -> None:
    first, second = await two_replicas(gateway)

    async def lose() -> None:
        match loss:
            case "killed":
                await gateway.cluster.kill("i1")
            case "deleted":
                await gateway.call("DELETE", "/instance/i1")
                await gateway.cluster.set_gone("i1-1")
            case "silent":
                await first.die()
            case "came back":
                await first.die()
                await gateway.cluster.set_phase("i1", "ready", restarts=1)
            case _:
                error = ErrorBody(code="draining" if loss == "stopped" else "stream_lost", detail="it is stopped")
                first.writers[-1].end(StreamEnd(reason="error", error=error))

    events = await text_after(gateway, lose)
    assert content(events) == "Hello world"
    assert events[-1] == "[DONE]"
    (asked,) = second.asked
    # one that came back is asked first, in its new life
    assert (asked.attempt, asked.request_id) == (3 if loss == "came back" else 2, first.asked[0].request_id)
    assert asked.resume == Resume(prompt_tokens=(7, 8, 9), emitted_tokens=(1,), sent_characters=5)
    assert gateway.app[DISPATCHER].failovers == {"resumed": 1}
    metrics = (await gateway.call("GET", "/metrics")).body.decode()
    assert 'skulk_failovers_total{outcome="resumed"} 1' in metrics


async def test_a_deleted_instance_without_a_replica_ends_the_stream_with_an_error(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.script = hold

    async def delete() -> None:
        await gateway.call("DELETE", "/instance/i1")
        await gateway.cluster.set_gone("i1-1")

    events = await text_after(gateway, delete)
    assert events[-1]["error"]["code"] == "runner_failed"


async def test_turned_off_nothing_is_resumed(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, failover=False) as gateway:
        _, second = await two_replicas(gateway)
        events = await text_after(gateway, lambda: gateway.cluster.kill("i1"))
        assert events[-1]["error"]["code"] == "runner_failed"
        assert second.asked == []


async def test_other_weights_go_on_with_nobodys_answer(gateway: Gateway) -> None:
    first = await gateway.serve_model("i1")
    other = await gateway.serve_model("i2", size_bytes=5, active=1)
    first.script = hold
    events = await text_after(gateway, lambda: gateway.cluster.kill("i1"))
    assert events[-1]["error"]["code"] == "runner_failed"
    assert other.asked == []


async def test_with_nothing_sent_a_stream_waits_for_the_next_placement(gateway: Gateway) -> None:
    first = await gateway.serve_model("i1")
    first.script = silent
    async with gateway.open_chat() as response, asyncio.timeout(WAIT_S):
        await response.content.readuntil(b"\n\n")
        gateway.waits.clear()
        await first.die()
        await gateway.set_phase("i1", "loading", restarts=1)
        await gateway.waits.wait()
        second = await gateway.serve_model("i2")
        second.script = the_rest
        events = events_of(await response.read())
    assert content(events) == "Hello world"
    assert second.asked[0].resume == Resume(prompt_tokens=(7, 8, 9), emitted_tokens=(), sent_characters=0)


async def test_a_whole_answer_was_not_sent_and_waits_too(gateway: Gateway) -> None:
    first = await gateway.serve_model("i1")
    first.script = hold
    answer = asyncio.create_task(gateway.chat())
    async with asyncio.timeout(WAIT_S):
        await first.asked_once.wait()
        run = next(iter(gateway.app[DISPATCHER]._runs.values()))
        while run.progress.is_empty:  # noqa: ASYNC110 - what a handler has read tells nobody
            await asyncio.sleep(0.01)
        gateway.waits.clear()
        await first.die()
        await gateway.set_phase("i1", "loading", restarts=1)
        await gateway.waits.wait()
        second = await gateway.serve_model("i2")
        second.script = the_rest
        assert (await answer).json["choices"][0]["message"]["content"] == "Hello world"


async def test_a_third_loss_is_the_last(gateway: Gateway) -> None:
    runners = [await gateway.serve_model(f"i{number}") for number in range(1, 5)]
    for runner in runners:
        runner.script = stop_soon
    events = events_of((await gateway.chat(stream=True)).body)
    assert events[-1]["error"]["code"] == "draining"
    assert sorted(len(runner.asked) for runner in runners) == [0, 1, 1, 1]
    assert content(events) == "Hello" * 3


async def stop_soon(_runner: FakeRunner, writer: StreamWriter) -> None:
    writer.send(0, "Hello", (1,))
    writer.end(StreamEnd(reason="error", error=ErrorBody(code="draining", detail="it is stopped")))


async def test_a_request_that_crashed_two_runners_is_refused_and_others_are_not(gateway: Gateway) -> None:
    first, second = await two_replicas(gateway)
    second.script = hold
    async with gateway.open_chat() as response, asyncio.timeout(WAIT_S):
        await response.content.readuntil(b'"Hello"')
        await gateway.cluster.kill("i1")
        await second.asked_once.wait()
        await response.content.readuntil(b'"Hello"')
        third = await gateway.serve_model("i3")
        await gateway.cluster.kill("i2")
        assert b'"code":"request_crashed_runner"' in await response.read()
    refused = await gateway.chat()
    assert (refused.status, refused.error["code"]) == (400, "request_crashed_runner")
    assert third.asked == []
    assert (await gateway.chat(max_tokens=3)).status == 200
    assert first.asked[0].request_id == second.asked[0].request_id


async def test_cancelled_by_its_id_between_two_runners(gateway: Gateway) -> None:
    first = await gateway.serve_model("i1")
    first.script = silent
    async with gateway.open_chat() as response, asyncio.timeout(WAIT_S):
        command = (await response.content.readuntil(b"\n\n")).decode().removeprefix(": command_id ").strip()
        gateway.waits.clear()
        await first.die()
        await gateway.set_phase("i1", "loading", restarts=1)
        await gateway.waits.wait()
        assert (await gateway.call("POST", f"/v1/cancel/{command}")).status == 200
        assert events_of(await response.read())[-1] == "[DONE]"
