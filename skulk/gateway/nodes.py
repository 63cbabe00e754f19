"""Who this node is, how it and the cluster fare, and the event log."""

from __future__ import annotations

import logging
import socket
from typing import Any, Final

import msgspec
from aiohttp import web

from skulk.bus.subjects import EVENTS_HISTORY, NODE_RESTART
from skulk.errors import SkulkError
from skulk.gateway.bodies import whole_number
from skulk.gateway.compat.diagnostics import cluster_json, node_json, timeline_json
from skulk.gateway.compat.state import state_json
from skulk.gateway.keys import BUS, CARDS, CLOCK, DISPATCHER, METRICS, REPLICA, SPEC
from skulk.gateway.metrics import CONTENT_TYPE
from skulk.gateway.replies import json_response
from skulk.ids import new_id
from skulk.wire.commands import HistoryRequest, RestartNode
from skulk.wire.events import EventRecord

log = logging.getLogger("skulk.gateway")

MAX_EVENTS: Final = 1_000
HISTORY_WAIT_S: Final = 2.0
RESTART_WAIT_S: Final = 5.0


async def node_id(request: web.Request) -> web.Response:
    """``GET /node_id``: this node's id, a bare JSON string."""
    return json_response(request.app[SPEC].node_id)


async def identity(request: web.Request) -> web.Response:
    """``GET /node/identity``: this node's id, host name and the address that this very request came to."""
    name: Any = None if request.transport is None else request.transport.get_extra_info("sockname")
    return json_response(
        {
            "nodeId": request.app[SPEC].node_id,
            "hostname": socket.gethostname(),
            "ipAddress": name[0] if isinstance(name, tuple) else "",
        }
    )


async def health(request: web.Request) -> web.Response:
    """``GET /health``: the process answers."""
    return json_response({"status": "ok", "version": request.app[SPEC].version})


async def ready(request: web.Request) -> web.Response:
    """``GET /ready``: whether it serves: 200 while the bus is connected and a master leads, else 503."""
    missing: list[str] = []
    if request.app[BUS].state != "connected":
        missing.append("bus")
    if request.app[REPLICA].view.master is None:
        missing.append("master")
    if not missing:
        return json_response({"status": "ready"})
    response = json_response({"status": "not_ready", "missing": missing}, status=503)
    response.headers["Retry-After"] = "1"
    return response


async def state(request: web.Request) -> web.Response:
    """``GET /state``: everything that is known of the cluster, in the words of existing clients."""
    clock, cards = request.app[CLOCK], request.app[CARDS]
    by_id = {known.card.model_id: known.card for known in cards.all()}
    return json_response(state_json(request.app[REPLICA].view, by_id, clock.now(), clock.wall()))


async def events(request: web.Request) -> web.Response:
    """``GET /events``: the newest events, oldest first; ``?since=SEQ`` only those after it."""
    since = whole_number(request, "since", 0, low=0, high=2**53)
    limit = whole_number(request, "limit", MAX_EVENTS, low=1, high=MAX_EVENTS)
    return json_response(await _history(request, limit, since))


async def _history(request: web.Request, limit: int, since: int) -> tuple[EventRecord, ...]:
    """From the own ring; what came before this process began to listen is asked of a node's."""
    replica = request.app[REPLICA]
    own = replica.history(limit, since)
    oldest = own[0].position.seq if own else replica.view.state.position.seq + 1
    if oldest <= since + 1 or len(own) == limit:
        return own
    question = HistoryRequest(limit=limit, since=since)
    try:
        told = await request.app[BUS].request(EVENTS_HISTORY, question, timeout_s=HISTORY_WAIT_S)
    except SkulkError as error:
        log.info("no node told its events: %s", error)
        return own
    by_position = {record.position: record for record in (*told.events, *own)}
    return tuple(by_position[position] for position in sorted(by_position))[-limit:]


async def metrics(request: web.Request) -> web.Response:
    """``GET /metrics``: counters and gauges for Prometheus."""
    dispatcher = request.app[DISPATCHER]
    text = request.app[METRICS].text(
        request.app[BUS].counters,
        streams_open=dispatcher.open_runs,
        waiting=dispatcher.waiting,
        queued=dispatcher.queued,
        failovers=dispatcher.failovers,
    )
    return web.Response(body=text.encode(), headers={"Content-Type": CONTENT_TYPE})


async def diagnose_node(request: web.Request) -> web.Response:
    """``GET /v1/diagnostics/node``: this node's runners and its bus."""
    spec = request.app[SPEC]
    told = node_json(request.app[REPLICA].view, spec.node_id, spec.version)
    return json_response({**told, "bus": msgspec.to_builtins(request.app[BUS].counters)})


async def restart(request: web.Request) -> web.Response:
    """``POST /admin/restart``: this node stops in order and starts again, under the same command line."""
    spec = request.app[SPEC]
    asked = RestartNode(command_id=new_id())
    reply = await request.app[BUS].request(NODE_RESTART, asked, timeout_s=RESTART_WAIT_S, node=spec.node_id)
    return json_response(
        {"message": "Restarting.", "command_id": reply.command_id, "node_id": reply.node_id}, status=202
    )


async def timeline(request: web.Request) -> web.Response:
    """``GET /v1/diagnostics/cluster/timeline``: what happened, oldest first; ``limit`` as in ``/events``."""
    limit = whole_number(request, "limit", MAX_EVENTS, low=1, high=MAX_EVENTS)
    return json_response(timeline_json(await _history(request, limit, 0), request.app[SPEC].node_id))


async def diagnose_cluster(request: web.Request) -> web.Response:
    """``GET /v1/diagnostics/cluster``: every live node's runners, and where its API is."""
    spec = request.app[SPEC]
    return json_response(cluster_json(request.app[REPLICA].view, spec.node_id, spec.version))
