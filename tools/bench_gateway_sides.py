"""The processes of `bench_gateway`: an engine that emits at a set rate, behind bus and gateway and behind bare aiohttp.

    engine   a cluster with one ready instance; each request gets ``tokens`` tokens, all streams at the same step
    bare     the same engine in an aiohttp server that writes one SSE event a token: what HTTP alone costs
    client   opens streams, and notes when each token came

Each token's text is the time at which the engine gave it away: `time.monotonic` is one clock for all processes.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import msgspec
from aiohttp import web

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from skulk.bus.nats_bus import NatsBus  # noqa: E402
from skulk.bus.streams import StreamWriter  # noqa: E402
from skulk.gateway.openai.answers import ChatChunk, ChunkChoice, Delta, sse  # noqa: E402
from skulk.models.catalogue import EMBEDDED_MODEL  # noqa: E402
from skulk.wire.events import InstanceAssigned, InstanceCreated  # noqa: E402
from skulk.wire.generation import StreamEnd, Usage  # noqa: E402
from tests.support.http import FakeCluster, FakeRunner  # noqa: E402
from tests.support.states import assignment, instance  # noqa: E402

STAMP: Final = re.compile(rb"@([0-9]+\.[0-9]{6})")


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine gives: ``tokens`` a stream, ``rate`` of them a second (0: all at once); ``slots``: it has."""

    tokens: int = 100
    rate: float = 50.0
    slots: int = 4096


class Heard(msgspec.Struct, kw_only=True):
    """What one stream's client noted, in seconds. ``waits``: from the engine's hand to the client's.

    ``gaps``: between two tokens; ``status`` is 200, or the refusal after ``first_s``.
    """

    status: int
    first_s: float = 0.0
    waits: list[float] = []
    gaps: list[float] = []
    is_whole: bool = False


class Steps:
    """The engine's steps: everybody who waits is let go at the same moment, ``rate`` times a second."""

    def __init__(self, rate: float) -> None:
        self._period_s = 1.0 / rate if rate else 0.0
        self._next: asyncio.Future[None] | None = None

    async def step(self) -> None:
        """Returns with the next step."""
        if not self._period_s:
            return
        loop = asyncio.get_running_loop()
        if self._next is None or self._next.done():
            self._next = loop.create_future()
            left = self._period_s - loop.time() % self._period_s
            loop.call_later(left, self._next.set_result, None)
        await asyncio.shield(self._next)

    async def texts(self, count: int) -> AsyncGenerator[str]:
        """The tokens of one stream, each at its step; the first at once, for the engine is not what is measured."""
        for number in range(count):
            if number:
                await self.step()
            yield f"@{time.monotonic():.6f} "


async def serve_engine(nats_url: str, load: Load) -> None:
    """A cluster of one node with one ready instance, until it is killed."""
    bus = NatsBus(nats_url, cluster="test", name="engine")
    await bus.connect()
    cluster = FakeCluster(bus)
    await cluster.start()
    await cluster.append(InstanceCreated(instance=instance("i1", model_id=EMBEDDED_MODEL)))
    assigned = msgspec.structs.replace(assignment("i1", node_id="aaaa"), n_parallel=load.slots)
    await cluster.append(InstanceAssigned(instance_id="i1", assignment=assigned))
    runner = cluster.runners[assigned.runner_id] = FakeRunner(bus, assigned.runner_id)
    steps = Steps(load.rate)

    async def answer(_runner: FakeRunner, writer: StreamWriter) -> None:
        number = 0
        async for text in steps.texts(load.tokens):
            writer.send(0, text, (number,))
            number += 1
        usage = Usage(prompt_tokens=5, completion_tokens=load.tokens)
        writer.end(StreamEnd(reason="stop", usage=usage), finish_reason="stop")

    runner.script = answer
    await runner.start()
    await cluster.set_phase("i1", "ready")
    print("ready", flush=True)
    await asyncio.Event().wait()


async def serve_bare(load: Load) -> None:
    """The same engine behind nothing but HTTP, until it is killed; prints its port."""
    steps = Steps(load.rate)

    async def answer(request: web.Request) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for text in steps.texts(load.tokens):
            choice = ChunkChoice(index=0, delta=Delta(content=text))
            event = ChatChunk(id="chatcmpl-0", created=0, model=EMBEDDED_MODEL, choices=(choice,))
            await response.write(sse(event))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


async def listen(port: int, streams: int, spread_s: float) -> list[Heard]:
    """Opens that many streams, evenly over ``spread_s``, and reads each to its end."""

    async def later(number: int) -> Heard:
        await asyncio.sleep(spread_s * number / streams)
        return await hear(port)

    return await asyncio.gather(*(later(number) for number in range(streams)))


async def hear(port: int) -> Heard:
    """One stream, on a socket of its own: as little work a token as can be, for this side shares the machine."""
    body = msgspec.json.encode(
        {"model": EMBEDDED_MODEL, "stream": True, "messages": [{"role": "user", "content": "Name three rivers."}]}
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    asked_at = time.monotonic()
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body)
    )
    try:
        head = await reader.readuntil(b"\r\n\r\n")
        heard = Heard(status=int(head.split(b" ", 2)[1]))
        if heard.status != 200:
            heard.first_s = time.monotonic() - asked_at
            return heard
        await _hear_tokens(reader, heard, asked_at)
        return heard
    finally:
        writer.close()


async def _hear_tokens(reader: asyncio.StreamReader, heard: Heard, asked_at: float) -> None:
    rest = b""
    last = 0.0
    while piece := await reader.read(1 << 18):
        now = time.monotonic()
        rest += piece
        end = rest.rfind(b"\n\n")
        for stamp in STAMP.finditer(rest, 0, end + 1):
            heard.waits.append(now - float(stamp[1]))
            if last:
                heard.gaps.append(now - last)
            else:
                heard.first_s = now - asked_at
            last = now
        heard.is_whole = heard.is_whole or b"[DONE]" in rest
        rest = rest[end + 1 :] if end >= 0 else rest


def main() -> None:
    """One of the processes."""
    parser = argparse.ArgumentParser(
        prog="tools/bench_gateway_sides.py",
        description="A part of bench_gateway.py: engine URL LOAD, bare LOAD, or client PORT STREAMS SPREAD_S.",
    )
    parser.add_argument("part", choices=("engine", "bare", "client"))
    parser.add_argument("told", nargs="+", help="what that part is told")
    told = parser.parse_args()
    match [told.part, *told.told]:
        case ["engine", url, load]:
            asyncio.run(serve_engine(url, msgspec.json.decode(load, type=Load)))
        case ["bare", load]:
            asyncio.run(serve_bare(msgspec.json.decode(load, type=Load)))
        case ["client", port, streams, spread_s]:
            heard: Any = asyncio.run(listen(int(port), int(streams), float(spread_s)))
            sys.stdout.buffer.write(msgspec.json.encode(heard) + b"\n")
        case _:
            parser.error(f"{told.part} takes other words")


if __name__ == "__main__":
    main()
