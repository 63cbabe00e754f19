"""The calls beside generation, over real sockets: instances, state, models, identity, refusals, doors."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from skulk.bus.subjects import NODE_BEAT
from skulk.errors import RequestError, UnavailableError
from skulk.gateway.keys import DISPATCHER, REPLICA
from skulk.gateway.routes import ROUTES
from skulk.wire.base import ErrorBody
from skulk.wire.events import InstanceCreated, InstanceUnassigned
from skulk.wire.placement import NodeReport, PlacementDecision
from tests.support.http import MODEL, NODE, WAIT_S, Gateway, chat_body, hold, running_gateway
from tests.support.states import beat, instance


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tmp_path) as running:
        yield running


# Instances


async def test_place_shows_in_the_next_state(gateway: Gateway) -> None:
    body = {"model_id": MODEL, "sharding": "Pipeline", "instance_meta": "MlxRing", "min_nodes": 1, "excluded_nodes": []}
    answer = await gateway.call("POST", "/place_instance", body)
    assert answer.status == 200
    placed = answer.json
    known = {"message", "command_id", "instance_id", "model_card"}
    assert set(placed) == known | {"instance_ids", "decision", "warnings"}
    assert placed["instance_ids"] == [placed["instance_id"]]
    assert (placed["decision"]["outcome"], placed["warnings"]) == ("placed", [])
    assert placed["model_card"]["modelId"] == MODEL
    command = gateway.cluster.placed[0]
    assert placed["command_id"] == command.command_id
    assert (command.request.card.model_id, command.instance_id, command.ensure) == (MODEL, None, False)
    state = (await gateway.call("GET", "/state")).json
    assert placed["instance_id"] in state["instances"]


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({}, 400, "invalid_request", "model_id"),
        ({"model_id": 5}, 400, "invalid_request", "model_id"),
        ({"model_id": "no/such"}, 404, "model_not_found", "model_id"),
        ({"model_id": MODEL, "min_nodes": 2}, 400, "sharding_unsupported", "min_nodes"),
        ({"model_id": MODEL, "replicas": 0}, 400, "invalid_request", "replicas"),
        ({"model_id": MODEL, "replicas": 65}, 400, "invalid_request", "replicas"),
        ({"model_id": MODEL, "force": 1}, 400, "invalid_request", "force"),
        ({"model_id": MODEL, "min_nodes": 0}, 400, "invalid_request", "min_nodes"),
        ({"model_id": MODEL, "min_nodes": "1"}, 400, "invalid_request", "min_nodes"),
        ({"model_id": MODEL, "instance_meta": "Ring"}, 400, "invalid_request", "instance_meta"),
        ({"model_id": MODEL, "excluded_nodes": "aaaa"}, 400, "invalid_request", "excluded_nodes"),
        ({"model_id": MODEL, "excluded_nodes": [1]}, 400, "invalid_request", "excluded_nodes[0]"),
        ({"model_id": MODEL, "nodes": 2}, 400, "invalid_request", "nodes"),
    ],
)
async def test_place_refuses_with_the_field(
    gateway: Gateway, body: dict[str, Any], status: int, code: str, param: str
) -> None:
    answer = await gateway.call("POST", "/place_instance", body)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (status, code, param)
    assert not gateway.cluster.placed
    if code == "model_not_found":
        assert "GET /models/search?query=such" in answer.error["message"]


async def test_place_tells_why_nothing_fits(gateway: Gateway) -> None:
    gateway.cluster.refusal = RequestError("unplaceable", "host-aaaa: memory need 5.2 GiB have 3.9 GiB")
    answer = await gateway.call("POST", "/place_instance", {"model_id": MODEL})
    assert (answer.status, answer.error["code"]) == (400, "unplaceable")
    assert "need 5.2 GiB have 3.9 GiB" in answer.error["message"]


@pytest.mark.parametrize(
    ("outcome", "status", "code"), [("unplaceable", 400, "unplaceable"), ("pending", 503, "facts_pending")]
)
async def test_place_tells_a_decision_that_placed_nothing(
    gateway: Gateway, outcome: Any, status: int, code: str
) -> None:
    gateway.cluster.decision = PlacementDecision(outcome=outcome, reason="because")
    answer = await gateway.call("POST", "/place_instance", {"model_id": MODEL})
    assert (answer.status, answer.error["code"], answer.error["message"]) == (status, code, "because")
    assert ("Retry-After" in answer.headers) == (status == 503)


async def test_without_a_master_placing_is_503_and_reading_goes_on(gateway: Gateway, monkeypatch: Any) -> None:
    monkeypatch.setattr("skulk.gateway.masters.MASTER_WAIT_S", 0.2)
    gateway.cluster.leads = False
    await gateway.sees(lambda view: view.master is None)
    answer = await gateway.call("POST", "/place_instance", {"model_id": MODEL})
    assert (answer.status, answer.error["code"], answer.headers["Retry-After"]) == (503, "no_master", "2")
    assert (await gateway.call("GET", "/state")).json["master"] is None
    not_ready = await gateway.call("GET", "/ready")
    assert (not_ready.status, not_ready.json["missing"]) == (503, ["master"])
    gateway.cluster.leads = True
    await gateway.sees(lambda view: view.master is not None)
    assert (await gateway.call("GET", "/ready")).status == 200


async def test_a_change_of_masters_is_waited_out_under_one_command_id(gateway: Gateway) -> None:
    gateway.cluster.refusal = UnavailableError("not_master", "not the master any more")
    placing = asyncio.create_task(gateway.call("POST", "/place_instance", {"model_id": MODEL}))
    async with asyncio.timeout(WAIT_S):
        for _ in range(2):
            await gateway.asks.wait()
            gateway.asks.clear()
    gateway.cluster.refusal = None
    assert (await placing).status == 200
    assert len({command.command_id for command in gateway.cluster.placed}) == 1


async def test_an_instance_is_shown_and_deleted(gateway: Gateway) -> None:
    await gateway.serve_model()
    shown = (await gateway.call("GET", "/instance/i1")).json
    assert shown["MlxRingInstance"]["shardAssignments"]["nodeToRunner"] == {NODE: "i1-1"}
    deleted = await gateway.call("DELETE", "/instance/i1")
    assert (deleted.status, deleted.json["instance_id"]) == (200, "i1")
    assert "i1" not in (await gateway.call("GET", "/state")).json["instances"]
    for method in ("GET", "DELETE"):
        answer = await gateway.call(method, "/instance/i1")
        assert (answer.status, answer.error["code"]) == (404, "instance_not_found")


async def test_a_preview_sent_back_becomes_that_very_instance(gateway: Gateway) -> None:
    query = [("model_id", MODEL), ("excluded_node_ids", "bbbb"), ("excluded_node_ids", "cccc")]
    answer = (await gateway.call("GET", "/instance/previews", params=query)).json
    assert gateway.cluster.previewed[0].request.excluded_nodes == ("bbbb", "cccc")
    assert answer["decision"]["reports"][0]["name"] == "host-aaaa"
    preview = answer["previews"][0]
    assert (preview["model_id"], preview["sharding"], preview["instance_meta"]) == (MODEL, "Pipeline", "MlxRing")
    assert (preview["error"], preview["memory_delta_by_node"]) == (None, {NODE: 300_000_000})
    wanted = preview["instance"]["MlxRingInstance"]["instanceId"]
    created = await gateway.call("POST", "/instance", {"instance": preview["instance"]})
    assert (created.status, created.json["instance_id"]) == (200, wanted)
    assert gateway.cluster.placed[0].request.node_ids == (NODE,)
    assert wanted in (await gateway.call("GET", "/state")).json["instances"]


async def test_a_preview_asks_for_the_context_it_was_asked_for(gateway: Gateway) -> None:
    answer = await gateway.call("GET", f"/instance/previews?model_id={MODEL}&context_length=1024&n_parallel=2")
    assert answer.status == 200
    request = gateway.cluster.previewed[0].request
    assert (request.context_length, request.n_parallel) == (1024, 2)
    refused = await gateway.call("GET", f"/instance/previews?model_id={MODEL}&context_length=none")
    assert (refused.status, refused.error["param"]) == (400, "context_length")


async def test_a_preview_that_fits_nowhere(gateway: Gateway) -> None:
    gateway.cluster.decision = PlacementDecision(
        outcome="unplaceable",
        reason="no node fits",
        reports=(NodeReport(node_id=NODE, filter="memory", detail="need 5.2 GiB have 3.9 GiB"),),
    )
    answer = (await gateway.call("GET", f"/instance/previews?model_id={MODEL}")).json
    assert (answer["previews"][0]["instance"], answer["previews"][0]["error"]) == (None, "no node fits")
    assert answer["decision"]["reports"][0]["filter"] == "memory"
    alone = await gateway.call("GET", f"/instance/placement?model_id={MODEL}")
    assert (alone.status, alone.error["code"]) == (400, "unplaceable")
    missing = await gateway.call("GET", "/instance/previews")
    assert (missing.status, missing.error["param"]) == (400, "model_id")


async def test_the_would_be_instance(gateway: Gateway) -> None:
    answer = await gateway.call("GET", f"/instance/placement?model_id={MODEL}")
    assert answer.json["MlxRingInstance"]["contextTokenLimit"] == 4096


@pytest.mark.parametrize(
    "body",
    [
        {"instance": {"Other": {}}},
        {"instance": {"MlxRingInstance": {"instanceId": 5}}},
        {
            "instance": {
                "MlxRingInstance": {
                    "instanceId": "Not.A.Token",
                    "shardAssignments": {"modelId": MODEL, "nodeToRunner": {NODE: "r"}},
                }
            }
        },
    ],
)
async def test_an_instance_of_no_preview_is_refused(gateway: Gateway, body: dict[str, Any]) -> None:
    answer = await gateway.call("POST", "/instance", body)
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")
    assert answer.error["param"].startswith("instance")


# What chat says when there is no runner to answer


async def test_a_known_model_that_is_not_placed(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, auto_place="off") as gateway:
        answer = await gateway.chat(stream=True)
        assert (answer.status, answer.error["code"]) == (404, "model_not_placed")
        assert "POST /place_instance" in answer.error["message"]
        assert gateway.cluster.placed == []


async def test_a_loading_model_is_waited_for(gateway: Gateway) -> None:
    runner = await gateway.serve_model(phase="loading")
    waiting = asyncio.create_task(gateway.chat())
    await gateway.waits.wait()
    await gateway.set_phase("i1", "ready")
    assert (await waiting).status == 200
    assert len(runner.asked) == 1


async def test_a_load_that_takes_too_long(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, load_wait_s=0.1) as gateway:
        await gateway.serve_model(phase="loading")
        await gateway.set_phase("i1", "loading", progress=0.42)
        answer = await gateway.chat(stream=True)
    assert (answer.status, answer.error["code"], answer.headers["Retry-After"]) == (503, "instance_not_ready", "5")
    assert "42% done" in answer.error["message"]
    assert answer.json["loading"] == {"model": MODEL, "phase": "loading", "done": 42_000_000, "total": 100_000_000}


async def test_a_failed_model_tells_its_reason(gateway: Gateway, monkeypatch: Any) -> None:
    monkeypatch.setattr("skulk.gateway.dispatch.SETTLE_S", 0.1)
    await gateway.serve_model()
    reason = ErrorBody(code="model_file_invalid", detail="the file ends after 5 of 98 MB")
    await gateway.set_phase("i1", "failed", error=reason)
    answer = await gateway.chat()
    assert (answer.status, answer.error["code"]) == (502, "runner_failed")
    assert "5 of 98 MB" in answer.error["message"]


async def test_a_pending_instance_tells_its_reason(gateway: Gateway, monkeypatch: Any) -> None:
    monkeypatch.setattr("skulk.gateway.dispatch.SETTLE_S", 0.1)
    await gateway.serve_model()
    await gateway.cluster.append(InstanceUnassigned(instance_id="i1", reason="no node has 5 GiB"))
    await gateway.sees(lambda view: view.state.instances["i1"].assignment is None)
    answer = await gateway.chat()
    assert (answer.status, answer.error["code"], answer.headers["Retry-After"]) == (503, "instance_not_ready", "15")
    assert "no node has 5 GiB" in answer.error["message"]


async def test_a_runner_that_crashed_is_waited_for_while_it_comes_back(gateway: Gateway) -> None:
    await gateway.serve_model()
    await gateway.set_phase("i1", "failed")
    waiting = asyncio.create_task(gateway.chat())
    await gateway.waits.wait()
    await gateway.set_phase("i1", "loading", restarts=1)
    await gateway.set_phase("i1", "ready", restarts=1)
    assert (await waiting).status == 200


async def test_an_unreachable_runner_is_asked_again_then_told(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    await runner.die()
    answer = await gateway.chat()
    assert (answer.status, answer.error["code"]) == (503, "unreachable")
    assert "Retry-After" in answer.headers


async def test_a_runner_that_is_reachable_again_within_a_second(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    await runner.die()
    gateway.asks.clear()
    waiting = asyncio.create_task(gateway.chat())
    await gateway.asks.wait()
    gateway.asks.clear()
    await gateway.asks.wait()
    await runner.start()
    assert (await waiting).status == 200


async def test_a_deleted_instance_ends_the_wait(gateway: Gateway) -> None:
    await gateway.serve_model(phase="loading")
    waiting = asyncio.create_task(gateway.chat())
    await gateway.waits.wait()
    await gateway.call("DELETE", "/instance/i1")
    assert (await waiting).error["code"] == "model_not_placed"


async def test_a_model_that_only_another_node_knows_but_is_placed(gateway: Gateway) -> None:
    await gateway.serve_model(model_id="far/away")
    assert (await gateway.chat(model="far/away")).status == 200
    assert (await gateway.call("GET", "/v1/models/far/away")).json["state"] == "ready"


# Models


async def test_a_node_whose_routes_closed_is_lost_by_its_neighbours_word(gateway: Gateway, monkeypatch: Any) -> None:
    monkeypatch.setattr("skulk.cluster.view.NODE_LOST_S", 3600.0)
    monkeypatch.setattr("skulk.cluster.view.NODE_CLOSED_S", 0.1)
    await gateway.cluster.bus.publish(NODE_BEAT, beat("bbbb"), node="bbbb")
    await gateway.sees(lambda view: "bbbb" in view.nodes)
    gateway.cluster.more_of_beat["closed"] = {"bbbb": 0.05}
    await gateway.sees(lambda view: "bbbb" not in view.nodes)
    assert "aaaa" in gateway.view.nodes


async def test_models_by_how_near_they_are(gateway: Gateway) -> None:
    assert (await gateway.call("GET", "/v1/models")).json["data"][0]["state"] == "downloaded"
    await gateway.serve_model("i2", model_id="other/model", phase="loading")
    await gateway.serve_model()
    for path in ("/v1/models", "/models"):
        listed = (await gateway.call("GET", path)).json
        assert listed["object"] == "list"
        assert [(entry["id"], entry["state"]) for entry in listed["data"]] == [
            (MODEL, "ready"),
            ("other/model", "loading"),
        ]
    ready = (await gateway.call("GET", "/v1/models?state=ready")).json["data"]
    assert [entry["id"] for entry in ready] == [MODEL]
    entry = ready[0]
    assert entry["model_id"] == entry["hugging_face_id"] == MODEL
    assert (entry["object"], entry["tasks"], entry["context_length"]) == ("model", ["TextGeneration"], 8192)
    assert entry["resolved_capabilities"] == {
        "supports_thinking_toggle": False,
        "supports_image_input": False,
        "supports_tool_calling": False,
    }
    wrong = await gateway.call("GET", "/v1/models?state=asleep")
    assert (wrong.status, wrong.error["param"]) == (400, "state")


async def test_one_model_and_the_search(gateway: Gateway) -> None:
    assert (await gateway.call("GET", f"/v1/models/{MODEL}")).json["id"] == MODEL
    missing = await gateway.call("GET", "/v1/models/no/such")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")
    found = (await gateway.call("GET", "/models/search?query=smollm2 135m")).json["data"]
    assert [entry["id"] for entry in found] == [MODEL]
    assert (await gateway.call("GET", "/models/search?q=zebra")).json["data"] == []
    assert (await gateway.call("GET", "/models/search?limit=x")).error["param"] == "limit"


# Nodes


async def test_identity_and_probes(gateway: Gateway) -> None:
    assert (await gateway.call("GET", "/node_id")).body == b'"aaaa"'
    identity = (await gateway.call("GET", "/node/identity")).json
    assert (identity["nodeId"], identity["ipAddress"]) == (NODE, "127.0.0.1")
    assert (await gateway.call("GET", "/health")).json["status"] == "ok"
    assert (await gateway.call("GET", "/ready")).status == 200
    listed = (await gateway.call("GET", "/")).json["routes"]
    assert "POST /v1/chat/completions" in listed
    assert (await gateway.call("HEAD", "/health")).status == 200


async def test_events_since(gateway: Gateway) -> None:
    await gateway.serve_model()
    events = (await gateway.call("GET", "/events")).json
    # the first came before this gateway listened: a node's ring has it
    assert [(event["position"]["seq"], event["event"]["type"]) for event in events] == [
        (1, "term_began"),
        (2, "instance_created"),
        (3, "instance_assigned"),
    ]
    asked = gateway.cluster.histories
    assert [event["position"]["seq"] for event in (await gateway.call("GET", "/events?since=2")).json] == [3]
    assert (await gateway.call("GET", "/events?since=3")).json == []
    assert gateway.cluster.histories == asked == 1, "what the own ring has is not asked for"
    assert [event["position"]["seq"] for event in (await gateway.call("GET", "/events?limit=2")).json] == [2, 3]
    for wrong in ("since=x", "since=-1", "since=1_0", "limit=0"):
        assert (await gateway.call("GET", f"/events?{wrong}")).status == 400


async def test_metrics_count_what_happened(gateway: Gateway) -> None:
    await gateway.serve_model()
    await gateway.chat(stream=True)
    await gateway.call("GET", "/no/such/path")
    answer = await gateway.call("GET", "/metrics")
    lines = answer.body.decode().splitlines()
    assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert 'skulk_http_requests_total{route="/v1/chat/completions",method="POST",status="200"} 1' in lines
    assert 'skulk_http_requests_total{route="unmatched",method="GET",status="404"} 1' in lines
    assert "skulk_streams_total 1" in lines
    assert "skulk_completion_tokens_total 2" in lines
    assert "skulk_streams_open 0" in lines
    assert any(line.startswith("skulk_bus_requests_total ") for line in lines)


async def test_diagnostics(gateway: Gateway) -> None:
    await gateway.serve_model()
    node = (await gateway.call("GET", "/v1/diagnostics/node")).json
    assert node["runtime"] == {"nodeId": NODE, "masterNodeId": NODE, "skulkVersion": "0.1.0"}
    runner = node["supervisorRunners"][0]
    assert (runner["runnerId"], runner["statusKind"], runner["phase"]) == ("i1-1", "RunnerReady", "ready")
    cluster = (await gateway.call("GET", "/v1/diagnostics/cluster")).json
    assert (cluster["localNodeId"], cluster["nodes"][0]["ok"]) == (NODE, True)
    told = (await gateway.call("GET", "/v1/diagnostics/cluster/timeline")).json
    assert told["localNodeId"] == NODE
    lines = [(one["kind"], one["instanceId"], one["modelId"], one["nodeId"]) for one in told["events"]]
    assert lines == [
        ("term_began", None, None, NODE),
        ("instance_created", "i1", MODEL, None),
        ("instance_assigned", "i1", None, NODE),
    ]
    latest = (await gateway.call("GET", "/v1/diagnostics/cluster/timeline?limit=1")).json["events"]
    assert [one["seq"] for one in latest] == [3]


async def test_a_restart_is_asked_of_this_gateway_s_own_node(gateway: Gateway) -> None:
    answer = await gateway.call("POST", "/admin/restart")
    assert (answer.status, answer.json["node_id"], gateway.cluster.restarts) == (202, NODE, 1)


async def test_runners_of_the_state_are_those_that_instances_name(gateway: Gateway) -> None:
    await gateway.serve_model()
    await gateway.cluster.append(InstanceCreated(instance=instance("waits")))
    await gateway.sees(lambda view: "waits" in view.state.instances)
    state = (await gateway.call("GET", "/state")).json
    assert state["runners"] == {"i1-1": {"RunnerReady": {}}}
    assert set(state["instances"]) == {"i1", "waits"}
    assert state["lastEventAppliedIdx"] == 4
    assert (state["master"], state["term"]) == (NODE, 1)


# Refusals of HTTP itself


async def test_every_failure_is_an_envelope_and_names_its_request(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, max_body_bytes=1000) as gateway:
        for method, path, body, status, code in (
            ("GET", "/nothing", None, 404, "route_not_found"),
            ("POST", "/state", None, 405, "method_not_allowed"),
            ("PUT", "/v1/chat/completions", b"{}", 405, "method_not_allowed"),
            ("POST", "/v1/chat/completions", b"x" * 1001, 413, "body_too_large"),
            ("POST", "/v1/chat/completions", b"", 400, "invalid_request"),
            ("POST", "/v1/chat/completions", b"[]", 400, "invalid_request"),
            ("POST", "/v1/chat/completions", b'{"model":', 400, "invalid_request"),
            ("POST", "/v1/chat/completions", b"\xff\xfe", 400, "invalid_request"),
            ("POST", "/v1/chat/completions", b'{"a":' + b"[" * 900, 400, "invalid_request"),
            ("POST", "/v1/chat/completions", b'{"a":' + b"9" * 900 + b"}", 400, "invalid_request"),
        ):
            answer = await gateway.call(method, path, body, headers={"X-Request-Id": "req-1"})
            assert (answer.status, answer.error["code"]) == (status, code), (method, path, body)
            assert answer.headers["X-Request-Id"] == "req-1"
            assert answer.error["type"] == "invalid_request_error"
        assert "SKULK_MAX_BODY" in (await gateway.call("POST", "/instance", b"x" * 1001)).error["message"]
        assert (await gateway.call("POST", "/state")).headers["Allow"] == "GET, HEAD"


async def test_a_body_that_lies_about_its_encoding(gateway: Gateway) -> None:
    packed = zlib.compress(b'{"model_id": "x"}')
    answer = await gateway.call("POST", "/place_instance", packed, headers={"Content-Encoding": "gzip"})
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")


async def test_the_content_type_may_be_wrong(gateway: Gateway) -> None:
    await gateway.serve_model()
    answer = await gateway.call("POST", "/v1/chat/completions", chat_body(), headers={"Content-Type": "text/plain"})
    assert answer.status == 200


async def test_a_bad_request_id_is_replaced(gateway: Gateway) -> None:
    for bad in ("a" * 129, "with space", '"quoted"', ""):
        sent = (await gateway.call("GET", "/health", headers={"X-Request-Id": bad})).headers["X-Request-Id"]
        assert sent != bad
        assert len(sent) == 36


async def test_a_stream_names_its_request(gateway: Gateway) -> None:
    await gateway.serve_model()
    answer = await gateway.call(
        "POST", "/v1/chat/completions", chat_body(stream=True, user="u", store=True), headers={"X-Request-Id": "mine"}
    )
    assert answer.headers["X-Request-Id"] == "mine"
    assert answer.headers["X-Skulk-Inert"] == "user, store"


async def test_a_defect_shows_nothing_of_itself(gateway: Gateway, monkeypatch: Any, caplog: Any) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("secret-detail")

    monkeypatch.setattr(gateway.app[REPLICA], "history", broken)
    answer = await gateway.call("GET", "/events", headers={"X-Request-Id": "req-7"})
    assert (answer.status, answer.error["code"]) == (500, "internal")
    assert b"secret-detail" not in answer.body
    assert "req-7" in answer.error["message"]
    assert "secret-detail" in caplog.text


# Doors


async def test_a_foreign_host_is_refused(gateway: Gateway) -> None:
    answer = await gateway.call("GET", "/state", headers={"Host": "evil.example.com:52415"})
    assert (answer.status, answer.error["code"], answer.error["type"]) == (403, "forbidden_host", "permission_error")
    assert "SKULK_ALLOWED_HOSTS" in answer.error["message"]


async def test_a_cross_site_post_is_refused(gateway: Gateway) -> None:
    for origin in ("https://evil.example.com", "null", "http://127.0.0.1:1"):
        answer = await gateway.call("POST", "/place_instance", {"model_id": MODEL}, headers={"Origin": origin})
        assert (answer.status, answer.error["code"]) == (403, "forbidden_origin")
        assert "SKULK_ALLOWED_HOSTS" in answer.error["message"]
    assert not gateway.cluster.placed
    assert (await gateway.call("GET", "/state", headers={"Origin": gateway.url})).status == 200


async def test_every_route_wants_the_key_but_the_probes(tmp_path: Path) -> None:
    async with running_gateway(tmp_path, api_keys=("me:s3cret",)) as gateway:
        for method, path, _ in ROUTES:
            answer = await gateway.call(method, re.sub(r"\{[^}]*\}", "x", path))
            if path in ("/health", "/ready"):
                assert answer.status == 200
            else:
                assert (answer.status, answer.error["code"]) == (401, "unauthorized"), path
                assert answer.headers["WWW-Authenticate"] == "Bearer"
        for headers, status in (
            ({"Authorization": "Bearer s3cret"}, 200),
            ({"X-Api-Key": "s3cret"}, 200),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Basic s3cret"}, 401),
        ):
            assert (await gateway.call("GET", "/state", headers=headers)).status == status


# Leaving


async def test_a_draining_gateway_takes_nothing_new_and_ends_what_runs_with_a_word(gateway: Gateway) -> None:
    runner = await gateway.serve_model()
    runner.script = hold
    async with gateway.open_chat() as response, asyncio.timeout(WAIT_S):
        await response.content.readuntil(b'"Hello"')
        dispatcher = gateway.app[DISPATCHER]
        dispatcher.drain()
        refused = await gateway.chat()
        assert (refused.status, refused.error["code"]) == (503, "draining")
        dispatcher.stop_all(RequestError("invalid_request", "bye"))
        assert b'"message":"bye"' in await response.read()
        await runner.cancelled.wait()
