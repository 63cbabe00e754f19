"""A TCP proxy in the test's own process that can make a network misbehave: swallow, hold, cut, refuse."""

from __future__ import annotations

import asyncio
from types import TracebackType

READ_BYTES = 65_536


class TcpProxy:
    """Forwards to ``port``; listens on its own, which stays the same.

    Attributes:
        swallow_up: bytes from clients vanish, connections stay open: a silent cut of one direction.
        swallow_down: the same for bytes to clients.
        delay_s: every block waits so long.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self.swallow_up = False
        self.swallow_down = False
        self.delay_s = 0.0
        self.accepted = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    async def __aenter__(self) -> TcpProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))

    def swallow(self, *, is_swallowing: bool) -> None:
        """Both directions at once: what a pulled cable looks like."""
        self.swallow_up = self.swallow_down = is_swallowing

    def hold(self) -> None:
        """Reads no more: the senders' sockets fill up, as with a stopped server."""
        self._flowing.clear()

    def let_flow(self) -> None:
        """Ends `hold`; what was held goes on."""
        self._flowing.set()

    def cut(self) -> None:
        """Resets every connection."""
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._own(writer)
        try:
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._own(up_writer)
        for source, target, is_up in ((reader, up_writer, True), (up_reader, writer, False)):
            task = asyncio.create_task(self._forward(source, target, is_up=is_up), name="proxy")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _own(self, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)

    async def _forward(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_up: bool) -> None:
        try:
            while block := await source.read(READ_BYTES):
                await self._flowing.wait()
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if self.swallow_up if is_up else self.swallow_down:
                    continue
                target.write(block)
                await target.drain()
        except OSError:
            pass
        finally:
            target.transport.abort()
            self._writers.discard(target)
