"""The models that the cluster knows, in OpenAI's list and with what existing clients read."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from skulk.errors import RequestError, SkulkError
from skulk.gateway.bodies import flag, whole_number
from skulk.gateway.cards import STATES, KnownModel
from skulk.gateway.compat.cards import found_json, model_json
from skulk.gateway.keys import CARDS
from skulk.gateway.replies import json_response
from skulk.gateway.stores import STORES

MAX_FOUND = 100
MAX_HUB = 50


async def list_models(request: web.Request) -> web.Response:
    """``GET /v1/models`` and ``/models``: the models that the cluster knows, the ready ones first."""
    state = request.query.get("state")
    if state is not None and state not in STATES:
        raise RequestError("invalid_request", f"state must be one of {', '.join(STATES)}", param="state")
    return _list(known for known in await request.app[STORES].all() if state in (None, known.state))


async def search_models(request: web.Request) -> web.Response:
    """``GET /models/search``: known models whose id, name or family holds every word of ``query`` (or ``q``), then
    what the hub finds where a node may ask it; ``?hub=0`` leaves that out.
    """
    query = request.query.get("query") or request.query.get("q") or ""
    words = query.lower().split()
    may_ask_hub = flag(request, "hub", default=True)
    limit = whole_number(request, "limit", MAX_FOUND, low=1, high=1_000)
    known = await request.app[STORES].all()
    found = [_json(one) for one in known if all(word in _text(one) for word in words)]
    answer: dict[str, Any] = {"object": "list", "data": found[:limit]}
    if words and may_ask_hub and request.app[STORES].may_ask_hub():
        answer |= await _on_hub(request, query, {entry["id"] for entry in found}, limit - len(found))
        answer["data"] = [*found, *answer["data"]][:limit]
    return json_response(answer)


async def _on_hub(request: web.Request, query: str, known: set[str], limit: int) -> dict[str, Any]:
    """What the hub finds beyond what is known; its silence is told, not raised: the known models are an answer too."""
    if limit <= 0:
        return {"data": []}
    try:
        told = await request.app[STORES].search(query, min(limit, MAX_HUB))
    except SkulkError as error:
        return {"data": [], "hub_error": {"code": error.code, "message": error.detail}}
    return {"data": [found_json(one) for one in told.found if one.repo not in known]}


async def show_model(request: web.Request) -> web.Response:
    """``GET /v1/models/{model_id}``: one model; ids hold slashes."""
    model_id = request.match_info["model_id"]
    listed = next((known for known in await request.app[STORES].all() if known.card.model_id == model_id), None)
    return json_response(_json(listed or request.app[CARDS].need(model_id)))


def _list(models: Any) -> web.Response:
    return json_response({"object": "list", "data": [_json(known) for known in models]})


def _json(known: KnownModel) -> dict[str, Any]:
    return model_json(known.card, known.state, known.problem)


def _text(known: KnownModel) -> str:
    return f"{known.card.model_id} {known.card.name} {known.card.family}".lower()
