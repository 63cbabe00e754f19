"""The API as OpenAPI 3.1, made from the routes, the Structs that are read and written, and the tables of fields.

A request's schema is that of the Struct that reads it; a table of fields (`skulk.gateway.openai.fields`) adds the inert
ones, and the refused ones with the values that ask for nothing. Any other field is refused, so
``additionalProperties`` is false there. ``null`` counts as not sent everywhere and isn't repeated in the schemas.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from aiohttp.typedefs import Handler

from skulk import __version__
from skulk.gateway.cards import STATES
from skulk.gateway.downloads import AddRequest, NodeRequest, PullRequest, StartRequest
from skulk.gateway.drains import DrainRequest
from skulk.gateway.errors import Envelope
from skulk.gateway.generations import CancelReply
from skulk.gateway.instances import MAX_NODES, CreateRequest, PlaceRequest
from skulk.gateway.nodes import MAX_EVENTS
from skulk.gateway.openai.answers import ChatChunk, ChatCompletion, TextCompletion
from skulk.gateway.openai.embeddings import (
    DETOKENIZE_FIELDS,
    EMBEDDING_FIELDS,
    RERANK_FIELDS,
    TOKENIZE_FIELDS,
    DetokenizeRequest,
    EmbeddingRequest,
    RerankRequest,
    TokenizeRequest,
)
from skulk.gateway.openai.fields import CHAT_FIELDS, COMPLETION_FIELDS, Field
from skulk.gateway.openai.requests import ChatRequest, CompletionRequest

Schema = dict[str, Any]
Routes = Iterable[tuple[str, str, Handler]]

_REF: Final = "#/components/schemas/{name}"
_COUNT: Final[Schema] = {"type": "integer", "minimum": 1, "maximum": 2**31 - 1}
_NAMES: Final[Schema] = {"type": "array", "items": {"type": "string"}, "maxItems": MAX_NODES}
_TEXT: Final[Schema] = {"type": "string"}
_EVENTS: Final[Schema] = {"type": "integer", "minimum": 1, "maximum": MAX_EVENTS}
_SUMMARY: Final = re.compile(r"``[A-Z]+ [^`]*``(?: and ``[^`]*``)?[:;.,]?\s*(.*)", re.DOTALL)
_PARAMETER: Final = re.compile(r"\{(\w+)(?::[^}]*)?\}")
_ERRORS: Final = {
    400: "The request can't be understood or met; `param` names the field.",
    401: "A key is missing or wrong.",
    403: "The Host or Origin is not allowed here.",
    404: "What the request names isn't known.",
    413: "The body is over the limit.",
    429: "The queue is full; `Retry-After` says when to come again.",
    500: "A defect; the node's log has the details under the request's id.",
    502: "What this needed failed, and there was no other.",
    503: "Not now: no master, loading, facts pending, draining; `Retry-After` says when to come again.",
    504: "The deadline passed.",
}


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """What a call reads. ``table``: its fields beyond those of the Struct; ``is_needed``: it may not be left out."""

    kind: Any
    table: Mapping[str, Field] | None = None
    is_needed: bool = True


class Query(msgspec.Struct, frozen=True, kw_only=True):
    """A parameter of the query."""

    schema: Schema
    is_needed: bool = False


BODIES: Final[dict[str, Body]] = {
    "POST /v1/chat/completions": Body(kind=ChatRequest, table=CHAT_FIELDS),
    "POST /bench/chat/completions": Body(kind=ChatRequest, table=CHAT_FIELDS),
    "POST /v1/completions": Body(kind=CompletionRequest, table=COMPLETION_FIELDS),
    "POST /v1/embeddings": Body(kind=EmbeddingRequest, table=EMBEDDING_FIELDS),
    "POST /v1/rerank": Body(kind=RerankRequest, table=RERANK_FIELDS),
    "POST /tokenize": Body(kind=TokenizeRequest, table=TOKENIZE_FIELDS),
    "POST /detokenize": Body(kind=DetokenizeRequest, table=DETOKENIZE_FIELDS),
    "POST /place_instance": Body(kind=PlaceRequest),
    "POST /instance": Body(kind=CreateRequest),
    "POST /nodes/{node}/drain": Body(kind=DrainRequest, is_needed=False),
    "POST /models/add": Body(kind=AddRequest),
    "POST /download/start": Body(kind=StartRequest),
    "POST /store/models/{model_id}/download": Body(kind=PullRequest, is_needed=False),
    "POST /store/models/{model_id}/verify": Body(kind=NodeRequest, is_needed=False),
}
_WHERE: Final[dict[str, Query]] = {
    "model_id": Query(schema=_TEXT, is_needed=True),
    "node_ids": Query(schema=_NAMES),
    "excluded_node_ids": Query(schema=_NAMES),
    "min_nodes": Query(schema={**_COUNT, "maximum": MAX_NODES}),
    "context_length": Query(schema=_COUNT),
    "n_parallel": Query(schema=_COUNT),
    "force": Query(schema={"type": "string", "enum": ["0", "1"]}),
}
_WAIT: Final = {"wait": Query(schema={"type": "string", "enum": ["ready"]})}
_STATE: Final = {"state": Query(schema={"type": "string", "enum": list(STATES)})}
QUERIES: Final[dict[str, dict[str, Query]]] = {
    "GET /events": {
        "limit": Query(schema=_EVENTS),
        "since": Query(schema={"type": "integer", "minimum": 0, "maximum": 2**53}),
    },
    "GET /v1/diagnostics/cluster/timeline": {"limit": Query(schema=_EVENTS)},
    "POST /place_instance": _WAIT,
    "POST /instance": _WAIT,
    "GET /instance/previews": _WHERE,
    "GET /instance/placement": _WHERE,
    "GET /models": _STATE,
    "GET /v1/models": _STATE,
    "GET /models/search": {
        "query": Query(schema=_TEXT),
        "q": Query(schema=_TEXT),
        "limit": Query(schema={"type": "integer", "minimum": 1, "maximum": 1_000}),
        "hub": Query(schema={"type": "string", "enum": ["0", "1"]}),
    },
    "GET /store/models/{model_id}/download/status": {"node_id": Query(schema=_TEXT)},
    "DELETE /store/models/{model_id}": {"node_id": Query(schema=_TEXT)},
}
ANSWERS: Final[dict[str, Any]] = {
    "POST /v1/chat/completions": ChatCompletion,
    "POST /bench/chat/completions": ChatCompletion,
    "POST /v1/completions": TextCompletion,
    "POST /v1/cancel/{command_id}": CancelReply,
    "GET /node_id": str,
    "GET /events": list[dict[str, Any]],
}
EVENTS: Final[dict[str, Any]] = {"POST /v1/chat/completions": ChatChunk, "POST /v1/completions": TextCompletion}
STATUSES: Final = {"POST /admin/restart": 202}
OPEN: Final = frozenset({"GET /health", "GET /ready"})


def path_of(route: str) -> str:
    """A route's path without the patterns of its parameters."""
    return _PARAMETER.sub(r"{\1}", route)


def document(routes: Routes) -> Schema:
    """The whole document."""
    kinds = [Envelope, *(body.kind for body in BODIES.values()), *ANSWERS.values(), *EVENTS.values()]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    known = dict(zip(map(str, kinds), schemas, strict=True))
    for body in BODIES.values():
        if body.table is not None:
            _add_fields(components[body.kind.__name__], body.table)
    paths: dict[str, Schema] = {}
    for method, route, handler in routes:
        path = path_of(route)
        paths.setdefault(path, {})[method.lower()] = _operation(f"{method} {path}", route, handler, known)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Skulk",
            "version": __version__,
            "description": "One cluster out of unlike machines: OpenAI's API, and what a cluster needs beside it.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"bearer": []}, {"header": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            },
        },
    }


def _add_fields(schema: Schema, table: Mapping[str, Field]) -> None:
    properties: dict[str, Schema] = schema["properties"]
    for name, field in table.items():
        match field.treatment:
            case "honoured":
                assert name in properties, f"{name} is honoured by nothing"
            case "inert":
                properties[name] = {"description": "Accepted, without effect; the header X-Skulk-Inert names it."}
            case "refused":
                properties[name] = {
                    "description": f"This version lacks {field.needs}.",
                    "enum": [None, *field.harmless],
                }
    schema["additionalProperties"] = False


def _operation(name: str, route: str, handler: Handler, known: Mapping[str, Schema]) -> Schema:
    success = str(STATUSES.get(name, 200))
    made: Schema = {
        "summary": _summary(handler),
        "operationId": handler.__name__ if name != "GET /models" else "list_models_too",
        "responses": {
            success: {"description": "Done.", "content": _contents(name, known)},
            **{str(status): _refusal(text) for status, text in _ERRORS.items()},
        },
    }
    if name in OPEN:
        made["security"] = []
    if name == "GET /ready":
        made["responses"]["503"]["content"] = {"application/json": {"schema": {"type": "object"}}}
    parameters = [_in_path(parameter) for parameter in _PARAMETER.findall(route)]
    parameters += [_in_query(parameter, query) for parameter, query in QUERIES.get(name, {}).items()]
    if parameters:
        made["parameters"] = parameters
    body = BODIES.get(name)
    if body is not None:
        content = {"application/json": {"schema": known[str(body.kind)]}}
        made["requestBody"] = {"required": body.is_needed, "content": content}
    return made


def _contents(name: str, known: Mapping[str, Schema]) -> Schema:
    if name == "GET /metrics":
        return {"text/plain": {"schema": _TEXT}}
    answer = ANSWERS.get(name)
    contents: Schema = {"application/json": {"schema": {"type": "object"} if answer is None else known[str(answer)]}}
    if name in EVENTS:
        contents["text/event-stream"] = {
            "schema": {"type": "string", "description": "Server-sent events, one JSON object each, then [DONE]."}
        }
    return contents


def _refusal(text: str) -> Schema:
    return {"description": text, "content": {"application/json": {"schema": {"$ref": _REF.format(name="Envelope")}}}}


def _in_path(name: str) -> Schema:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _in_query(name: str, query: Query) -> Schema:
    return {"name": name, "in": "query", "required": query.is_needed, "schema": query.schema}


def _summary(handler: Handler) -> str:
    """The first paragraph of a handler's docstring, without the call that it begins with."""
    text = " ".join((handler.__doc__ or "").partition("\n\n")[0].split())
    found = _SUMMARY.fullmatch(text)
    words = (found[1] if found is not None else text).strip()
    return (words[:1].upper() + words[1:]) or handler.__name__.replace("_", " ").capitalize()
