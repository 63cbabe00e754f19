"""The gateway as a process of its own, over a real nats-server: how it starts, refuses to start, and leaves."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from skulk.bus.nats_bus import NatsBus
from skulk.bus.subjects import GATEWAY_BEAT
from skulk.errors import StartError
from skulk.supervision.child import Child, ChildSpec
from skulk.wire.base import encode
from tests.support.bus import Collector
from tests.support.child_processes import ROOT, no_process_left
from tests.support.http import WAIT_S, FakeCluster, chat_body, events_of, hold, spec
from tests.support.nats import NatsServer


@pytest.fixture
def nats_server() -> Iterator[NatsServer]:
    with no_process_left(), NatsServer() as server:
        yield server


def child(instruction: bytes) -> Child:
    return Child(
        ChildSpec(
            name="gateway",
            argv=(sys.executable, "-m", "skulk.gateway"),
            env={"PYTHONPATH": str(ROOT)},
            stdin=instruction,
            drain_s=5.0,
        )
    )


@asynccontextmanager
async def started(instruction: bytes) -> AsyncGenerator[tuple[Child, str]]:
    process = child(instruction)
    ready = await process.start()
    try:
        yield process, f"http://127.0.0.1:{ready.fields['port']}"
    finally:
        await process.end()


@asynccontextmanager
async def serving_cluster(server: NatsServer) -> AsyncGenerator[FakeCluster]:
    bus = NatsBus(server.url, cluster="test", name="cluster")
    await bus.connect()
    cluster = FakeCluster(bus)
    await cluster.start()
    try:
        yield cluster
    finally:
        await cluster.close()


async def ready_to_serve(client: aiohttp.ClientSession) -> None:
    """Asks until the gateway has heard of the instance; its answers hold each question back."""
    async with asyncio.timeout(WAIT_S):
        while True:
            async with client.get("/instance/i1") as response:
                if response.status == 200:
                    return
            await asyncio.sleep(0.05)


async def test_a_port_in_use_is_told_with_the_option(tmp_path: Path, nats_server: NatsServer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = child(encode(spec(tmp_path, nats_url=nats_server.url, api_port=port)))
        with pytest.raises(StartError) as refused:
            await process.start()
    assert (refused.value.code, refused.value.exit_status) == ("port_in_use", 75)
    assert f"port {port}" in refused.value.detail
    assert "--api-port" in refused.value.detail


def test_by_hand_a_port_in_use_is_a_line_and_an_exit_status(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        instruction = spec(tmp_path, nats_url="nats://127.0.0.1:9", api_port=taken.getsockname()[1])
        ended = subprocess.run(
            [sys.executable, "-m", "skulk.gateway"], input=encode(instruction) + b"\n", cwd=ROOT, capture_output=True
        )
    assert ended.returncode == 75
    assert b"--api-port" in ended.stderr
    assert b"Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"api_host": "192.0.2.1"}, "config_invalid"),
        ({"api_host": "no.such.host.invalid"}, "config_invalid"),
        ({"api_keys": ("without-a-name",)}, "config_invalid"),
        ({"api_keys": ("@/no/such/file",)}, "config_invalid"),
    ],
)
async def test_a_wrong_setting_is_told(
    tmp_path: Path, nats_server: NatsServer, changes: dict[str, Any], code: str
) -> None:
    with pytest.raises(StartError) as refused:
        await child(encode(spec(tmp_path, nats_url=nats_server.url, **changes))).start()
    assert refused.value.code == code


async def test_an_instruction_that_is_none(nats_server: NatsServer) -> None:
    with pytest.raises(StartError, match="can't be read") as refused:
        await child(b'{"gateway_id": 5}').start()
    assert refused.value.code == "config_invalid"


async def test_it_beats_serves_and_leaves_when_its_parent_does(tmp_path: Path, nats_server: NatsServer) -> None:
    bus = NatsBus(nats_server.url, cluster="test", name="listener")
    await bus.connect()
    heard: Collector[Any] = Collector()
    await bus.subscribe(GATEWAY_BEAT, heard)
    try:
        async with started(encode(spec(tmp_path, nats_url=nats_server.url))) as (process, url):
            async with aiohttp.ClientSession(url) as client, client.get("/node_id") as response:
                assert await response.json() == "aaaa"
            beats = await heard.wait(2)
            assert (beats[0].message.gateway_id, beats[0].message.incarnation) == ("g-aaaa", "00000001")
            report = await process.stop()
        assert (report.returncode, report.signal_name) == (0, None)
    finally:
        await bus.close()


async def test_sigterm_ends_a_running_stream_with_an_error_object(tmp_path: Path, nats_server: NatsServer) -> None:
    instruction = encode(spec(tmp_path, nats_url=nats_server.url, drain_timeout_s=0.2))
    async with serving_cluster(nats_server) as cluster, started(instruction) as (process, url):
        runner = await cluster.serve_model()
        runner.script = hold
        async with aiohttp.ClientSession(url) as client:
            await ready_to_serve(client)
            body = msgspec.json.encode(chat_body(stream=True))
            async with client.post("/v1/chat/completions", data=body) as response, asyncio.timeout(WAIT_S):
                await response.content.readuntil(b'"Hello"')
                await response.content.readuntil(b"\n\n")
                process.signal(signal.SIGTERM)
                events = events_of(await response.read())
            assert events[-1]["error"]["code"] == "draining"
            async with asyncio.timeout(WAIT_S):
                await runner.cancelled.wait()
                report = await process.exited
    assert report.returncode == 0


async def test_a_running_answer_may_end_while_it_drains(tmp_path: Path, nats_server: NatsServer) -> None:
    instruction = encode(spec(tmp_path, nats_url=nats_server.url, drain_timeout_s=WAIT_S))
    async with serving_cluster(nats_server) as cluster, started(instruction) as (process, url):
        runner = await cluster.serve_model()
        runner.script = hold
        async with aiohttp.ClientSession(url) as client:
            await ready_to_serve(client)
            body = msgspec.json.encode(chat_body(stream=True))
            async with client.post("/v1/chat/completions", data=body) as response, asyncio.timeout(WAIT_S):
                await response.content.readuntil(b'"Hello"')
                process.signal(signal.SIGTERM)
                runner.cancelled.set()
                assert (await response.read()).endswith(b"data: [DONE]\n\n")
            async with asyncio.timeout(WAIT_S):
                assert (await process.exited).returncode == 0


async def test_a_broker_that_is_away_for_a_moment_changes_nothing(tmp_path: Path, nats_server: NatsServer) -> None:
    instruction = encode(spec(tmp_path, nats_url=nats_server.url))
    async with serving_cluster(nats_server) as cluster, started(instruction) as (_, url):
        await cluster.serve_model()
        async with aiohttp.ClientSession(url) as client:
            await ready_to_serve(client)
            nats_server.kill()
            nats_server.start()
            body = msgspec.json.encode(chat_body())
            async with asyncio.timeout(WAIT_S), client.post("/v1/chat/completions", data=body) as response:
                answer = await response.json()
            # within a second of the break the request is sent again by itself; a slower machine is told to ask again
            assert response.status in (200, 503), answer
            if response.status == 503:
                assert "Retry-After" in response.headers
                await cluster.beat()
                async with client.post("/v1/chat/completions", data=body) as response:
                    answer = await response.json()
            assert answer["choices"][0]["message"]["content"] == "Hello world"
