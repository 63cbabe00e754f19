"""Models that are placed because somebody asks: once, for everybody who asks, and gone when nobody does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from skulk.errors import RequestError
from skulk.wire.commands import PlaceModel
from tests.support.child_processes import no_process_left
from tests.support.http import MODEL, WAIT_S, Gateway, running_gateway
from tests.support.whole_node import whole_node

GREEDY = {"temperature": 0, "max_tokens": 4}
QUESTION = [{"role": "user", "content": "Name three rivers."}]


async def asked_master(gateway: Gateway) -> PlaceModel:
    """The command that the master was asked, once it was."""
    await gateway.sees(lambda view: bool(view.state.instances))
    (command,) = gateway.cluster.placed
    return command


async def test_two_requests_at_once_load_it_once_and_a_client_that_leaves_stops_nothing(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway:
        one = asyncio.create_task(gateway.chat())
        other = asyncio.create_task(gateway.chat(stream=True))
        command = await asked_master(gateway)
        assert (command.ensure, command.on_demand, command.request.card.model_id) == (True, True, MODEL)
        await gateway.waits.wait()
        one.cancel()
        await gateway.cluster.run_placed()
        answer = await asyncio.wait_for(other, WAIT_S)
        assert answer.status == 200
        assert len(gateway.cluster.placed) == 1


@pytest.mark.parametrize(
    ("auto_place", "models", "status", "code"),
    [
        ("off", (MODEL,), 404, "model_not_placed"),
        ("cached", (), 404, "model_not_placed"),
        ("cached", (MODEL,), 400, "unplaceable"),
    ],
)
async def test_what_is_not_placed_is_refused_with_its_true_status(
    tmp_path: Path, auto_place: str, models: tuple[str, ...], status: int, code: str
) -> None:
    async with running_gateway(tmp_path, auto_place=auto_place) as gateway:
        gateway.cluster.models = models
        await gateway.cluster.beat()
        await gateway.sees(lambda view: all(len(node.beat.models) == len(models) for node in view.nodes.values()))
        gateway.cluster.refusal = RequestError("unplaceable", "memory need 5.2 GiB have 3.9 GiB")
        answer = await gateway.chat(stream=True)
        assert (answer.status, answer.error["code"]) == (status, code)
        assert bool(gateway.cluster.placed) == (code == "unplaceable")


async def test_a_whole_node_loads_a_model_for_a_request_and_unloads_it(tmp_path: Path) -> None:
    with no_process_left():
        async with whole_node(tmp_path / "home", SKULK_IDLE_TTL="1") as node:
            assert (await node.state())["instances"] == {}
            body = {"model": MODEL, "messages": QUESTION, **GREEDY}
            answers = await asyncio.gather(*(node.call("POST", "/v1/chat/completions", body) for _ in range(2)))
            assert [status for status, _ in answers] == [200, 200]
            assert len((await node.state())["instances"]) == 1
            await node.wait_state(lambda state: not state["instances"])
            # what a person places stays, also where a request had placed it
            status, _ = await node.call("POST", "/v1/chat/completions", body)
            assert status == 200
            _, health = await node.call("GET", "/v1/models?state=ready")
            assert [model["id"] for model in health["data"]] == [MODEL]
