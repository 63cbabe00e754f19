"""JSON answers, encoded by msgspec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aiohttp import web

from skulk.wire.base import encode


def json_response(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    """``body`` as JSON."""
    return web.Response(body=encode(body), status=status, headers=headers, content_type="application/json")
