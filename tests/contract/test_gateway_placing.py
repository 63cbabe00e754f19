"""Placing over HTTP: replicas, force, what is told of the decision, and the wait until it serves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skulk.errors import RequestError
from skulk.gateway.instances import one_node
from skulk.wire.base import ErrorBody
from skulk.wire.beats import RunnerPhase
from skulk.wire.placement import NodeReport, PlacementDecision
from tests.support.http import MODEL, NODE, WAIT_S, Answer, Gateway, running_gateway
from tests.support.states import GIB, card, estimate


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tmp_path) as running:
        yield running


async def place(gateway: Gateway, query: str = "", **fields: Any) -> Answer:
    return await gateway.call("POST", f"/place_instance{query}", {"model_id": MODEL, **fields})


async def test_replicas_are_named_all(gateway: Gateway) -> None:
    answer = await place(gateway, replicas=3)
    assert answer.status == 200
    (command,) = gateway.cluster.placed
    assert (command.replicas, command.request.force) == (3, False)
    ids = answer.json["instance_ids"]
    assert (len(set(ids)), ids[0]) == (3, answer.json["instance_id"])
    state = (await gateway.call("GET", "/state")).json
    assert set(ids) <= set(state["instances"])


async def test_what_is_forced_is_placed_with_a_warning(gateway: Gateway) -> None:
    warning = "attic: forced though memory need 44.4 GiB have 24.0 GiB"
    report = NodeReport(
        node_id=NODE,
        name="attic",
        backend="llama_cpp-cpu",
        memory=estimate(44 * GIB),
        available_bytes=24 * GIB,
        score={"fits": 0.0},
        warning=warning,
    )
    gateway.cluster.decision = PlacementDecision(outcome="placed", nodes=(NODE,), reports=(report,), reason="because")
    answer = await place(gateway, force=True)
    assert gateway.cluster.placed[0].request.force
    assert answer.json["warnings"] == [warning]
    assert answer.json["decision"]["reports"][0]["warning"] == warning
    assert answer.json["decision"]["reason"] == "because"
    preview = (await gateway.call("GET", f"/instance/previews?model_id={MODEL}&force=1")).json
    assert gateway.cluster.previewed[0].request.force
    assert preview["decision"]["warnings"] == [warning]


@pytest.mark.parametrize(
    ("method", "path", "param"),
    [
        ("POST", "/place_instance?wait=soon", "wait"),
        ("GET", f"/instance/previews?model_id={MODEL}&force=perhaps", "force"),
        ("GET", f"/instance/previews?model_id={MODEL}&min_nodes=2", "min_nodes"),
    ],
)
async def test_what_a_query_can_t_say(gateway: Gateway, method: str, path: str, param: str) -> None:
    answer = await gateway.call(method, path, {"model_id": MODEL} if method == "POST" else None)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert not gateway.cluster.placed


def test_a_card_of_another_format_can_t_be_spread_yet() -> None:
    with pytest.raises(RequestError) as caught:
        one_node(2, msgspec.structs.replace(card(), format="mlx"))
    assert (caught.value.code, one_node(1, card())) == ("unsupported_field", 1)


# Waiting


async def placed_and_waiting(gateway: Gateway, query: str = "?wait=ready", **fields: Any) -> asyncio.Task[Answer]:
    """A call that waits; its instances stand in the gateway's state."""
    count = fields.get("replicas", 1)
    waiting = asyncio.create_task(place(gateway, query, **fields))
    await gateway.sees(lambda view: len(view.state.instances) == count)
    return waiting


async def tell(gateway: Gateway, instance_id: str, phase: RunnerPhase, **fields: Any) -> None:
    """What a runner says of itself, heard by the gateway."""
    await gateway.cluster.set_phase(instance_id, phase, **fields)
    told = gateway.cluster.statuses[f"{instance_id}-1"]
    await gateway.sees(lambda view: view.runners.get(told.runner_id) == told)


async def test_it_waits_until_all_of_them_serve(gateway: Gateway) -> None:
    waiting = await placed_and_waiting(gateway, replicas=2)
    await tell(gateway, "new-1", "ready")
    await tell(gateway, "new-1-2", "loading")
    assert not waiting.done()
    await tell(gateway, "new-1-2", "ready")
    answer = await asyncio.wait_for(waiting, WAIT_S)
    assert (answer.status, answer.json["instance_ids"]) == (200, ["new-1", "new-1-2"])


async def test_a_failure_that_stays_is_told_with_its_reason(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skulk.gateway.readiness.SETTLE_S", 0.1)
    waiting = await placed_and_waiting(gateway)
    error = ErrorBody(code="runner_failed", detail="the KV cache of 12 GiB can't be allocated")
    await tell(gateway, "new-1", "failed", error=error)
    answer = await asyncio.wait_for(waiting, WAIT_S)
    assert (answer.status, answer.error["code"]) == (502, "runner_failed")
    assert "the KV cache of 12 GiB can't be allocated" in answer.error["message"]


async def test_one_that_is_started_again_is_waited_for(gateway: Gateway) -> None:
    waiting = await placed_and_waiting(gateway)
    await tell(gateway, "new-1", "failed", error=ErrorBody(code="runner_failed", detail="killed by signal 9"))
    await tell(gateway, "new-1", "loading", restarts=1)
    await tell(gateway, "new-1", "ready", restarts=1)
    assert (await asyncio.wait_for(waiting, WAIT_S)).status == 200


async def test_deleted_while_it_is_waited_for(gateway: Gateway) -> None:
    waiting = await placed_and_waiting(gateway)
    await tell(gateway, "new-1", "loading")
    await gateway.call("DELETE", "/instance/new-1")
    answer = await asyncio.wait_for(waiting, WAIT_S)
    assert (answer.status, answer.error["code"]) == (404, "instance_not_found")


async def test_the_caller_s_time_is_up(gateway: Gateway) -> None:
    answer = await gateway.call(
        "POST", "/place_instance?wait=ready", {"model_id": MODEL}, headers={"X-Request-Timeout": "0.2"}
    )
    assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")
    assert "new-1 is not ready after 0.2 s" in answer.error["message"]
    assert "new-1" in (await gateway.call("GET", "/state")).json["instances"], "it goes on"
