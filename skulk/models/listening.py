"""An application on a port, for as long as a block lasts."""

from __future__ import annotations

import errno
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from aiohttp import web

from skulk.errors import StartError


@asynccontextmanager
async def listening(app: web.Application, host: str, port: int) -> AsyncGenerator[tuple[str, int]]:
    """Serves; gives the address in use, also where port 0 picked a free one.

    Raises:
        StartError: ``port_in_use``; ``config_invalid``: no address of this machine.
    """
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise StartError(
                    "port_in_use",
                    f"port {port} on {host} is in use by another program; choose another one with --files-port "
                    "(0 picks a free one).",
                ) from error
            raise StartError(
                "config_invalid", f"weights can't be served on {host} port {port}: {error.strerror}; see --files-port."
            ) from error
        address = runner.addresses[0]
        yield str(address[0]), int(address[1])
    finally:
        await runner.cleanup()
