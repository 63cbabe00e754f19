"""Server-sent events onto a socket: what is ready goes out in one write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from aiohttp import web

HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    # nginx would otherwise collect the events
    "X-Accel-Buffering": "no",
}
DONE: Final = b"data: [DONE]\n\n"
KEEP_ALIVE: Final = b": keep-alive\n\n"


def comment(text: str) -> bytes:
    """A line that clients of the standard skip."""
    assert "\n" not in text
    assert "\r" not in text
    return b": " + text.encode() + b"\n\n"


async def open_stream(request: web.Request, headers: Mapping[str, str]) -> web.StreamResponse:
    """Sends status 200 and the headers: from here on a failure can only be told as an event."""
    response = web.StreamResponse(headers={**HEADERS, **headers})
    await response.prepare(request)
    return response
