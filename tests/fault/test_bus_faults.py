"""The bus when its server, or the way to it, breaks: it notices, comes back by itself, and sends nothing late."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncGenerator

import pytest
from nats.aio.client import Client

from skulk.bus.nats_bus import NatsBus
from skulk.bus.port import Call, Received
from skulk.bus.subjects import GATEWAY_BEAT, RUNNER_CANCEL
from skulk.bus.transport import Raw
from skulk.errors import RequestError, ServiceError, SkulkError, StartError, UnavailableError
from skulk.wire.base import encode
from skulk.wire.beats import GatewayBeat
from skulk.wire.generation import Cancel, Cancelled, Chunk
from tests.support.bus import WAIT_S, Collector, NatsWorld, reached
from tests.support.messages import RUNNER, gateway_beat, generate, stopped, texts
from tests.support.nats import NatsServer
from tests.support.streams import StreamPair, read_all
from tests.support.tcp_proxy import TcpProxy

STREAMS = 20
WORDS = 150


async def cancelled(call: Call[Cancel]) -> Cancelled:
    return Cancelled(request_id=call.message.request_id, was_running=True)


@contextlib.asynccontextmanager
async def through_proxy(world: NatsWorld) -> AsyncGenerator[tuple[TcpProxy, NatsBus]]:
    """A bus whose way to the server is in the test's hands."""
    async with TcpProxy(world.server.port) as proxy:
        bus = NatsBus(proxy.url, cluster=world.cluster, name="proxied")
        await bus.connect()
        try:
            yield proxy, bus
        finally:
            proxy.let_flow()
            proxy.swallow(is_swallowing=False)
            await bus.close()


async def ask_until_answered(bus: NatsBus, timeout_s: float = WAIT_S) -> float:
    """Seconds until a request is answered, asking again as a caller would."""
    started = bus.clock.now()
    async with asyncio.timeout(timeout_s):
        while True:
            try:
                await bus.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=0.5, runner="r-1")
            except SkulkError as error:
                if not error.retryable:
                    raise
                await asyncio.sleep(0.05)
            else:
                return bus.clock.now() - started


async def write_slowly(pair: StreamPair, names: list[str]) -> None:
    """Words of all streams, one after another, over about two seconds."""
    writers = [pair.outbox.open(generate(name)) for name in names]
    for step in range(WORDS):
        for writer in writers:
            writer.send(0, f"{writer.request.request_id}:{step} ", (step,))
        await asyncio.sleep(0.015)
    for writer in writers:
        writer.end(stopped(), finish_reason="stop")


def assert_whole(names: list[str], streams: list[list[Chunk]]) -> None:
    for name, chunks in zip(names, streams, strict=True):
        assert texts(chunks) == "".join(f"{name}:{step} " for step in range(WORDS))
        assert [one.seq for one in chunks] == list(range(WORDS + 1))


async def test_a_server_killed_and_restarted_under_streams_loses_nothing() -> None:
    with NatsServer() as server:
        async with NatsWorld(server) as world:
            runner, gateway = await world.bus("runner"), await world.bus("gateway")
            async with StreamPair(runner, gateway) as pair:
                names = [f"request-{number}" for number in range(STREAMS)]
                reading = [asyncio.create_task(read_all(pair.inbox.open(name, 1, RUNNER))) for name in names]
                writing = asyncio.create_task(write_slowly(pair, names))
                for _ in range(2):
                    await asyncio.sleep(0.4)
                    server.kill()
                    await asyncio.gather(reached(runner, "disconnected"), reached(gateway, "disconnected"))
                    with pytest.raises(UnavailableError):
                        await runner.publish(GATEWAY_BEAT, gateway_beat(), gateway="g")
                    server.start()
                await writing
                assert_whole(names, await asyncio.gather(*reading))
                assert pair.outbox.counters.only_kept > 0
                assert pair.inbox.counters.healed > 0
            assert (runner.counters.reconnects, gateway.counters.reconnects) == (2, 2)


async def test_after_a_restart_subscriptions_and_services_are_back() -> None:
    with NatsServer() as server:
        async with NatsWorld(server) as world:
            one, two = await world.bus("one"), await world.bus("two")
            heard: Collector[Received[GatewayBeat]] = Collector()
            await one.subscribe(GATEWAY_BEAT, heard)
            await one.serve("runner", {RUNNER_CANCEL: cancelled}, runner="r-1")
            assert isinstance(two, NatsBus)
            await ask_until_answered(two)
            server.kill()
            await reached(two, "disconnected")
            with pytest.raises(UnavailableError) as refused:
                await two.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=5.0, runner="r-1")
            assert refused.value.code == "bus_disconnected"
            late: Collector[Received[GatewayBeat]] = Collector()
            await one.subscribe(GATEWAY_BEAT, late, gateway="g")
            server.start()
            await ask_until_answered(two)
            await two.publish(GATEWAY_BEAT, gateway_beat(7), gateway="g")
            assert (await heard.wait(1))[0].message.open_streams == 7
            assert (await late.wait(1))[0].message.open_streams == 7


async def test_a_request_whose_server_dies_fails_at_once_not_at_its_deadline() -> None:
    with NatsServer() as server:
        async with NatsWorld(server) as world:
            bus = await world.bus("one")
            begun = asyncio.Event()

            async def never(call: Call[Cancel]) -> Cancelled:
                begun.set()
                await asyncio.Event().wait()
                return await cancelled(call)

            await bus.serve("runner", {RUNNER_CANCEL: never}, runner="r-1")
            asking = asyncio.create_task(
                bus.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=3_600.0, runner="r-1")
            )
            await begun.wait()
            server.kill()
            with pytest.raises(UnavailableError) as refused:
                async with asyncio.timeout(WAIT_S):
                    await asking
            assert refused.value.code == "bus_disconnected"


@pytest.mark.parametrize("ends_with_kill", [False, True])
async def test_a_frozen_server_under_load_is_noticed_and_survived(*, ends_with_kill: bool) -> None:
    """SIGSTOP while streams run: sockets stay open and silent. Then SIGCONT, or SIGKILL and a new one."""
    with NatsServer() as server:
        async with NatsWorld(server) as world:
            runner, gateway = await world.bus("runner"), await world.bus("gateway")
            async with StreamPair(runner, gateway) as pair:
                names = [f"request-{number}" for number in range(STREAMS)]
                reading = [asyncio.create_task(read_all(pair.inbox.open(name, 1, RUNNER), 60.0)) for name in names]
                writing = asyncio.create_task(write_slowly(pair, names))
                await asyncio.sleep(0.5)
                server.freeze()
                await asyncio.gather(reached(runner, "disconnected"), reached(gateway, "disconnected"))
                await writing
                assert not any(task.done() for task in reading)
                if ends_with_kill:
                    server.kill()
                    server.start()
                else:
                    server.thaw()
                assert_whole(names, await asyncio.gather(*reading))


@pytest.mark.parametrize("direction", ["both", "up", "down"])
async def test_a_silent_cut_is_noticed_and_nothing_published_meanwhile_comes_late(direction: str) -> None:
    """No reset, no end of file: bytes just vanish, as on a pulled cable."""
    with NatsServer() as server:
        async with NatsWorld(server) as world, through_proxy(world) as (proxy, bus):
            listener = await world.bus("listener")
            heard: Collector[Received[GatewayBeat]] = Collector()
            await listener.subscribe(GATEWAY_BEAT, heard)
            await bus.publish(GATEWAY_BEAT, gateway_beat(1), gateway="g")
            await heard.wait(1)
            proxy.swallow_up = direction in ("both", "up")
            proxy.swallow_down = direction in ("both", "down")
            await reached(bus, "disconnected")
            for number in range(100, 200):
                with pytest.raises(UnavailableError):
                    await bus.publish(GATEWAY_BEAT, gateway_beat(number), gateway="g")
            proxy.swallow(is_swallowing=False)
            await reached(bus, "connected")
            await bus.publish(GATEWAY_BEAT, gateway_beat(2), gateway="g")
            async with asyncio.timeout(WAIT_S):
                while heard.items[-1].message.open_streams != 2:
                    await heard.wait(len(heard.items) + 1)
            await bus.flush()
            await listener.flush()
            assert [one.message.open_streams for one in heard.items] == [1, 2]


async def test_a_stuck_connection_does_not_hold_publishers_for_ever_and_what_it_held_is_gone() -> None:
    """A socket that takes nothing more: publishers get an error in time, and the backlog never comes out."""
    with NatsServer() as server:
        async with NatsWorld(server) as world, through_proxy(world) as (proxy, bus):
            listener = await world.bus("listener")
            heard: Collector[Received[GatewayBeat]] = Collector()
            await listener.subscribe(GATEWAY_BEAT, heard, gateway="after")
            proxy.hold()
            sent = 0
            with pytest.raises(UnavailableError):
                async with asyncio.timeout(WAIT_S):
                    while True:
                        await bus.publish(GATEWAY_BEAT, gateway_beat(sent, incarnation="x" * 60_000), gateway="g")
                        sent += 1
            assert sent > 10
            await reached(bus, "disconnected")
            with pytest.raises(UnavailableError):
                await bus.publish(GATEWAY_BEAT, gateway_beat(-1), gateway="after")
            proxy.cut()
            proxy.let_flow()
            await reached(bus, "connected")
            await bus.publish(GATEWAY_BEAT, gateway_beat(1), gateway="after")
            await heard.wait(1)
            assert [one.message.open_streams for one in heard.items] == [1]


async def test_a_slow_way_is_no_silence() -> None:
    with NatsServer() as server:
        async with NatsWorld(server) as world, through_proxy(world) as (proxy, bus):
            await bus.serve("runner", {RUNNER_CANCEL: cancelled}, runner="r-1")
            proxy.delay_s = 0.4
            for _ in range(3):
                await bus.request(RUNNER_CANCEL, Cancel(request_id="q"), timeout_s=WAIT_S, runner="r-1")
            assert bus.counters.replaced_clients == 0


async def test_connections_cut_again_and_again_leave_nothing_behind() -> None:
    with NatsServer() as server:
        async with NatsWorld(server) as world, through_proxy(world) as (proxy, bus):
            heard: Collector[Received[GatewayBeat]] = Collector()
            await bus.subscribe(GATEWAY_BEAT, heard)
            await bus.serve("runner", {RUNNER_CANCEL: cancelled}, runner="r-1")
            await ask_until_answered(bus)
            before = {task.get_name() for task in asyncio.all_tasks() if not task.get_name().startswith("Task-")}
            count = len(asyncio.all_tasks())
            for number in range(10):
                proxy.cut()
                await reached(bus, "disconnected")
                await reached(bus, "connected")
                await bus.publish(GATEWAY_BEAT, gateway_beat(number), gateway="g")
                await heard.wait(number + 1)
            await ask_until_answered(bus)
            gc.collect()
            after = {task.get_name() for task in asyncio.all_tasks() if not task.get_name().startswith("Task-")}
            assert after <= before | {"ping the bus's server"}
            assert len(asyncio.all_tasks()) <= count + 4
            assert bus.counters.reconnects == 10


async def test_an_error_that_closes_the_client_for_good_is_survived() -> None:
    """nats-py stays closed after ``-ERR`` of this kind; the bus doesn't. Sent below our own check of sizes."""
    with NatsServer() as server:
        async with NatsWorld(server) as world:
            bus = await world.bus("one")
            heard: Collector[Received[GatewayBeat]] = Collector()
            await bus.subscribe(GATEWAY_BEAT, heard)
            await bus.publish(GATEWAY_BEAT, gateway_beat(1), gateway="g")
            await heard.wait(1)
            await bus.transport.publish(Raw("too.large", b"x" * bus.max_payload, "", {"One": "header"}))
            await reached(bus, "disconnected")
            assert "maximum payload violation" in bus.counters.last_error.lower()
            await reached(bus, "connected")
            await bus.publish(GATEWAY_BEAT, gateway_beat(2), gateway="g")
            assert [one.message.open_streams for one in await heard.wait(2)] == [1, 2]


async def test_nobody_there_is_one_sentence_without_credentials() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        bus = NatsBus(f"nats://me:secret@127.0.0.1:{port}", cluster="home", name="x")
        with pytest.raises(StartError) as refused:
            await bus.connect(0.3)
    assert refused.value.code == "cluster_not_reached"
    assert f"127.0.0.1:{port}" in refused.value.detail
    assert "secret" not in refused.value.detail
    assert bus.state == "closed"


async def test_wrong_credentials_are_said_at_once() -> None:
    with NatsServer('authorization { user: skulk, password: "right" }\n') as server:
        bus = NatsBus(server.url, cluster="home", name="x", user="skulk", password="right")
        await bus.connect()
        await bus.flush()
        await bus.close()
        for user, password in (("skulk", "wrong"), (None, None)):
            refused_bus = NatsBus(server.url, cluster="home", name="x", user=user, password=password)
            with pytest.raises(StartError) as refused:
                async with asyncio.timeout(WAIT_S):
                    await refused_bus.connect(3_600.0)
            assert refused.value.code == "cluster_not_reached"
            assert "refused our credentials" in refused.value.detail


async def test_a_token_and_credentials_in_the_address_are_taken() -> None:
    with NatsServer('authorization { token: "t0ken" }\n') as server:
        bus = NatsBus(server.url, cluster="home", name="x", token="t0ken")
        await bus.connect()
        await bus.flush()
        await bus.close()
    with NatsServer('authorization { user: skulk, password: "right" }\n') as server:
        bus = NatsBus(f"nats://skulk:right@127.0.0.1:{server.port}", cluster="home", name="x")
        await bus.connect()
        await bus.flush()
        await bus.close()


async def test_a_server_that_accepts_and_says_nothing_is_given_up() -> None:
    async with contextlib.AsyncExitStack() as stack:
        quiet = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        stack.callback(quiet.close)
        port = quiet.sockets[0].getsockname()[1]
        bus = NatsBus(f"nats://127.0.0.1:{port}", cluster="home", name="x", connect_timeout_s=0.1)
        with pytest.raises(StartError) as refused:
            await bus.connect(0.5)
        assert "gave no answer in 0.1 s" in refused.value.detail
        assert bus.counters.replaced_clients >= 1


async def test_of_several_servers_the_next_takes_over() -> None:
    with NatsServer() as first, NatsServer() as second:
        bus = NatsBus(f"{first.url},{second.url}", cluster="home", name="x")
        await bus.connect()
        first.kill()
        await reached(bus, "disconnected")
        await reached(bus, "connected")
        await bus.flush()
        second.kill()
        await reached(bus, "disconnected")
        first.start()
        await reached(bus, "connected")
        await bus.close()


async def test_a_permission_that_lacks_is_counted_and_ends_nothing() -> None:
    config = """authorization { users: [{
        user: a, password: b, permissions: {publish: {deny: "skulk.*.v1.beat.>"}, subscribe: ">"}}] }"""
    with NatsServer(config) as server:
        bus = NatsBus(server.url, cluster="home", name="x", user="a", password="b")
        await bus.connect()
        await bus.publish(GATEWAY_BEAT, gateway_beat(), gateway="g")
        await bus.flush()
        assert bus.counters.client_errors == 1
        assert "permissions violation" in bus.counters.last_error.lower()
        assert (bus.state, bus.counters.replaced_clients) == ("connected", 0)
        await bus.close()


async def test_sizes_are_the_servers_after_a_restart_with_another_limit() -> None:
    with NatsServer("max_payload: 2097152\n") as server:
        bus = NatsBus(server.url, cluster="home", name="x")
        await bus.connect()
        assert bus.max_payload == 2_097_152
        await bus.publish(GATEWAY_BEAT, gateway_beat(incarnation="x" * 1_500_000), gateway="g")
        server.kill()
        await reached(bus, "disconnected")
        server.config = "max_payload: 1048576\n"
        server.start()
        await reached(bus, "connected")
        with pytest.raises(RequestError) as refused:
            await bus.publish(GATEWAY_BEAT, gateway_beat(incarnation="x" * 1_500_000), gateway="g")
        assert "1048576" in refused.value.detail
        await bus.close()


async def test_a_late_flush_does_not_break_the_connection() -> None:
    """In nats-py a pong that comes after its flush was given up ends the read loop without a word."""
    with NatsServer() as server:
        async with NatsWorld(server) as world, through_proxy(world) as (proxy, bus):
            proxy.delay_s = 0.3
            for _ in range(3):
                with pytest.raises(ServiceError):
                    await bus.flush(0.05)
            proxy.delay_s = 0.0
            await bus.flush(WAIT_S)
            assert (bus.state, bus.counters.replaced_clients) == ("connected", 0)


async def send_with_headers(world: NatsWorld, headers: bytes) -> None:
    """A gateway's beat with these bytes as its headers, as no client of NATS would send it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.server.port)
    try:
        await reader.readline()
        body = encode(gateway_beat(1))
        subject = GATEWAY_BEAT.subject(world.cluster, gateway="g").encode()
        writer.write(b'CONNECT {"verbose":false,"headers":true}\r\n')
        writer.write(b"HPUB %s %d %d\r\n" % (subject, len(headers), len(headers) + len(body)) + headers + body)
        writer.write(b"\r\nPING\r\n")
        assert await asyncio.wait_for(reader.readline(), WAIT_S) == b"PONG\r\n"
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("headers", [b"NATS/1.0", b"NATS/1.0 \xff\xff\xff\r\n\r\n", b"x", b"NATS/1.0\r\n\xff\r\n\r\n"])
async def test_malformed_headers_cost_no_connection(headers: bytes) -> None:
    with NatsServer() as server:
        async with NatsWorld(server) as world:
            bus = await world.bus("one")
            heard: Collector[Received[GatewayBeat]] = Collector()
            await bus.subscribe(GATEWAY_BEAT, heard)
            await send_with_headers(world, headers)
            await heard.wait(1)
            await bus.publish(GATEWAY_BEAT, gateway_beat(2), gateway="g")
            assert [one.message.open_streams for one in await heard.wait(2)] == [1, 2]
            assert bus.counters.reconnects == 0


async def test_a_client_that_stopped_reading_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """nats-py's read loop ends at anything unforeseen, and the client goes on as if it were connected."""

    async def unforeseen(*_: object) -> None:
        monkeypatch.undo()
        raise IndexError("unforeseen")

    with NatsServer() as server:
        async with NatsWorld(server) as world:
            bus = await world.bus("one")
            heard: Collector[Received[GatewayBeat]] = Collector()
            await bus.subscribe(GATEWAY_BEAT, heard)
            lost = asyncio.create_task(reached(bus, "disconnected"), name="lost")
            monkeypatch.setattr(Client, "_process_msg", unforeseen)
            await bus.publish(GATEWAY_BEAT, gateway_beat(1), gateway="g")
            await lost
            await reached(bus, "connected")
            await bus.publish(GATEWAY_BEAT, gateway_beat(2), gateway="g")
            assert [one.message.open_streams for one in await heard.wait(1)] == [2]
