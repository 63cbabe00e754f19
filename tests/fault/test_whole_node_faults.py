"""A whole node under attack: what a client, a program on the bus or a file does to it stays where it was done."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import nats
import pytest

from tests.support.child_processes import no_process_left
from tests.support.gguf import embedded_model, with_metadata
from tests.support.whole_node import MODEL, WholeNode, environment, skulk, text_of, whole_node

NOWHERE = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GREEDY = {"temperature": 0, "max_tokens": 12}
QUESTION = [{"role": "user", "content": "Name three rivers."}]


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[WholeNode]:
    with no_process_left():
        async with whole_node(tmp_path / "h ö", "--place", MODEL) as running:
            await running.wait_ready()
            yield running


async def answer_of(node: WholeNode) -> str:
    """The one answer that greedy decoding gives, whatever happened before."""
    return text_of([event async for event in node.stream(QUESTION, **GREEDY)])


def tracebacks_of(node: WholeNode) -> list[str]:
    logs = sorted((node.home / "logs").glob("*.log"))
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    return [line for line in (*lines, *node.output) if "Traceback" in line]


async def until_idle(node: WholeNode) -> None:
    """Waits until no stream is open at the gateway and the runner says that it is idle."""

    async def is_idle() -> bool:
        async with node.session.get(node.url + "/metrics") as response:
            gateway_is_idle = "skulk_streams_open 0\n" in await response.text()
        return gateway_is_idle and all("RunnerReady" in one for one in (await node.state())["runners"].values())

    async with asyncio.timeout(20.0):
        while not await is_idle():  # noqa: ASYNC110 - a client of HTTP can only ask
            await asyncio.sleep(0.1)


async def test_clients_that_leave_and_garbage_on_the_bus_harm_nobody(node: WholeNode) -> None:
    expected = await answer_of(node)
    await leave_early_often(node)
    await until_idle(node)
    assert await answer_of(node) == expected
    await speak_garbage(node)
    assert await answer_of(node) == expected
    _, told = await node.call("GET", "/v1/diagnostics/node")
    assert (told["bus"]["reconnects"], told["bus"]["handler_errors"]) == (0, 0)
    assert tracebacks_of(node) == []


async def leave_early_often(node: WholeNode) -> None:
    """80 clients that go away before the answer, or at its first word."""

    async def leave_early(number: int) -> int:
        body = {"model": MODEL, "stream": True, "max_tokens": 400, "ignore_eos": True, "messages": QUESTION}
        async with (
            aiohttp.ClientSession() as session,
            session.post(node.url + "/v1/chat/completions", json=body) as response,
        ):
            if response.status == 200 and number % 2:
                await response.content.readline()
            return response.status

    statuses = await asyncio.gather(*(leave_early(number) for number in range(80)))
    # 2 run, 64 wait; the others are told so at once
    assert set(statuses) == {200, 429}


async def speak_garbage(node: WholeNode) -> None:
    """What no node would say, on every kind of subject, with every header that means something."""
    facts = node.facts
    (runner,) = (await node.state())["runners"]
    ids = {"node": facts["node_id"], "runner": runner, "gateway": f"gw-{facts['node_id']}"}
    nouns = ["beat.node.{node}", "beat.master.{node}", "beat.gateway.{gateway}", "event.a.b", "status.runner.{runner}"]
    nouns += ["stream.{gateway}.r.1", "alive.{gateway}.{runner}", "master.place.{node}", "node.snapshot.{node}"]
    nouns += ["events.history", "runner.generate.{runner}", "runner.cancel.{runner}", "runner.nothing.{runner}"]
    parcel = json.dumps({"owner": "nobody", "parcel_id": "p", "size_bytes": -1, "sha256": "0"}).encode()
    bodies = [b"", b"\xff", b"{", b"[]", b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}", b"9" * 5_000, parcel]
    headers: list[dict[str, str] | None] = [None, {"Skulk-Remaining-Ms": "--5"}, {"Skulk-Parcel": "1"}]
    client = await nats.connect(facts["nats_url"])
    try:
        for noun in nouns:
            subject = f"skulk.{facts['cluster']}.v1." + noun.format(**ids)
            for body in bodies:
                for header in headers:
                    await client.publish(subject, body, headers=header)
        await client.flush()
    finally:
        await client.close()
    await send_malformed_headers(facts, ids)


async def send_malformed_headers(facts: dict[str, Any], ids: dict[str, str]) -> None:
    """What no client library sends; nats-py's read loop used to end with it, and the node was deaf for ever."""
    reader, writer = await asyncio.open_connection("127.0.0.1", facts["nats_port"])
    try:
        writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
        for noun in ("beat.node.{node}", "runner.cancel.{runner}", "stream.{gateway}.r.1"):
            subject = f"skulk.{facts['cluster']}.v1." + noun.format(**ids)
            writer.write(b"HPUB %s 8 10\r\nNATS/1.0{}\r\n" % subject.encode())
        writer.write(b"PING\r\n")
        async with asyncio.timeout(10.0):
            while await reader.readline() != b"PONG\r\n":
                pass
    finally:
        writer.close()


async def test_what_is_killed_comes_back_and_tells_the_truth(node: WholeNode) -> None:
    expected, url = await answer_of(node), node.url
    (instance,) = (await node.state())["instances"]
    os.kill(node.children()["gateway"], signal.SIGKILL)
    async with asyncio.timeout(20.0):
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                state = await node.state()
                break
            await asyncio.sleep(0.05)
    # the very first answer: not the empty state of a process that has heard nothing yet
    assert list(state["instances"]) == [instance]
    assert node.url == url
    listed = await asyncio.to_thread(skulk, node.home, "ps")
    assert MODEL in listed.stdout
    assert await answer_of(node) == expected
    # now all of them at once
    for pid in node.children().values():
        os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(60.0):
        while True:
            with contextlib.suppress(aiohttp.ClientError, AssertionError):
                if await answer_of(node) == expected:
                    break
            await asyncio.sleep(0.2)


async def test_a_gateway_and_a_runner_that_hang_are_replaced(node: WholeNode) -> None:
    expected, url, children = await answer_of(node), node.url, node.children()
    for name in ("gateway", "runner"):
        os.kill(children[name], signal.SIGSTOP)
    async with asyncio.timeout(40.0):
        await node.wait_replaced("gateway", children["gateway"])
        while True:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with asyncio.timeout(2.0):
                    assert (await node.call("GET", "/health"))[0] == 200
                break
            await asyncio.sleep(0.2)
        await node.wait_replaced("runner", children["runner"])
    assert node.url == url
    await node.wait_ready()
    (runner,) = (await node.call("GET", "/v1/diagnostics/node"))[1]["supervisorRunners"]
    assert (runner["statusKind"], runner["restarts"]) == ("RunnerReady", 1)
    assert await answer_of(node) == expected


async def test_hostile_files_are_told_and_the_rest_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    whole = embedded_model().read_bytes()
    for size in (0, 3, 24, 1_000, 500_000, 2_500_000):
        (folder / f"cut-{size}.gguf").write_bytes(whole[:size])
    with_metadata(embedded_model(), folder / "endless.gguf", {"tokenizer.chat_template": NOWHERE})
    os.mkfifo(folder / "pipe.gguf")
    (folder / "loop.gguf").symlink_to("loop.gguf")
    (folder / "up").symlink_to("..")
    with contextlib.suppress(OSError):
        os.link(folder / "endless.gguf", os.fsencode(folder) + b"/\xff.gguf")
    monkeypatch.setattr("tests.support.whole_node.environment", with_models(folder))
    with no_process_left():
        async with whole_node(tmp_path / "home", "--place", "endless") as node:
            await node.wait_ready()
            _, models = await node.call("GET", "/v1/models")
            assert {model["id"] for model in models["data"]} == {"endless", MODEL}
            status, refused = await node.call(
                "POST", "/v1/chat/completions", {"model": "cut-1000", "messages": QUESTION}
            )
            assert (status, refused["error"]["code"]) == (400, "model_file_invalid")
            for _ in range(2):
                body = {"model": "endless", "messages": QUESTION}
                status, refused = await node.call("POST", "/v1/chat/completions", body)
                assert (status, refused["error"]["code"]) == (400, "template_failed")
            await until_idle(node)


def with_models(folder: Path) -> Any:
    """The environment of a user who has a folder of models."""
    return lambda home: {**environment(home), "SKULK_MODELS_PATH": str(folder)}
