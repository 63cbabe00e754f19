"""What `bench_serving` sends and hears: one streamed chat request, the loops that make a load of many, one round."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import aiohttp
import msgspec

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_load import (  # noqa: E402
    Figures,
    Job,
    Sample,
    arrivals,
    error_of,
    figures,
    has_text,
    intrusion,
    jobs,
    usage_of,
)

from skulk.cli.sse import SseParser  # noqa: E402

CONNECT_S: Final = 10.0
STEADY_TOKENS: Final = 4
"""A stream runs steadily once so many of its tokens came."""

Scenario = Literal["closed", "open", "long"]
Heard = Callable[[int], None]


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """One server under test."""

    name: str
    url: str
    model: str = ""
    key: str = ""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What each server gets in each round. Lengths in words and tokens.

    Attributes:
        shared_words: of a prefix that all prompts of a round begin with; 0: they differ from the first word on.
        is_seen: that prefix is sent once, unmeasured, before the round.
        extra: fields of every request's body.
    """

    scenario: Scenario = "closed"
    concurrency: int = 8
    requests: int = 8
    rate: float = 1.0
    words: int = 200
    max_tokens: int = 64
    shared_words: int = 0
    is_seen: bool = False
    long_words: int = 3000
    long_tokens: int = 8
    rounds: int = 3
    timeout_s: float = 300.0
    deadline_s: float = 1800.0
    seed: str = "0"
    extra: dict[str, Any] = {}


class BenchError(Exception):
    """The run can't be made; the text says why."""


class Client:
    """Sends requests to one server and times what comes back."""

    def __init__(self, session: aiohttp.ClientSession, server: Server, plan: Plan) -> None:
        self._session = session
        self._server = server
        self._plan = plan
        self._headers = {"Authorization": f"Bearer {server.key}"} if server.key else {}

    async def ask(self, job: Job, heard: Heard = lambda _: None) -> Sample:
        """One streamed chat request. Never raises but on cancellation: a failure is a sample with its reason.

        ``heard`` is told, as they come, how many events with text there were.
        """
        body = {
            "model": self._server.model,
            "messages": [{"role": "user", "content": job.prompt}],
            "max_tokens": job.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._plan.extra,
        }
        sent_s = time.perf_counter()
        listening = _Listening(heard)
        error = ""
        try:
            async with asyncio.timeout(self._plan.timeout_s):
                await self._listen(body, listening)
        except TimeoutError:
            error = f"no end within {self._plan.timeout_s:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        return listening.sample(job.name, sent_s, error)

    async def _listen(self, body: dict[str, Any], listening: _Listening) -> None:
        url = f"{self._server.url}/v1/chat/completions"
        async with self._session.post(url, json=body, headers=self._headers) as response:
            if response.status != 200:
                text = await response.text()
                listening.error = f"status {response.status}: {_refusal(text)}"
                return
            parser = SseParser()
            async for part in response.content.iter_any():
                listening.take(parser.feed(part))

    async def model(self) -> str:
        """The first model that the server lists.

        Raises:
            BenchError: it can't be asked, or has none.
        """
        url = f"{self._server.url}/v1/models"
        try:
            async with asyncio.timeout(CONNECT_S), self._session.get(url, headers=self._headers) as response:
                listed: Any = await response.json(content_type=None)
                return str(listed["data"][0]["id"])
        except (aiohttp.ClientError, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise BenchError(f"{url} names no model ({type(error).__name__}: {error}); give --model") from error


class _Listening:
    """A stream as it is heard."""

    def __init__(self, heard: Heard) -> None:
        self._heard = heard
        self._arrivals_s: list[float] = []
        self._usage: tuple[int, int, int] | None = None
        self._is_done = False
        self.error = ""

    def take(self, events: Sequence[str]) -> None:
        now = time.perf_counter()
        for text in events:
            if text == "[DONE]":
                self._is_done = True
                continue
            event: dict[str, Any] = json.loads(text)
            self.error = self.error or error_of(event)
            self._usage = usage_of(event) or self._usage
            if has_text(event):
                self._arrivals_s.append(now)
                self._heard(len(self._arrivals_s))

    def sample(self, name: str, sent_s: float, error: str) -> Sample:
        error = error or self.error
        if not error and not self._is_done:
            error = "the stream broke off before [DONE]"
        prompt_tokens, completion_tokens, cached_tokens = self._usage or (0, len(self._arrivals_s), 0)
        return Sample(
            name=name,
            sent_s=sent_s,
            ended_s=time.perf_counter(),
            arrivals_s=tuple(self._arrivals_s),
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            cached_tokens=cached_tokens,
            error=error,
        )


def _refusal(text: str) -> str:
    try:
        body: Any = json.loads(text)
    except ValueError:
        return text[:300]
    return error_of(body)[:300]


# Scenarios


async def closed_loop(ask: Callable[[Job], Awaitable[Sample]], wanted: Sequence[Job], concurrency: int) -> list[Sample]:
    """At most ``concurrency`` requests at a time; each that ends lets the next one go."""
    left = iter(wanted)
    samples: list[Sample] = []

    async def worker() -> None:
        # The workers share one iterator, so each job is taken once.
        for job in left:
            samples.append(await ask(job))  # noqa: PERF401 - the others must see it before the next await

    async with asyncio.TaskGroup() as group:
        for place in range(min(concurrency, len(wanted))):
            group.create_task(worker(), name=f"worker {place}")
    return samples


async def open_loop(
    ask: Callable[[Job], Awaitable[Sample]], wanted: Sequence[Job], times_s: Sequence[float]
) -> list[Sample]:
    """Each request at its time, however many are open."""

    async def at(job: Job, after_s: float) -> Sample:
        await asyncio.sleep(after_s)
        return await ask(job)

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(at(job, after_s), name=f"request {job.name}")
            for job, after_s in zip(wanted, times_s, strict=True)
        ]
    return [task.result() for task in tasks]


async def intruded(client: Client, wanted: Sequence[Job], long: Job) -> Figures:
    """Streams run; when each of them is steady, the long prompt comes. They are told to go when it has answered."""
    steady = [asyncio.Event() for _ in wanted]

    async def stream(place: int) -> Sample:
        times: list[float] = []
        sent_s = time.perf_counter()

        def heard(count: int) -> None:
            times.append(time.perf_counter())
            if count >= STEADY_TOKENS:
                steady[place].set()

        try:
            return await client.ask(wanted[place], heard)
        except asyncio.CancelledError:
            # Our own cancel, once the long prompt has answered; what came until then counts.
            return Sample(
                name=wanted[place].name,
                sent_s=sent_s,
                ended_s=time.perf_counter(),
                arrivals_s=tuple(times),
                completion_tokens=len(times),
            )
        finally:
            steady[place].set()

    tasks = [asyncio.create_task(stream(place), name=f"stream {place}") for place in range(len(wanted))]
    try:
        for event in steady:
            await event.wait()
        answer = await client.ask(long)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    return intrusion([task.result() for task in tasks], answer)


async def one_round(client: Client, plan: Plan, turn: int) -> Figures:
    """One server's round."""
    seed = f"{plan.seed} {turn}"
    wanted = jobs(
        count=plan.concurrency if plan.scenario == "long" else plan.requests,
        words=plan.words,
        max_tokens=plan.max_tokens,
        seed=seed,
        shared_words=plan.shared_words,
    )
    if plan.shared_words and plan.is_seen:
        # The words behind the prefix are of another seed: only the prefix has been seen.
        prefix = " ".join(wanted[0].prompt.split(" ")[: plan.shared_words])
        await client.ask(Job(name="seen", prompt=f"{prefix} and", max_tokens=1))
    match plan.scenario:
        case "closed":
            return figures(await closed_loop(client.ask, wanted, plan.concurrency))
        case "open":
            return figures(await open_loop(client.ask, wanted, arrivals(len(wanted), plan.rate, seed)))
        case "long":
            [long] = jobs(count=1, words=plan.long_words, max_tokens=plan.long_tokens, seed=f"{seed} long")
            return await intruded(client, wanted, long)
