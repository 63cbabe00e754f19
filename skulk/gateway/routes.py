"""Every route, once; ``GET /`` lists them."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler

from skulk.gateway import chat, downloads, drains, embeddings, generations, instances, models, nodes
from skulk.gateway.keys import SPEC
from skulk.gateway.openapi import document
from skulk.gateway.replies import json_response


async def index(request: web.Request) -> web.Response:
    """``GET /``: what there is."""
    listed = [f"{method} {path}" for method, path, _ in ROUTES]
    return json_response({"name": "skulk", "version": request.app[SPEC].version, "routes": listed})


async def show_document(request: web.Request) -> web.Response:
    """``GET /openapi.json``: this API as OpenAPI 3.1."""
    del request
    return json_response(_document())


@cache
def _document() -> dict[str, Any]:
    """Made once: it takes milliseconds in which no stream is served."""
    return document(ROUTES)


ROUTES: Final[tuple[tuple[str, str, Handler], ...]] = (
    ("GET", "/", index),
    ("GET", "/openapi.json", show_document),
    ("GET", "/health", nodes.health),
    ("GET", "/ready", nodes.ready),
    ("GET", "/metrics", nodes.metrics),
    ("GET", "/node_id", nodes.node_id),
    ("GET", "/node/identity", nodes.identity),
    ("GET", "/state", nodes.state),
    ("GET", "/events", nodes.events),
    ("GET", "/v1/diagnostics/node", nodes.diagnose_node),
    ("GET", "/v1/diagnostics/cluster", nodes.diagnose_cluster),
    ("GET", "/v1/diagnostics/cluster/timeline", nodes.timeline),
    ("POST", "/admin/restart", nodes.restart),
    ("POST", "/place_instance", instances.place_instance),
    ("POST", "/instance", instances.create_instance),
    ("GET", "/instance/previews", instances.previews),
    ("GET", "/instance/placement", instances.placement),
    ("GET", "/instance/{instance_id}", instances.show_instance),
    ("DELETE", "/instance/{instance_id}", instances.delete_instance),
    ("POST", "/nodes/{node}/drain", drains.drain_node),
    ("DELETE", "/nodes/{node}/drain", drains.undrain_node),
    ("GET", "/models", models.list_models),
    ("GET", "/models/search", models.search_models),
    ("POST", "/models/add", downloads.add_model),
    ("POST", "/download/start", downloads.start_download),
    ("DELETE", "/download/{node_id}/{model_id:.+}", downloads.delete_download),
    ("GET", "/store/registry", downloads.registry),
    ("POST", "/store/models/{model_id:.+}/download", downloads.pull_model),
    ("GET", "/store/models/{model_id:.+}/download/status", downloads.pull_status),
    ("POST", "/store/models/{model_id:.+}/verify", downloads.verify_model),
    ("DELETE", "/store/models/{model_id:.+}", downloads.remove_model),
    ("GET", "/v1/models", models.list_models),
    ("GET", "/v1/models/{model_id:.+}", models.show_model),
    ("POST", "/v1/chat/completions", chat.chat_completions),
    ("POST", "/bench/chat/completions", chat.bench_chat_completions),
    ("POST", "/v1/completions", chat.completions),
    ("POST", "/v1/embeddings", embeddings.embeddings),
    ("POST", "/v1/rerank", embeddings.rerank),
    ("POST", "/tokenize", embeddings.tokenize),
    ("POST", "/detokenize", embeddings.detokenize),
    ("POST", "/v1/cancel/{command_id}", generations.cancel),
)


def add_routes(app: web.Application) -> None:
    """Adds them all; ``HEAD`` answers wherever ``GET`` does."""
    for method, path, handler in ROUTES:
        if method == "GET":
            app.router.add_get(path, handler)
        else:
            app.router.add_route(method, path, handler)
