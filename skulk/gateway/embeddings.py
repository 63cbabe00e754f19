"""Texts to vectors, scores and tokens over HTTP: embeddings as OpenAI's, the rest as llama.cpp's server has them."""

from __future__ import annotations

import array
import base64
import sys
from typing import Any

from aiohttp import web

from skulk.bus.subjects import RUNNER_EMBED, RUNNER_TOKENIZE
from skulk.cluster.view import ready_instances
from skulk.errors import RequestError
from skulk.gateway.bodies import read_as, read_object
from skulk.gateway.chat import known_model
from skulk.gateway.generations import timeout_of
from skulk.gateway.keys import ASKER, REPLICA, SPEC
from skulk.gateway.openai.embeddings import (
    DETOKENIZE_FIELDS,
    EMBEDDING_FIELDS,
    RERANK_FIELDS,
    TOKENIZE_FIELDS,
    DetokenizeRequest,
    EmbeddingRequest,
    RerankRequest,
    TokenizeRequest,
    inputs_of,
)
from skulk.gateway.openai.fields import sort_fields
from skulk.gateway.openai.requests import model_of
from skulk.gateway.questions import QUICK_S, Question
from skulk.gateway.replies import json_response
from skulk.ids import new_id
from skulk.wire.embedding import Embed, Embedded, EmbedInput, RankPair, Tokenize, Tokenized
from skulk.wire.model import ModelCard


async def embeddings(request: web.Request) -> web.Response:
    """``POST /v1/embeddings``: vectors of texts, by an embedding model."""
    body = await read_object(request)
    fields = sort_fields(body, EMBEDDING_FIELDS)
    card = await _embedder(request, body)
    asked = read_as(fields.honoured, EmbeddingRequest)
    answer = await _embed(request, card, inputs_of(asked.input))
    as_base64 = asked.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": index, "embedding": _text(vector) if as_base64 else _numbers(vector)}
        for index, vector in enumerate(answer.vectors)
    ]
    whole = {"object": "list", "data": data, "model": card.model_id, "usage": _usage(answer)}
    return json_response(whole, headers={"X-Skulk-Inert": ", ".join(fields.inert)} if fields.inert else None)


async def rerank(request: web.Request) -> web.Response:
    """``POST /v1/rerank``: documents by their score for a query, the best first."""
    body = await read_object(request)
    fields = sort_fields(body, RERANK_FIELDS)
    card = await _embedder(request, body)
    asked = read_as(fields.honoured, RerankRequest)
    documents = [one if isinstance(one, str) else one.text for one in asked.documents]
    pairs = tuple(RankPair(query=asked.query, document=document) for document in documents)
    answer = await _embed(request, card, pairs)
    scores = [_numbers(vector)[0] for vector in answer.vectors]
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: asked.top_n]
    results: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in order]
    if asked.return_documents:
        for result in results:
            result["document"] = {"text": documents[result["index"]]}
    return json_response({"object": "list", "model": card.model_id, "results": results, "usage": _usage(answer)})


async def tokenize(request: web.Request) -> web.Response:
    """``POST /tokenize``: the model's tokens of a text; ``with_pieces`` adds what each stands for."""
    body = await read_object(request)
    asked = read_as(sort_fields(body, TOKENIZE_FIELDS).honoured, TokenizeRequest)
    message = Tokenize(text=asked.content, add_special=asked.add_special, parse_special=asked.parse_special)
    told: Tokenized = await _ask(
        request,
        Question(endpoint=RUNNER_TOKENIZE, message=message, model_id=await _any_model(request, asked.model)),
        QUICK_S,
    )
    if not asked.with_pieces:
        return json_response({"tokens": told.tokens})
    pieces = [{"id": token, "piece": _piece(piece)} for token, piece in zip(told.tokens, told.pieces, strict=True)]
    return json_response({"tokens": pieces})


async def detokenize(request: web.Request) -> web.Response:
    """``POST /detokenize``: the text of tokens."""
    body = await read_object(request)
    asked = read_as(sort_fields(body, DETOKENIZE_FIELDS).honoured, DetokenizeRequest)
    model_id = await _any_model(request, asked.model)
    return json_response({"content": await request.app[ASKER].text_of(model_id, tuple(asked.tokens))})


async def _embed(request: web.Request, card: ModelCard, inputs: tuple[EmbedInput, ...]) -> Embedded:
    timeout_s = timeout_of(request, request.app[SPEC].request_timeout_s)
    request_id = new_id()
    message = Embed(request_id=request_id, model_id=card.model_id, inputs=inputs, timeout_s=timeout_s)
    question = Question(endpoint=RUNNER_EMBED, message=message, model_id=card.model_id, request_id=request_id)
    return await _ask(request, question, timeout_s)


async def _ask(request: web.Request, question: Question, timeout_s: float) -> Any:
    return await request.app[ASKER].ask(question, timeout_s)


async def _embedder(request: web.Request, body: dict[str, Any]) -> ModelCard:
    card = (await known_model(request, model_of(body))).card
    if not card.embeds:
        raise RequestError(
            "invalid_request",
            f"{card.model_id} generates text and gives no embeddings; ask an embedding model",
            param="model",
        )
    return card


async def _any_model(request: web.Request, named: str | None) -> str:
    """The model that was named; without a name the only one that is ready."""
    if named is not None:
        return (await known_model(request, named)).card.model_id
    view = request.app[REPLICA].view
    models = {one.model_id for one in view.state.instances.values() if ready_instances(view, one.model_id)}
    if len(models) != 1:
        what = "no model is ready" if not models else f"{len(models)} models are ready"
        raise RequestError("invalid_request", f"{what}; name the one that is meant", param="model")
    return models.pop()


def _usage(answer: Embedded) -> dict[str, int]:
    return {"prompt_tokens": answer.prompt_tokens, "total_tokens": answer.prompt_tokens}


def _numbers(vector: bytes) -> list[float]:
    numbers = array.array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def _text(vector: bytes) -> str:
    return base64.b64encode(vector).decode()


def _piece(piece: bytes) -> Any:
    """Text, or the bytes as numbers where they are no whole characters."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
