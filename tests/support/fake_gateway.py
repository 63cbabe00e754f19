"""A gateway of recorded answers, on a real socket in a thread of its own: what the command line talks to in tests.

The shapes are those of `skulk.gateway.compat`; a test compares the two, so that they can't drift apart.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from aiohttp import web

MODEL = "org/model-GGUF"
NODE = "aaaa000000000001"
INSTANCE = "1b6cf1e0-6d2c-4a0e-9a3e-2f6f0d4f6a11"
START_S = 10.0


def instance(
    instance_id: str = INSTANCE, *, model_id: str = MODEL, node_id: str | None = NODE, reason: str = ""
) -> dict[str, Any]:
    """An instance as ``/state`` has it; pending without a node."""
    runner = f"{instance_id}-1"
    shard = {"modelCard": {"modelId": model_id}, "deviceRank": 0, "worldSize": 1, "resolvedBackend": "llama_cpp-cpu"}
    return {
        "MlxRingInstance": {
            "instanceId": instance_id,
            "shardAssignments": {
                "modelId": model_id,
                "nodeToRunner": {} if node_id is None else {node_id: runner},
                "runnerToShard": {} if node_id is None else {runner: {"PipelineShardMetadata": shard}},
            },
            "contextTokenLimit": 0 if node_id is None else 4096,
            "phase": "pending" if node_id is None else "ready",
            "reason": reason,
        }
    }


def runner(tag: str = "RunnerReady", **body: Any) -> dict[str, Any]:
    """A runner as ``/state`` has it."""
    return {tag: body}


def state(**changes: Any) -> dict[str, Any]:
    """``GET /state`` of one healthy node without instances."""
    return {
        "instances": {},
        "runners": {},
        "downloads": {NODE: []},
        "topology": {"nodes": [NODE], "connections": {NODE: {}}},
        "nodeIdentities": {NODE: {"friendlyName": "attic", "skulkVersion": "0.1.0", "chipId": "AMD Ryzen"}},
        "nodeMemory": {NODE: {"ramTotal": {"inBytes": 16 * 2**30}, "ramAvailable": {"inBytes": 12 * 2**30}}},
        "nodeSystem": {NODE: {"accelerator": None}},
        "nodeDisk": {NODE: {"total": {"inBytes": 2**40}, "available": {"inBytes": 2**39}}},
        "nodeHealth": {NODE: {"level": "ok", "reasons": []}},
        "nodeBackends": {NODE: ["llama_cpp", "llama_cpp-cpu"]},
        "lastSeen": {NODE: "2026-01-31T12:00:00+00:00"},
        "lastEventAppliedIdx": 3,
        "master": NODE,
        "term": 1,
        "draining": [],
        **changes,
    }


def placed_state(tag: str = "RunnerReady", **body: Any) -> dict[str, Any]:
    """``GET /state`` with one instance whose runner is so far."""
    return state(instances={INSTANCE: instance()}, runners={f"{INSTANCE}-1": runner(tag, **body)})


def model(model_id: str = MODEL, kind: str = "ready", **changes: Any) -> dict[str, Any]:
    """An entry of ``/v1/models``."""
    return {
        "id": model_id,
        "object": "model",
        "created": 0,
        "owned_by": "org",
        "family": "llama",
        "context_length": 8192,
        "storage_size_megabytes": 98,
        "state": kind,
        **changes,
    }


def event(seq: int, kind: str, **body: Any) -> dict[str, Any]:
    """An event as ``/events`` has it."""
    term = {"number": 1, "node_id": NODE, "incarnation": "0001"}
    return {"position": {"term": term, "seq": seq}, "at": 1_769_860_800.0 + seq, "event": {"type": kind, **body}}


def report(node_id: str = NODE, **changes: Any) -> dict[str, Any]:
    """A node's report of a placement decision."""
    memory = {"weights_bytes": 1, "kv_bytes": 1, "compute_bytes": 1, "headroom_bytes": 1, "need_bytes": 300 * 2**20}
    return {
        "node_id": node_id,
        "name": "attic",
        "filter": None,
        "detail": "",
        "backend": "llama_cpp-cpu",
        "context_length": 4096,
        "memory": memory,
        "available_bytes": 12 * 2**30,
        "score": {"backend_rank": 3.0},
        **changes,
    }


def decision(outcome: str = "placed", **changes: Any) -> dict[str, Any]:
    """The decision of ``/instance/previews``."""
    nodes = [NODE] if outcome == "placed" else []
    return {"outcome": outcome, "reason": "attic has the room", "nodes": nodes, "reports": [report()], **changes}


def chunk(text: str | None = None, finish: str | None = None, **rest: Any) -> dict[str, Any]:
    """One event of a chat stream."""
    delta = {} if text is None else {"content": text}
    choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": MODEL,
        "choices": choices,
        **rest,
    }


def answer_chunks(*pieces: str, finish: str = "stop") -> list[dict[str, Any]]:
    """A whole chat stream."""
    usage = {"prompt_tokens": 5, "completion_tokens": len(pieces), "total_tokens": 5 + len(pieces)}
    return [
        chunk(""),
        *(chunk(piece) for piece in pieces),
        chunk(finish=finish),
        {**chunk(), "choices": [], "usage": usage},
    ]


def envelope(message: str, code: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error as the API tells it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Request:
    """What one call sent."""

    def __init__(
        self, method: str, path: str, query: list[tuple[str, str]], headers: dict[str, str], body: Any
    ) -> None:
        self.line = f"{method} {path}"
        self.query = query
        self.headers = headers
        self.body = body


class FakeGateway:
    """Set what it answers, look at what it was asked. ``states`` are told one after another, the last one for ever."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = [state()]
        self.models: list[dict[str, Any]] = [model()]
        self.events: list[dict[str, Any]] = []
        self.decision: dict[str, Any] = decision()
        self.chunks: list[dict[str, Any]] = answer_chunks("Nile, ", "Rhine, ", "Amazon")
        self.breaks_off = False
        self.pulls: list[dict[str, Any]] = []
        self.problem = ""
        self.refusals: dict[str, tuple[int, Any]] = {}
        self.requests: list[Request] = []
        self.on_request: Callable[[Request], None] = lambda _: None
        self.url = ""
        self.warnings: list[str] = []
        self._thread = threading.Thread(target=self._run, name="fake-gateway")
        self._started = threading.Event()

    def __enter__(self) -> FakeGateway:
        self._thread.start()
        assert self._started.wait(START_S)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_S)
        assert not self._thread.is_alive()

    @property
    def lines(self) -> list[str]:
        """Method and path of each request."""
        return [request.line for request in self.requests]

    def body_of(self, line: str) -> Any:
        """The body of the last request of that method and path."""
        return next(request.body for request in reversed(self.requests) if request.line == line)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(middlewares=[self._note])
        app.router.add_get("/state", self._state)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/events", self._events)
        app.router.add_get("/instance/previews", self._previews)
        app.router.add_post("/place_instance", self._place)
        app.router.add_delete("/instance/{id}", self._delete)
        app.router.add_post("/nodes/{node}/drain", self._drain)
        app.router.add_delete("/nodes/{node}/drain", self._drain)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/store/models/{id:.+}/download", self._pull)
        app.router.add_get("/store/models/{id:.+}/download/status", self._pull)
        app.router.add_post("/store/models/{id:.+}/verify", self._verify)
        app.router.add_delete("/store/models/{id:.+}", self._remove)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._started.set()
        await self._stop.wait()
        await runner.cleanup()

    @web.middleware
    async def _note(self, request: web.Request, handler: Any) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        seen = Request(request.method, request.path, list(request.query.items()), dict(request.headers), body)
        self.requests.append(seen)
        self.on_request(seen)
        if seen.line in self.refusals:
            status, told = self.refusals[seen.line]
            text = told if isinstance(told, str) else json.dumps(told)
            return web.Response(status=status, text=text, content_type="application/json")
        return await handler(request)

    async def _state(self, _: web.Request) -> web.Response:
        return web.json_response(self.states.pop(0) if len(self.states) > 1 else self.states[0])

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": self.models})

    async def _events(self, request: web.Request) -> web.Response:
        since = int(request.query.get("since", "0"))
        return web.json_response([one for one in self.events if one["position"]["seq"] > since])

    async def _previews(self, _: web.Request) -> web.Response:
        return web.json_response({"previews": [], "decision": self.decision})

    async def _place(self, request: web.Request) -> web.Response:
        body = await request.json()
        ids = [INSTANCE, *(f"{number}{INSTANCE[1:]}" for number in range(2, 10))][: body.get("replicas", 1)]
        told = {"message": "Command received.", "command_id": "c1", "model_card": {"modelId": body["model_id"]}}
        more = {"instance_ids": ids, "decision": self.decision, "warnings": self.warnings}
        return web.json_response({**told, "instance_id": ids[0], **more})

    async def _delete(self, request: web.Request) -> web.Response:
        told = {"message": "Command received.", "command_id": "c1", "instance_id": request.match_info["id"]}
        return web.json_response(told)

    async def _pull(self, _: web.Request) -> web.Response:
        return web.json_response(self.pulls.pop(0) if len(self.pulls) > 1 else self.pulls[0])

    async def _verify(self, request: web.Request) -> web.Response:
        result = {"node_id": NODE, "problem": self.problem, "is_pinned": True}
        return web.json_response({"model_id": request.match_info["id"], "results": [result]})

    async def _remove(self, request: web.Request) -> web.Response:
        told = {"model_id": request.match_info["id"], "removed": [{"node_id": NODE, "freed_bytes": 2 * 2**20}]}
        return web.json_response(told)

    async def _drain(self, request: web.Request) -> web.Response:
        is_draining = request.method == "POST"
        told = {"message": "Command received.", "command_id": "c1", "node_id": NODE, "draining": is_draining}
        return web.json_response({**told, "instance_ids": [INSTANCE] if is_draining else []})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        await response.write(b": command_id c1\n\n: keep-alive\n\n")
        for one in self.chunks:
            await response.write(f"data: {json.dumps(one, ensure_ascii=False)}\n\n".encode())
        if not self.breaks_off:
            await response.write(b"data: [DONE]\n\n")
        return response
