"""Who comes first over HTTP: keys share a model's slots, batch work waits, a full queue refuses and says when."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from skulk.bus.streams import StreamWriter
from skulk.gateway.keys import DISPATCHER
from skulk.gateway.queues import WAITING_A_SLOT, window_of
from skulk.wire.generation import ChatPrompt
from tests.support.http import END, WAIT_S, Answer, FakeRunner, Gateway, chat_body, running_gateway

ANNA, BEN = {"Authorization": "Bearer k1"}, {"Authorization": "Bearer k2"}


class Crowd:
    """A runner that answers one request each time it is let, and the requests that were sent."""

    def __init__(self, gateway: Gateway, runner: FakeRunner) -> None:
        self.gateway = gateway
        self.runner = runner
        self.window = window_of(tuple(gateway.view.state.instances.values()))
        self.sent: dict[str, asyncio.Task[Answer]] = {}
        self._let = asyncio.Semaphore(0)
        runner.script = self._answer

    async def _answer(self, _runner: FakeRunner, writer: StreamWriter) -> None:
        await self._let.acquire()
        writer.send(0, "Hello", (1,), finish_reason="stop")
        writer.end(END)

    async def send(self, name: str, **headers: str) -> None:
        """Sends a request and returns when the gateway has it: at the runner, or in its queue."""
        before = self.known
        body = chat_body(messages=[{"role": "user", "content": name}])
        call = self.gateway.call("POST", "/v1/chat/completions", body, headers=headers)
        self.sent[name] = asyncio.create_task(call)
        async with asyncio.timeout(WAIT_S):
            while self.known == before:  # noqa: ASYNC110 - a queue tells nobody
                await asyncio.sleep(0.005)

    @property
    def known(self) -> int:
        """How many the gateway has or has answered."""
        answered = sum(task.done() for task in self.sent.values())
        return len(self.runner.asked) + self.gateway.app[DISPATCHER].queued + answered

    def asked(self) -> list[str]:
        """The requests that have come to the runner, in their order."""
        prompts = [asked.prompt for asked in self.runner.asked]
        return [str(prompt.messages[0].content) for prompt in prompts if isinstance(prompt, ChatPrompt)]

    async def let(self, count: int) -> None:
        """Lets so many answers come, and waits until as many others have come to the runner."""
        wanted = len(self.runner.asked) + count
        for _ in range(count):
            self._let.release()
        async with asyncio.timeout(WAIT_S):
            while len(self.runner.asked) < wanted:  # noqa: ASYNC110 - a list tells nobody
                await asyncio.sleep(0.005)

    async def finish(self) -> dict[str, int]:
        """Lets all of it come; each one's status."""
        for _ in self.sent:
            self._let.release()
        async with asyncio.timeout(WAIT_S):
            return {name: (await task).status for name, task in self.sent.items()}


@pytest.fixture
async def crowd(tmp_path: Path) -> AsyncIterator[Crowd]:
    async with running_gateway(tmp_path, api_keys=("anna:k1", "ben:k2")) as gateway:
        yield Crowd(gateway, await gateway.serve_model())


async def test_a_key_that_comes_late_is_next_whatever_another_one_has_waiting(crowd: Crowd) -> None:
    for number in range(crowd.window + 4):
        await crowd.send(f"anna {number}", **ANNA)
    await crowd.send("ben 0", **BEN)
    await crowd.send("ben 1", **BEN)
    assert len(crowd.asked()) == crowd.window, "the rest waits here, where it can be weighed"
    await crowd.let(2)
    assert crowd.asked()[crowd.window :] == ["ben 0", "ben 1"]
    assert set((await crowd.finish()).values()) == {200}


async def test_batch_work_waits_for_what_somebody_waits_for(crowd: Crowd) -> None:
    for number in range(crowd.window):
        await crowd.send(f"now {number}", **ANNA)
    await crowd.send("batch", **ANNA, **{"X-Skulk-Priority": "batch"})
    await crowd.send("interactive", **ANNA)
    await crowd.let(1)
    assert crowd.asked()[-1] == "interactive"
    assert set((await crowd.finish()).values()) == {200}


async def test_a_full_queue_refuses_at_once_and_a_key_with_less_displaces_the_one_with_more(crowd: Crowd) -> None:
    limit = crowd.window * (1 + WAITING_A_SLOT)
    for number in range(limit):
        await crowd.send(f"anna {number}", **ANNA)
    refused = await crowd.gateway.call("POST", "/v1/chat/completions", chat_body(), headers=ANNA)
    assert (refused.status, refused.error["code"]) == (429, "overloaded")
    assert int(refused.headers["Retry-After"]) >= 1
    await crowd.send("ben 0", **BEN)
    statuses = await crowd.finish()
    assert statuses.pop("ben 0") == 200
    assert sorted(statuses.values()) == [200] * (limit - 1) + [429], "one of anna's made room"
