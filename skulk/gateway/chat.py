"""OpenAI's two generating calls, and the one that benchmarks use."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from skulk.errors import RequestError
from skulk.gateway.bodies import read_object
from skulk.gateway.generations import generate
from skulk.gateway.keys import CARDS
from skulk.gateway.openai.answers import ChatAnswer, TextAnswer
from skulk.gateway.openai.requests import Asked, model_of, read_chat, read_completion


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """``POST /v1/chat/completions``."""
    asked = _read_chat(request, await read_object(request))
    return await generate(request, asked, ChatAnswer)


async def bench_chat_completions(request: web.Request) -> web.StreamResponse:
    """``POST /bench/chat/completions``: the same, whole, with ``generation_stats``."""
    asked = _read_chat(request, await read_object(request))
    if asked.stream:
        raise RequestError("invalid_request", "this call doesn't stream; send stream: false", param="stream")
    return await generate(request, asked, ChatAnswer, with_stats=True)


async def completions(request: web.Request) -> web.StreamResponse:
    """``POST /v1/completions``."""
    body = await read_object(request)
    known = request.app[CARDS].need(model_of(body))
    return await generate(request, read_completion(body, known.card), TextAnswer)


def _read_chat(request: web.Request, body: dict[str, Any]) -> Asked:
    known = request.app[CARDS].need(model_of(body))
    return read_chat(body, known.card)
