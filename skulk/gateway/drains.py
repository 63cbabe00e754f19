"""Draining a node, and taking that back."""

from __future__ import annotations

from typing import Annotated

import msgspec
from aiohttp import web

from skulk.bus.subjects import MASTER_DRAIN
from skulk.gateway.bodies import read_as, read_object
from skulk.gateway.keys import MASTERS
from skulk.gateway.replies import json_response
from skulk.ids import new_id
from skulk.wire.commands import DrainNode

MAX_NAME = 255


class DrainRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /nodes/{node}/drain``; may be left out."""

    reason: Annotated[str, msgspec.Meta(max_length=200)] = ""


async def drain_node(request: web.Request) -> web.Response:
    """``POST /nodes/{node}/drain``: no new work goes there, its instances move; holds over restarts until undone."""
    asked = read_as(await read_object(request), DrainRequest) if request.can_read_body else DrainRequest()
    return await _drain(request, DrainNode(command_id=new_id(), node=_node(request), reason=asked.reason))


async def undrain_node(request: web.Request) -> web.Response:
    """``DELETE /nodes/{node}/drain``: the node takes work again."""
    return await _drain(request, DrainNode(command_id=new_id(), node=_node(request), undo=True))


def _node(request: web.Request) -> str:
    return request.match_info["node"][:MAX_NAME]


async def _drain(request: web.Request, command: DrainNode) -> web.Response:
    masters = request.app[MASTERS]
    reply = await masters.ask(MASTER_DRAIN, command)
    await masters.seen(reply.position, f"the drain of {reply.node_id} is {'undone' if command.undo else 'begun'}")
    return json_response(
        {
            "message": "Command received.",
            "command_id": reply.command_id,
            "node_id": reply.node_id,
            "draining": not command.undo,
            "instance_ids": list(reply.instance_ids),
        }
    )
