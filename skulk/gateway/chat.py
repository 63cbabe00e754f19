"""OpenAI's two generating calls, and the one that benchmarks use."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from skulk.errors import RequestError
from skulk.gateway.bodies import read_object
from skulk.gateway.cards import KnownModel
from skulk.gateway.generations import generate
from skulk.gateway.keys import ASKER, CARDS, SPEC
from skulk.gateway.openai.answers import ChatAnswer, TextAnswer
from skulk.gateway.openai.requests import Asked, model_of, read_chat, read_completion
from skulk.gateway.stores import STORES
from skulk.wire.generation import TextPrompt, TokenPrompt


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """``POST /v1/chat/completions``: the next message of a conversation, whole or streamed."""
    asked = await _read_chat(request, await read_object(request))
    return await generate(request, asked, ChatAnswer)


async def bench_chat_completions(request: web.Request) -> web.StreamResponse:
    """``POST /bench/chat/completions``: the same, whole, with ``generation_stats``."""
    asked = await _read_chat(request, await read_object(request))
    if asked.stream:
        raise RequestError("invalid_request", "this call doesn't stream; send stream: false", param="stream")
    return await generate(request, asked, ChatAnswer, with_stats=True)


async def completions(request: web.Request) -> web.StreamResponse:
    """``POST /v1/completions``: how a text goes on, whole or streamed."""
    body = await read_object(request)
    known = await known_model(request, model_of(body))
    asked = read_completion(body, known.card)
    echoes = [await _text_of(request, known.card.model_id, prompt) for prompt in asked.echo]
    return await generate(request, asked, lambda head: TextAnswer(head, echoes))


async def _text_of(request: web.Request, model_id: str, prompt: TextPrompt | TokenPrompt) -> str:
    match prompt:
        case TextPrompt():
            return prompt.text
        case TokenPrompt():
            return await request.app[ASKER].text_of(model_id, prompt.tokens)


async def known_model(request: web.Request, model_id: str) -> KnownModel:
    """A model that a request may name: placed, or one that may be placed on demand.

    Raises:
        RequestError: ``model_not_found``.
    """
    auto_place = request.app[SPEC].auto_place
    if auto_place == "off":
        return request.app[CARDS].need(model_id)
    return await request.app[STORES].known(model_id, param="model", may_ask_hub=auto_place == "any")


async def _read_chat(request: web.Request, body: dict[str, Any]) -> Asked:
    known = await known_model(request, model_of(body))
    return read_chat(body, known.card)
