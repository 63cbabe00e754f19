"""Measures servers that speak OpenAI's chat API under load: tokens/s, time to the first token, gaps between tokens.

    closed   CONCURRENCY requests at a time until REQUESTS were sent
    open     REQUESTS requests that arrive at RATE a second, whether the server keeps up or not
    long     CONCURRENCY streams run; then a prompt of --long-words arrives. Longest gap of the streams until its first
             token, and its own time to the first token

Several URLs are measured in pairs: A B, then B A, and so on, each round with prompts of its own that all servers get
alike. Ratios are those of the first URL to the others, round by round. A request that fails is counted and told; the
whole run ends at --deadline. Answers are greedy unless --temperature says otherwise. Our runners have niceness 5: on a
machine that others use too, start what they are compared with under `nice -n 5`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Literal

import aiohttp
import msgspec
from yarl import URL

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_figures import number, pair_ratios, spread, table  # noqa: E402
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
from skulk.settings_load import is_loopback  # noqa: E402

MAX_REQUESTS: Final = 10_000
MAX_CONCURRENCY: Final = 512
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


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """A server's rounds."""

    server: str
    url: str
    model: str
    rounds: tuple[Figures, ...]


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


# The run


@asynccontextmanager
async def clients(servers: Sequence[Server], plan: Plan) -> AsyncGenerator[list[tuple[Server, Client]]]:
    """Each server with its client; a server without a model gets the first of its list."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        found: list[tuple[Server, Client]] = []
        for server in servers:
            known = server
            if not known.model:
                known = msgspec.structs.replace(known, model=await Client(session, known, plan).model())
            found.append((known, Client(session, known, plan)))
        yield found


async def run(servers: Sequence[Server], plan: Plan) -> list[Measured]:
    """Round after round through all servers, the order turned each time, until done or the deadline.

    Raises:
        BenchError: a server names no model, or not one round was complete at the deadline.
    """
    rounds: list[list[Figures]] = [[] for _ in servers]
    async with clients(servers, plan) as found:
        for _, client in found:
            await client.ask(Job(name="warm", prompt="Hello", max_tokens=2))
        try:
            async with asyncio.timeout(plan.deadline_s):
                for turn in range(plan.rounds):
                    order = range(len(found)) if turn % 2 == 0 else range(len(found) - 1, -1, -1)
                    for place in order:
                        server, client = found[place]
                        print(f"round {turn + 1} of {plan.rounds}: {server.name}", file=sys.stderr, flush=True)
                        rounds[place].append(await one_round(client, plan, turn))
        except TimeoutError:
            print(f"bench: the deadline of {plan.deadline_s:g} s is over", file=sys.stderr)
    complete = min(len(own) for own in rounds)
    if complete == 0:
        raise BenchError(f"no round was complete within {plan.deadline_s:g} s; ask for less or allow more")
    return [
        Measured(server=server.name, url=server.url, model=server.model, rounds=tuple(own[:complete]))
        for (server, _), own in zip(found, rounds, strict=True)
    ]


COLUMNS: Final = {
    "tokens_per_s": "tokens/s",
    "ttft_p50_s": "TTFT p50 s",
    "ttft_p99_s": "TTFT p99 s",
    "gap_p50_s": "gap p50 s",
    "gap_p99_s": "gap p99 s",
    "longest_gap_s": "longest gap s",
}


def report(plan: Plan, measured: Sequence[Measured]) -> str:
    """The outcome for people."""
    kind = f"behind {plan.shared_words} shared {'seen' if plan.is_seen else 'unseen'} ones" if plan.shared_words else ""
    load = {
        "closed": f"{plan.requests} requests, {plan.concurrency} at a time",
        "open": f"{plan.requests} requests, {plan.rate:g} a second",
        "long": f"a prompt of {plan.long_words} words beside {plan.concurrency} streams",
    }[plan.scenario]
    words = f"{plan.words} {'words ' + kind if kind else 'distinct words'}"
    rows: list[list[str]] = []
    for one in measured:
        cells = [number(spread([getattr(r, name) for r in one.rounds]).median, 3) for name in COLUMNS]
        rows.append([one.server, *cells, str(sum(r.failed for r in one.rounds))])
    for other in measured[1:]:
        ratios = [_ratio(measured[0].rounds, other.rounds, name) for name in COLUMNS]
        rows.append([f"{measured[0].server} / {other.server}", *(number(ratio, 3) for ratio in ratios), ""])
    errors = sorted({f"{one.server}: {error}" for one in measured for r in one.rounds for error in r.errors})
    head = f"{plan.scenario}: {load}; {words}, {plan.max_tokens} tokens out; {len(measured[0].rounds)} rounds, medians"
    return "\n".join([head, "", table(["server", *COLUMNS.values(), "failed"], rows), *errors])


def _ratio(ours: Sequence[Figures], theirs: Sequence[Figures], name: str) -> float:
    return spread(pair_ratios([getattr(r, name) for r in ours], [getattr(r, name) for r in theirs])).median


def parse_server(text: str, model: str, key: str) -> Server:
    """``http://host:port`` or ``name=http://host:port``; a trailing ``/v1`` is left out."""
    name, separator, address = text.partition("=")
    if not separator or "://" in name:
        name, address = "", text
    url = URL(address)
    if url.scheme not in {"http", "https"} or not url.host:
        raise ValueError(f"{address} is no URL such as http://127.0.0.1:52415")
    trimmed = address.rstrip("/").removesuffix("/v1")
    return Server(name=name or url.authority, url=trimmed, model=model, key=key)


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[Server], Plan]:
    """The flags of the command line, and what they mean."""
    parser = _parser()
    flags = parser.parse_args(arguments)
    try:
        servers = [parse_server(text, flags.model, flags.key) for text in flags.url]
        extra = msgspec.json.decode(flags.extra, type=dict[str, Any])
    except (ValueError, msgspec.MsgspecError) as error:
        parser.error(str(error))
    for server in servers:
        if not flags.allow_remote and not is_loopback(URL(server.url).host or ""):
            parser.error(f"{server.url} is another machine; a load is only put on it with --allow-remote")
    if len({server.name for server in servers}) < len(servers):
        parser.error("two URLs have one name; give them names of their own, as in ours=http://127.0.0.1:52415")
    limits = (
        ("concurrency", 1, MAX_CONCURRENCY), ("requests", 0, MAX_REQUESTS), ("words", 1, 100_000),
        ("max_tokens", 1, 100_000), ("shared_words", 0, 100_000), ("long_words", 1, 1_000_000), ("rounds", 1, 1000),
    )  # fmt: skip
    for name, least, most in limits:
        if not least <= getattr(flags, name) <= most:
            parser.error(f"--{name.replace('_', '-')} is {getattr(flags, name)}; give {least} to {most}")
    for name in ("rate", "timeout", "deadline"):
        value = getattr(flags, name)
        if not (math.isfinite(value) and value > 0):
            parser.error(f"--{name} is {value}; give a number above 0")
    sampling = {"temperature": flags.temperature, "top_k": flags.top_k, "ignore_eos": flags.ignore_eos or None}
    plan = Plan(
        scenario=flags.scenario,
        concurrency=flags.concurrency,
        requests=flags.requests or flags.concurrency,
        rate=flags.rate,
        words=flags.words,
        max_tokens=flags.max_tokens,
        shared_words=flags.shared_words,
        is_seen=flags.prefix == "seen",
        long_words=flags.long_words,
        rounds=flags.rounds,
        timeout_s=flags.timeout,
        deadline_s=flags.deadline,
        seed=flags.seed,
        extra={**{name: value for name, value in sampling.items() if value is not None}, **extra},
    )
    return flags, servers, plan


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/bench_serving.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("url", nargs="+", metavar="[NAME=]URL", help="servers; the first one is compared with the others")
    add("--scenario", choices=["closed", "open", "long"], default="closed", help="see above (default: closed)")
    add("--concurrency", type=int, default=8, help="requests at a time; of `long`: streams (default: 8)")
    add("--requests", type=int, default=0, help="requests a round (default: as many as at a time)")
    add("--rate", type=float, default=1.0, help="of `open`: requests a second (default: 1)")
    add("--words", type=int, default=200, help="of each prompt, of its own (default: 200)")
    add("--max-tokens", type=int, default=64, help="tokens of each answer (default: 64)")
    add("--shared-words", type=int, default=0, help="of a prefix that a round's prompts share (default: 0)")
    add("--prefix", choices=["unseen", "seen"], default="unseen", help="send the shared prefix once before a round")
    add("--long-words", type=int, default=3000, help="of the prompt of `long` (default: 3000)")
    add("--rounds", type=int, default=3, help="pairs (default: 3)")
    add("--timeout", type=float, default=300.0, help="seconds of one request (default: 300)")
    add("--deadline", type=float, default=1800.0, help="seconds of the whole run (default: 1800)")
    add("--model", default="", help="model to ask for (default: the first that a server lists)")
    add("--key", default="", help="API key, sent as a bearer token")
    add("--temperature", type=float, default=0.0, help="of every request (default: 0, greedy)")
    add("--top-k", type=int, help="of every request (default: the server's)")
    add("--ignore-eos", action=argparse.BooleanOptionalAction, default=True, help="ask for answers of full length")
    add("--extra", default="{}", metavar="JSON", help="more fields for every request's body")
    add("--seed", default="0", help="of prompts and arrivals; another one makes prompts nobody has seen")
    add("--allow-remote", action="store_true", help="also load other machines than this one")
    add("--json", action="store_true", help="print every round as JSON")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Measure as the flags say and print; 1 where it can't be done or a request failed."""
    flags, servers, plan = parse(arguments)
    try:
        measured = asyncio.run(run(servers, plan))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if flags.json:
        print(msgspec.json.encode({"plan": plan, "measured": measured}).decode())
    else:
        print(report(plan, measured))
    return 1 if any(one.failed for server in measured for one in server.rounds) else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
