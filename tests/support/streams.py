"""A runner's and a gateway's end of streams, wired as the roles wire them."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from skulk.bus.core import CoreBus
from skulk.bus.port import Call
from skulk.bus.streams import Inbox, Outbox, StreamReader
from skulk.bus.subjects import RUNNER_RESEND
from skulk.wire.generation import Chunk, Resend, Resent
from tests.support.bus import WAIT_S, Collector
from tests.support.messages import GATEWAY, RUNNER


async def cancel_and_wait(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error


class StreamPair:
    """An outbox that runs on one bus and an inbox that runs on another."""

    def __init__(self, runner_bus: CoreBus, gateway_bus: CoreBus) -> None:
        self.runner_bus = runner_bus
        self.gateway_bus = gateway_bus
        self.outbox = Outbox(runner_bus, RUNNER, runner_bus.clock)
        self.inbox = Inbox(gateway_bus, GATEWAY, gateway_bus.clock)
        self.confirmed: Collector[Resend] = Collector()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> StreamPair:
        async def resend(call: Call[Resend]) -> Resent:
            answer = self.outbox.resend(call.message)
            if not self.outbox.knows(call.message.request_id, call.message.attempt):
                self.confirmed(call.message)
            return answer

        await self.runner_bus.serve("runner", {RUNNER_RESEND: resend}, runner=RUNNER)
        await self.inbox.start()
        self._stack.push_async_callback(self.inbox.close)
        for loop, name in ((self.outbox.run(), "outbox"), (self.inbox.run(), "inbox")):
            self._stack.push_async_callback(cancel_and_wait, asyncio.create_task(loop, name=name))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()


async def only_kept(outbox: Outbox, count: int) -> None:
    """Waits until so many chunks found no connection; the backlog's task is woken already and needs turns only."""
    for _ in range(1_000):
        if outbox.counters.only_kept >= count:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"{outbox.counters.only_kept} chunks were only kept, not {count}")


async def read_all(reader: StreamReader, timeout_s: float = WAIT_S) -> list[Chunk]:
    """Everything to the terminal chunk."""
    chunks: list[Chunk] = []
    async with asyncio.timeout(timeout_s):
        while not chunks or chunks[-1].end is None:
            chunks.extend(await reader.take())
    return chunks
