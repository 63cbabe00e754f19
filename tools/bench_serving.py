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
import math
import sys
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
from yarl import URL

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_client import CONNECT_S, BenchError, Client, Plan, Server, one_round  # noqa: E402
from bench_figures import number, pair_ratios, spread, table  # noqa: E402
from bench_load import Figures, Job  # noqa: E402

from skulk.settings_load import is_loopback  # noqa: E402

MAX_REQUESTS: Final = 10_000
MAX_CONCURRENCY: Final = 512


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """A server's rounds."""

    server: str
    url: str
    model: str
    rounds: tuple[Figures, ...]


# The run


@asynccontextmanager
async def clients(servers: Sequence[Server], plan: Plan) -> AsyncGenerator[list[tuple[Server, Client]]]:
    """Each server with its client; a server without a model gets the first of its list."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
    # A connection each: llama-server closes those that are kept, at times just when the next request goes out.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
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
