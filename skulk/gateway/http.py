"""The HTTP server under the application, and its words to whoever doesn't speak HTTP.

aiohttp answers what its parser refuses by itself, before any middleware: in plain text, and with a traceback in the log
at each one. Here such a request gets the one error envelope, and the log one quiet line.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Final

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from skulk.errors import RequestError
from skulk.gateway.errors import error_response

BACKLOG: Final = 1024
_CLIENT_FAULTS: Final = (HttpProcessingError, web.RequestPayloadError)


class Connection(web.RequestHandler):
    """One client's connection."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answers what never reached the application; the connection ends with it."""
        if status >= 500 or request.writer.output_size > 0:
            return super().handle_error(request, status, exc, message)
        self.logger.debug("no HTTP from %s: %s", request.remote, message)
        reason = " ".join((message or "").split())
        response = error_response(
            RequestError("invalid_request", f"this is no HTTP request that can be read: {reason}")
        )
        response.headers["Server"] = "skulk"
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Logs a defect with its traceback; a body that isn't what its headers say is none of ours."""
        if isinstance(kw.get("exc_info"), _CLIENT_FAULTS):
            self.logger.debug(*args)
        else:
            super().log_exception(*args, **kw)


async def listen_on(runner: web.AppRunner, listening: socket.socket) -> asyncio.Server:
    """Lets clients in: ``runner`` is set up, ``listening`` is bound. Close the server to let no more in."""
    loop, manager = asyncio.get_running_loop(), runner.server
    assert manager is not None, "the runner isn't set up"
    options: dict[str, Any] = {"access_log": None}
    return await loop.create_server(lambda: Connection(manager, loop=loop, **options), sock=listening, backlog=BACKLOG)
