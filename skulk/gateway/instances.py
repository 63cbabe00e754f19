"""Placing, proposing, showing and deleting instances."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from aiohttp import web

from skulk.bus.subjects import MASTER_DELETE, MASTER_PLACE, MASTER_PREVIEW
from skulk.errors import RequestError, UnavailableError
from skulk.gateway.bodies import flag, needed, read_as, read_object, whole_number
from skulk.gateway.cards import KnownModel
from skulk.gateway.compat.cards import card_json
from skulk.gateway.compat.instances import instance_json, instance_of_json
from skulk.gateway.compat.previews import chosen_report, decision_json, previews_json, proposed_json
from skulk.gateway.generations import timeout_of
from skulk.gateway.keys import CLOCK, MASTERS, REPLICA
from skulk.gateway.readiness import READY_WAIT_S, wait_ready, waits_for_ready
from skulk.gateway.replies import json_response
from skulk.gateway.stores import STORES
from skulk.ids import is_token, new_id
from skulk.wire.commands import DeleteInstance, PlacementReply, PlaceModel, PreviewPlacement
from skulk.wire.model import ModelCard
from skulk.wire.placement import InstanceMeta, PlacementDecision, PlacementRequest, Sharding
from skulk.wire.state import Instance

PREVIEW_WAIT_S: Final = 10.0
MAX_NODES: Final = 1_000
MAX_ID: Final = 128
MAX_REPLICAS: Final = 64

_Node = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
_Nodes = Annotated[list[_Node], msgspec.Meta(max_length=MAX_NODES)]
_Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class PlaceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``POST /place_instance``; from ``node_ids`` on the fields are ours."""

    model_id: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    sharding: Sharding = "Pipeline"
    instance_meta: InstanceMeta = "MlxRing"
    min_nodes: _Count = 1
    excluded_nodes: _Nodes = []
    node_ids: _Nodes = []
    context_length: _Count | None = None
    n_parallel: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    replicas: Annotated[int, msgspec.Meta(ge=1, le=MAX_REPLICAS)] = 1
    force: bool = False


class CreateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /instance``: a preview's instance, verbatim."""

    instance: dict[str, Any]


async def place_instance(request: web.Request) -> web.Response:
    """``POST /place_instance``: places one more instance, or several; answered when nodes have accepted them."""
    sent = read_as(await read_object(request), PlaceRequest)
    waits = waits_for_ready(request)
    known = await request.app[STORES].known(sent.model_id, param="model_id")
    card = placeable(known)
    wanted = PlacementRequest(
        card=card,
        sharding=sent.sharding,
        instance_meta=sent.instance_meta,
        min_nodes=one_node(sent.min_nodes, card),
        excluded_nodes=tuple(sent.excluded_nodes),
        node_ids=tuple(sent.node_ids),
        context_length=sent.context_length,
        n_parallel=sent.n_parallel,
        force=sent.force,
    )
    command = PlaceModel(command_id=new_id(), request=wanted, replicas=sent.replicas)
    return await _place(request, command, waits=waits)


async def create_instance(request: web.Request) -> web.Response:
    """``POST /instance``: exactly the instance that a preview proposed, on that node and under that id."""
    sent = read_as(await read_object(request), CreateRequest)
    named = instance_of_json(sent.instance)
    if named is None:
        raise RequestError(
            "invalid_request",
            "instance must be one of GET /instance/previews, on one node, with instanceId and shardAssignments",
            param="instance",
        )
    instance_id, model_id, node_id = named
    if not is_token(instance_id) or len(instance_id) > MAX_ID:
        raise RequestError(
            "invalid_request", f"instanceId must be 1 to {MAX_ID} of a-z, 0-9, _ and -", param="instance.instanceId"
        )
    known = await request.app[STORES].known(model_id, param="instance.shardAssignments.modelId")
    wanted = PlacementRequest(card=placeable(known), node_ids=(node_id,))
    command = PlaceModel(command_id=new_id(), request=wanted, instance_id=instance_id)
    return await _place(request, command, waits=waits_for_ready(request))


async def _place(request: web.Request, command: PlaceModel, *, waits: bool) -> web.Response:
    masters = request.app[MASTERS]
    reply = await masters.ask(MASTER_PLACE, command)
    _check_placed(reply)
    await masters.seen(reply.position, f"the instance {reply.instance_id} is placed")
    # an older master names only the one
    instance_ids = reply.instance_ids or (reply.instance_id,)
    if waits:
        timeout_s = timeout_of(request, READY_WAIT_S)
        await wait_ready(request.app[REPLICA], request.app[CLOCK], instance_ids, timeout_s)
    return json_response(
        {
            "message": "Command received.",
            "command_id": reply.command_id,
            "instance_id": reply.instance_id,
            "instance_ids": list(instance_ids),
            "model_card": card_json(command.request.card),
            "decision": decision_json(reply.decision),
            "warnings": list(reply.warnings),
        }
    )


def _check_placed(reply: PlacementReply) -> None:
    match reply.decision.outcome:
        case "placed":
            return
        case "unplaceable":
            raise RequestError("unplaceable", reply.decision.reason)
        case "pending":
            raise UnavailableError("facts_pending", reply.decision.reason, retry_after_s=5)


async def delete_instance(request: web.Request) -> web.Response:
    """``DELETE /instance/{instance_id}``: answered when its node has stopped the runner."""
    instance_id = _instance(request).instance_id
    command = DeleteInstance(command_id=new_id(), instance_id=instance_id)
    masters = request.app[MASTERS]
    reply = await masters.ask(MASTER_DELETE, command)
    await masters.seen(reply.position, f"the instance {instance_id} is deleted")
    return json_response(
        {"message": "Command received.", "command_id": reply.command_id, "instance_id": reply.instance_id}
    )


async def show_instance(request: web.Request) -> web.Response:
    """``GET /instance/{instance_id}``: one instance as ``/state`` has it."""
    return json_response(instance_json(request.app[REPLICA].view, _instance(request)))


async def previews(request: web.Request) -> web.Response:
    """``GET /instance/previews``: what placing the model would decide now, with a report for every node."""
    wanted, decision = await _preview(request)
    return json_response(previews_json(wanted, decision, new_id()))


async def placement(request: web.Request) -> web.Response:
    """``GET /instance/placement``: the would-be instance alone, or why there is none."""
    wanted, decision = await _preview(request)
    chosen = chosen_report(decision)
    if chosen is None:
        if decision.outcome == "pending":
            raise UnavailableError("facts_pending", decision.reason, retry_after_s=5)
        raise RequestError("unplaceable", decision.reason)
    return json_response(proposed_json(wanted, chosen, new_id()))


async def _preview(request: web.Request) -> tuple[PlacementRequest, PlacementDecision]:
    query = request.query
    known = await request.app[STORES].known(needed(request, "model_id"), param="model_id")
    card = placeable(known)
    wanted = PlacementRequest(
        card=card,
        min_nodes=one_node(whole_number(request, "min_nodes", 1, low=1, high=MAX_NODES), card),
        excluded_nodes=tuple(query.getall("excluded_node_ids", []))[:MAX_NODES],
        node_ids=tuple(query.getall("node_ids", []))[:MAX_NODES],
        context_length=_count(request, "context_length"),
        n_parallel=_count(request, "n_parallel"),
        force=flag(request, "force", default=False),
    )
    question = PreviewPlacement(request=wanted)
    return wanted, await request.app[MASTERS].ask(MASTER_PREVIEW, question, timeout_s=PREVIEW_WAIT_S)


def _count(request: web.Request, name: str) -> int | None:
    """A count in the query; None where it isn't there."""
    return whole_number(request, name, 1, low=1, high=2**31 - 1) if name in request.query else None


def _instance(request: web.Request) -> Instance:
    instance_id = request.match_info["instance_id"]
    found = request.app[REPLICA].view.state.instances.get(instance_id)
    if found is None:
        raise RequestError(
            "instance_not_found", f"there is no instance {instance_id[:MAX_ID]!r}; GET /state lists them"
        )
    return found


def placeable(known: KnownModel) -> ModelCard:
    """The card to place; files that are broken here don't matter where another node holds whole ones."""
    if known.problem and known.state == "available":
        raise RequestError("model_file_invalid", known.problem, param="model_id")
    return known.card


def one_node(min_nodes: int, card: ModelCard) -> int:
    """How many nodes one instance takes: one.

    Raises:
        RequestError: ``sharding_unsupported``; ``unsupported_field``: where the engine could and we don't.
    """
    if min_nodes > 1 and card.format == "gguf":
        raise RequestError(
            "sharding_unsupported",
            f"min_nodes {min_nodes}: llama.cpp serves {card.model_id} on one node; send min_nodes 1 (and replicas for "
            "more instances)",
            param="min_nodes",
        )
    if min_nodes > 1:
        raise RequestError(
            "unsupported_field",
            f"min_nodes {min_nodes}: this version lacks sharding over nodes; send min_nodes 1",
            param="min_nodes",
        )
    return min_nodes
