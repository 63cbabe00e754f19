"""Weights over HTTP: what clients of the earlier system call, and the same for people.

| call                                              | does                                                            |
|---------------------------------------------------|-----------------------------------------------------------------|
| `POST /models/add {model_id}`                     | resolves a name of the hub and keeps its card                   |
| `POST /download/start`                            | begins a download on a node; again and again does no harm       |
| `DELETE /download/{node}/{model}`                 | ends it; where it is complete, deletes the files                |
| `GET /store/registry`                             | what lies on disks                                              |
| `POST /store/models/{id}/download`, `GET …/status`| begins it on one node; how far it is                            |
| `POST /store/models/{id}/verify`                  | hashes the files anew                                           |
| `DELETE /store/models/{id}`                       | deletes the files, on one node or on all that have them         |
"""

from __future__ import annotations

from typing import Annotated, Any, Final, cast

import msgspec
from aiohttp import web

from skulk.errors import RequestError, SkulkError
from skulk.gateway.bodies import read_as, read_object
from skulk.gateway.compat.cards import model_json
from skulk.gateway.compat.downloads import registry_json, status_json
from skulk.gateway.replies import json_response
from skulk.gateway.stores import STORES
from skulk.ids import new_id
from skulk.wire.store import DownloadStatus, RemovedModel

RUNNING: Final = ("waiting", "fetching", "verifying")
_Model = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]


class AddRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /models/add``: resolves a name of the hub and keeps its card."""

    model_id: _Model


class StartRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /download/start``: the node, and a shard as ``/state`` has it."""

    targetNodeId: str = ""  # noqa: N815 - the clients' word
    shardMetadata: dict[str, Any]  # noqa: N815


class NodeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /store/models/{id}/verify``; all of it may be left out."""

    node_id: str = ""


class PullRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /store/models/{id}/download``; all of it may be left out."""

    node_id: str = ""
    pinned: bool | None = None


async def add_model(request: web.Request) -> web.Response:
    """``POST /models/add``."""
    sent = read_as(await read_object(request), AddRequest)
    stores = request.app[STORES]
    known = await stores.known(sent.model_id, param="model_id")
    await stores.add(known.card)
    return json_response(model_json(known.card, known.state, known.problem))


async def start_download(request: web.Request) -> web.Response:
    """``POST /download/start``: begins a download on a node; again and again does no harm."""
    sent = read_as(await read_object(request), StartRequest)
    stores = request.app[STORES]
    known = await stores.known(_model_of(sent.shardMetadata), param="shardMetadata")
    node_id = stores.node(sent.targetNodeId)
    status = await stores.pull(node_id, known.card)
    return json_response({"message": "Command received.", "command_id": new_id(), **status_json(status, node_id)})


def _model_of(shard: dict[str, Any]) -> str:
    """The model id in a tagged shard, or in a bare one."""
    for body in (shard, *shard.values()):
        if not isinstance(body, dict):
            continue
        found = cast("dict[str, Any]", body)
        card = found.get("modelCard") or found.get("model_card")
        if isinstance(card, dict):
            named = cast("dict[str, Any]", card)
            model_id = named.get("modelId") or named.get("model_id")
            if isinstance(model_id, str) and 0 < len(model_id) <= 512:
                return model_id
    raise RequestError(
        "invalid_request", "shardMetadata must hold a modelCard with a modelId, as in GET /state", param="shardMetadata"
    )


async def delete_download(request: web.Request) -> web.Response:
    """``DELETE /download/{node_id}/{model_id}``: ends a download; where it is complete, deletes the files."""
    stores, model_id = request.app[STORES], request.match_info["model_id"]
    node_id = stores.node(request.match_info["node_id"])
    running = stores.statuses(model_id).get(node_id)
    if running is not None and running.phase in RUNNING:
        status = await stores.stop(node_id, model_id)
        return json_response({"message": "Download cancelled.", "command_id": new_id(), **status_json(status, node_id)})
    removed = await stores.remove(node_id, model_id)
    return json_response({"message": "Model deleted.", "command_id": new_id(), **_removed_json(removed, node_id)})


async def registry(request: web.Request) -> web.Response:
    """``GET /store/registry``: the weights that lie on disks."""
    return json_response({"entries": registry_json(request.app[STORES].view)})


async def pull_model(request: web.Request) -> web.Response:
    """``POST /store/models/{model_id}/download``: begins a download on one node."""
    sent = read_as(await read_object(request) if request.can_read_body else {}, PullRequest)
    stores = request.app[STORES]
    known = await stores.known(request.match_info["model_id"], param="model_id")
    node_id = stores.node(sent.node_id)
    status = await stores.pull(node_id, known.card, pinned=sent.pinned)
    return json_response(status_json(status, node_id))


async def pull_status(request: web.Request) -> web.Response:
    """``GET /store/models/{model_id}/download/status``: how far a download is; ``?node_id=`` of one node."""
    stores, model_id = request.app[STORES], request.match_info["model_id"]
    wanted = request.query.get("node_id")
    node_id = stores.node(wanted) if wanted else None
    told = stores.statuses(model_id)
    if node_id is not None:
        told = {name: status for name, status in told.items() if name == node_id}
    holders = [name for name in stores.holders(model_id) if node_id in (None, name)]
    running = next(((name, status) for name, status in told.items() if status.phase in RUNNING), None)
    if running is None and holders:
        running = (holders[0], DownloadStatus(model_id=model_id, phase="done"))
    if running is None:
        running = next(iter(told.items()), None)
    if running is None:
        raise RequestError(
            "download_not_found",
            f"{model_id[:200]} isn't being fetched and lies on no node; POST …/download begins it.",
        )
    return json_response(status_json(running[1], running[0]))


async def verify_model(request: web.Request) -> web.Response:
    """``POST /store/models/{model_id}/verify``: hashes the files anew, on one node or on all that have them."""
    sent = read_as(await read_object(request) if request.can_read_body else {}, NodeRequest)
    stores, model_id = request.app[STORES], request.match_info["model_id"]
    results: list[dict[str, Any]] = []
    for node_id in _nodes_with(request, model_id, sent.node_id):
        verified = await stores.verify(node_id, model_id)
        results.append({"node_id": node_id, **msgspec.to_builtins(verified)})
    return json_response({"model_id": model_id, "results": results})


async def remove_model(request: web.Request) -> web.Response:
    """``DELETE /store/models/{model_id}``: deletes the files, on one node or on all that have or fetch them."""
    stores, model_id = request.app[STORES], request.match_info["model_id"]
    removed: list[dict[str, Any]] = []
    failure: SkulkError | None = None
    for node_id in _nodes_with(request, model_id, request.query.get("node_id", "")):
        try:
            removed.append(_removed_json(await stores.remove(node_id, model_id), node_id))
        except SkulkError as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return json_response({"model_id": model_id, "removed": removed})


def _nodes_with(request: web.Request, model_id: str, name: str) -> list[str]:
    stores = request.app[STORES]
    if name:
        return [stores.node(name)]
    nodes = sorted({*stores.holders(model_id), *stores.statuses(model_id)})
    if not nodes:
        raise RequestError(
            "model_not_found",
            f"{model_id[:200]} lies on no node; GET /store/registry lists what does.",
            param="model_id",
        )
    return nodes


def _removed_json(removed: RemovedModel, node_id: str) -> dict[str, Any]:
    return {"node_id": node_id, "model_id": removed.model_id, "freed_bytes": removed.freed_bytes}
