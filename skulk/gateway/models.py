"""The models that this node knows, in OpenAI's list and with what existing clients read."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from skulk.errors import RequestError
from skulk.gateway.bodies import whole_number
from skulk.gateway.cards import STATES, KnownModel
from skulk.gateway.compat.cards import model_json
from skulk.gateway.keys import CARDS
from skulk.gateway.replies import json_response

MAX_FOUND = 100


async def list_models(request: web.Request) -> web.Response:
    """``GET /v1/models`` and ``/models``; ``?state=ready`` filters."""
    state = request.query.get("state")
    if state is not None and state not in STATES:
        raise RequestError("invalid_request", f"state must be one of {', '.join(STATES)}", param="state")
    return _list(known for known in request.app[CARDS].all() if state in (None, known.state))


async def search_models(request: web.Request) -> web.Response:
    """``GET /models/search``: known models whose id, name or family holds every word of ``query`` (or ``q``)."""
    words = (request.query.get("query") or request.query.get("q") or "").lower().split()
    limit = whole_number(request, "limit", MAX_FOUND, low=1, high=1_000)
    found = [known for known in request.app[CARDS].all() if all(word in _text(known) for word in words)]
    return _list(found[:limit])


async def show_model(request: web.Request) -> web.Response:
    """``GET /v1/models/{model_id}``; ids hold slashes."""
    known = request.app[CARDS].need(request.match_info["model_id"])
    return json_response(_json(known))


def _list(models: Any) -> web.Response:
    return json_response({"object": "list", "data": [_json(known) for known in models]})


def _json(known: KnownModel) -> dict[str, Any]:
    return model_json(known.card, known.state, known.problem)


def _text(known: KnownModel) -> str:
    return f"{known.card.model_id} {known.card.name} {known.card.family}".lower()
