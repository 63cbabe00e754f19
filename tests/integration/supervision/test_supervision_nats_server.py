"""A real nats-server under supervision: ports, reload, refusals."""

from __future__ import annotations

import asyncio
import socket
import stat
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from urllib.request import urlopen

import msgspec
import nats
import psutil
import pytest

from skulk.errors import ServiceError, StartError
from skulk.supervision import nats_server as nats_server_module
from skulk.supervision.nats_binary import find_nats_server
from skulk.supervision.nats_config import NatsPorts, NatsServerConfig, new_password
from skulk.supervision.nats_ping import PingConnection
from skulk.supervision.nats_server import NatsEndpoint, NatsServer
from skulk.supervision.restarts import GiveUp, RestartPolicy
from skulk.supervision.supervisor import Crash

QUICK = RestartPolicy(first_s=0.05, budget=3, advice="Read the log.")


def config(name: str = "n1", **changes: object) -> NatsServerConfig:
    fields: dict[str, object] = {
        "server_name": name,
        "cluster_name": "home",
        "client_password": new_password(),
        "local": True,
        **changes,
    }
    return NatsServerConfig(**fields)  # pyright: ignore[reportArgumentType]


class Running:
    """A server in a task of its own, and what it reported."""

    def __init__(self, home: Path, settings: NatsServerConfig, kept: NatsPorts | None) -> None:
        self.endpoints: asyncio.Queue[NatsEndpoint] = asyncio.Queue(100)
        self.crashes: list[Crash] = []
        self.server = NatsServer(
            find_nats_server(),
            home,
            settings,
            on_endpoint=self.endpoints.put_nowait,
            on_exit=self.crashes.append,
            kept=kept,
            policy=QUICK,
        )


@asynccontextmanager
async def running(home: Path, settings: NatsServerConfig, kept: NatsPorts | None = None) -> AsyncGenerator[Running]:
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(60.0):
        life = Running(home, settings, kept)
        task = tasks.create_task(life.server.run(), name="server")
        yield life
        await life.server.stop()
        assert await task is None or life.crashes


async def request_works(endpoint: NatsEndpoint) -> bool:
    client = await nats.connect(endpoint.client_url, user=endpoint.user, password=endpoint.password)
    await client.flush(5)
    await client.close()
    return True


async def answer_to_a_stranger(port: int) -> bytes:
    """What a client without credentials is told."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await reader.readline()
    writer.write(b'CONNECT {"verbose": false}\r\nPING\r\n')
    answer = await reader.readline()
    writer.transport.abort()
    return answer


def taken_port() -> socket.socket:
    holder = socket.socket()
    holder.bind(("127.0.0.1", 0))
    holder.listen()
    return holder


def routes_of(endpoint: NatsEndpoint) -> set[str]:
    with urlopen(f"http://127.0.0.1:{endpoint.monitor_port}/routez", timeout=5) as answer:
        return {route["remote_name"] for route in msgspec.json.decode(answer.read())["routes"]}


async def test_it_serves_its_own_clients_on_loopback_and_nobody_else(tmp_path: Path) -> None:
    async with running(tmp_path, config()) as life:
        endpoint = await life.server.wait_ready()
        assert await request_works(endpoint)
        assert endpoint == life.endpoints.get_nowait()
        assert endpoint.password not in endpoint.client_url
        assert await answer_to_a_stranger(endpoint.client_port) == b"-ERR 'Authorization Violation'\r\n"
        assert life.server.pid is not None
        process = psutil.Process(life.server.pid)
        assert endpoint.password not in " ".join(process.cmdline())
        listening = {c.laddr for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
        ports = {endpoint.client_port, endpoint.monitor_port, endpoint.route_port}
        assert listening == {("127.0.0.1", port) for port in ports} and len(ports) == 3
        mode = (tmp_path / "nats" / "nats.conf").stat().st_mode
        assert stat.S_IMODE(mode) == 0o600
    assert life.server.pid is None and not life.crashes


async def test_a_server_without_routes_monitor_and_password_has_one_door_for_all(tmp_path: Path) -> None:
    async with running(tmp_path, config(route_port=None, monitor_port=None, client_password="")) as life:
        endpoint = await life.server.wait_ready()
        assert (endpoint.monitor_port, endpoint.route_port) == (None, None)
        assert await answer_to_a_stranger(endpoint.client_port) == b"PONG\r\n"


@pytest.mark.parametrize(("field", "flag"), [("client_port", "--nats-port"), ("route_port", "--route-port")])
async def test_a_port_in_use_is_told_with_its_flag_and_not_tried_again(tmp_path: Path, field: str, flag: str) -> None:
    with closing(taken_port()) as holder:
        port = holder.getsockname()[1]
        async with running(tmp_path, config(**{field: port})) as life:
            with pytest.raises(StartError, match=rf"Port {port} .* in use.*\({flag} 0 picks a free one") as caught:
                await life.server.wait_ready()
        assert (caught.value.code, caught.value.exit_status) == ("port_in_use", 75)
        assert len(life.crashes) == 1


async def test_an_address_that_is_not_ours_is_told_with_the_servers_reason(tmp_path: Path) -> None:
    async with running(tmp_path, config(route_host="192.0.2.1", local=False, route_port=52416)) as life:
        with pytest.raises(StartError, match=r"52416.*cannot assign requested address|can't assign") as caught:
            await life.server.wait_ready()
    assert caught.value.code == "config_invalid"


async def test_a_configuration_that_it_refuses_is_given_up_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_server_module, "render", lambda *_: "no_such_option: 1\n")
    async with running(tmp_path, config()) as life:
        with pytest.raises(StartError, match=r"no_such_option.*3 crashes.*Read the log\."):
            await life.server.wait_ready()
    assert isinstance(life.crashes[-1].decision, GiveUp)


async def test_servers_join_by_a_route_that_is_added_later_without_a_break(tmp_path: Path) -> None:
    secret = {"route_user": "route", "route_password": new_password()}
    first, second = config("n1", **secret), config("n2", **secret)
    async with running(tmp_path / "1", first) as one, running(tmp_path / "2", second) as two:
        here, there = await one.server.wait_ready(), await two.server.wait_ready()
        pid = one.server.pid
        ours = await nats.connect(here.client_url, user=here.user, password=here.password)
        theirs = await nats.connect(there.client_url, user=there.user, password=there.password)
        arrived = asyncio.Event()

        async def on_message(_: object) -> None:
            arrived.set()

        await theirs.subscribe("hello", cb=on_message)
        await theirs.flush()
        with_route = msgspec.structs.replace(first, routes=(f"127.0.0.1:{there.route_port}",))
        await one.server.reload(with_route)
        await one.server.reload(with_route)  # nothing to do
        while not arrived.is_set():
            # The route comes up some milliseconds after the reload; no event on this side tells when.
            await ours.publish("hello", b"")
            with suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await arrived.wait()
        assert ours.is_connected and ours.stats["reconnects"] == 0
        assert one.server.pid == pid and await asyncio.to_thread(routes_of, here) == {"n2"}
        await ours.close()
        await theirs.close()


async def test_a_server_with_another_token_does_not_join(tmp_path: Path) -> None:
    first = config("n1", route_user="route", route_password="one")
    async with running(tmp_path / "1", first) as one:
        here = await one.server.wait_ready()
        log = one.server._supervised.child
        assert log is not None
        refused = asyncio.create_task(log.line("(?i)authorization|authentication", 20.0))
        stranger = config("n2", route_user="route", route_password="other", routes=(f"127.0.0.1:{here.route_port}",))
        async with running(tmp_path / "2", stranger) as two:
            there = await two.server.wait_ready()
            await refused
            assert routes_of(here) == set()
            # The stranger dials again and again, and for a moment takes the other's greeting for a route.
            async with asyncio.timeout(5.0):
                while await asyncio.to_thread(routes_of, there):  # noqa: ASYNC110 - only its monitoring page tells
                    await asyncio.sleep(0.02)
            assert routes_of(here) == set()


async def test_ports_of_an_earlier_time_are_taken_again_or_exchanged(tmp_path: Path) -> None:
    async with running(tmp_path, config()) as life:
        ports = await life.server.wait_ready()
        assert ports.route_port is not None
    kept = NatsPorts(route=ports.route_port)
    async with running(tmp_path, config(), kept) as life:
        assert (await life.server.wait_ready()).route_port == life.server.endpoint.route_port == ports.route_port
    with closing(socket.socket()) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", ports.route_port))
        holder.listen()
        async with running(tmp_path, config(), kept) as life:
            assert (await life.server.wait_ready()).route_port not in (None, 0, ports.route_port)


async def test_a_reload_that_is_refused_keeps_the_former_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config()
    async with running(tmp_path, settings) as life:
        endpoint = await life.server.wait_ready()
        before = (tmp_path / "nats" / "nats.conf").read_text()
        with monkeypatch.context() as patch:
            render = nats_server_module.render

            def odd(config: NatsServerConfig, ports: object = None) -> str:
                return render(config) + ("odd: 1\n" if config.routes else "")

            patch.setattr(nats_server_module, "render", odd)
            with pytest.raises(ServiceError, match=r"refused its new configuration.*odd"):
                await life.server.reload(msgspec.structs.replace(settings, routes=("127.0.0.1:1",)))
        assert (tmp_path / "nats" / "nats.conf").read_text() == before
        assert await request_works(endpoint)


async def test_a_reload_of_a_server_that_does_not_answer_has_a_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats_server_module, "RELOAD_TIMEOUT_S", 0.01)
    monkeypatch.setattr(nats_server_module, "_RELOADED", "a line it never writes")
    settings = config()
    async with running(tmp_path, settings) as life:
        await life.server.wait_ready()
        with pytest.raises(ServiceError) as caught:
            await life.server.reload(msgspec.structs.replace(settings, routes=("127.0.0.1:1",)))
    assert caught.value.code == "deadline_exceeded"


async def test_a_folder_that_cannot_be_written_is_the_homes_fault(tmp_path: Path) -> None:
    (tmp_path / "nats").write_text("")
    async with running(tmp_path, config()) as life:
        with pytest.raises(StartError, match="--home DIR") as caught:
            await life.server.wait_ready()
    assert caught.value.code == "home_not_writable"


@asynccontextmanager
async def saying(talk: list[bytes], heard: bytearray) -> AsyncGenerator[int]:
    """A port whose one visitor is told ``talk`` and says what is ``heard``."""
    is_over = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for words in talk:
            writer.write(words)
        with suppress(ConnectionError):
            while part := await reader.read(1000):
                heard.extend(part)
        writer.transport.abort()
        is_over.set()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    await is_over.wait()
    server.close()
    await server.wait_closed()


@pytest.mark.parametrize(
    ("talk", "lives"),
    [
        ([b"INFO {}\r\n", b"PING\r\n", b"INFO {}\r\n", b"PONG\r\n"], True),
        ([b"INFO {}\r\n", b"-ERR 'Authorization Violation'\r\n"], True),
        ([b"HTTP/1.1 400 Bad Request\r\n"], False),
        ([b"x" * 300_000], False),
    ],
)
async def test_a_ping_is_answered_by_any_word_of_a_server(talk: list[bytes], lives: bool) -> None:
    heard = bytearray()
    async with asyncio.timeout(5.0), saying(talk, heard) as port:
        connection = PingConnection(port, "u", "p")
        if lives:
            await connection.ping()
        else:
            with pytest.raises(OSError):
                await connection.ping()
        connection.close()
    assert (b"PONG\r\n" in heard) == (b"PING\r\n" in talk)


async def test_a_ping_to_nobody_is_refused() -> None:
    with closing(socket.socket()) as holder:
        holder.bind(("127.0.0.1", 0))
        with pytest.raises(OSError):
            await PingConnection(holder.getsockname()[1], "u", "p").ping()
