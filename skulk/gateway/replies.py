"""JSON answers, encoded by msgspec."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from skulk.wire.base import encode


def json_response(body: Any, *, status: int = 200) -> web.Response:
    """``body`` as JSON."""
    return web.Response(body=encode(body), status=status, content_type="application/json")
