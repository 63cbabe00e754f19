"""The mesh of real nats-servers: nodes join in any order, meet again after any death, and tell who stays out."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
from contextlib import AsyncExitStack
from itertools import permutations
from pathlib import Path
from typing import Any

import psutil
import pytest

from skulk.supervision.nats_config import route_credentials
from tests.support.bus import reached
from tests.support.child_processes import no_process_left
from tests.support.mesh import FULL_S, MeshNode, ending, free_ports, until_full, wait_for
from tests.support.tcp_proxy import TcpProxy

HEALED_S = 10.0


@pytest.mark.parametrize("way", ["one after another", "at the same moment", "the named one last"])
async def test_nodes_join_in_any_order(way: str, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    named = MeshNode("a", tmp_path / "a", route_port=port)
    others = [MeshNode(name, tmp_path / name, (f"127.0.0.1:{port}",)) for name in "bc"]
    order = {
        "one after another": [[named], [others[0]], [others[1]]],
        "at the same moment": [[others[0], named, others[1]]],
        "the named one last": [others, [named]],
    }[way]
    with no_process_left():
        async with ending(named, *others):
            for group in order:
                await asyncio.gather(*(node.start() for node in group))
            await until_full(named, *others)


async def test_two_nodes_that_name_each_other_start_at_the_same_moment(tmp_path: Path) -> None:
    first, second = free_ports(2)
    one = MeshNode("a", tmp_path / "a", (f"127.0.0.1:{second}",), route_port=first)
    two = MeshNode("b", tmp_path / "b", (f"127.0.0.1:{first}",), route_port=second)
    with no_process_left():
        async with ending(one, two):
            await asyncio.gather(one.start(), two.start())
            await until_full(one, two)


async def test_the_first_of_three_dies_and_the_others_restart_in_turn_and_then_at_once(tmp_path: Path) -> None:
    """Only the first was named, and free ports were asked for: what the others know of each other is on their disks."""
    with no_process_left():
        first = await MeshNode("a", tmp_path / "a").start()
        named = (first.route,)
        two, three = (MeshNode(name, tmp_path / name, named) for name in "bc")
        async with ending(first, two, three):
            await asyncio.gather(two.start(), three.start())
            await until_full(first, two, three)
            await first.stop()
            for node in (two, three):
                await wait_for(
                    lambda node=node: set(node.mesh.closed) == {"a"}, FULL_S, lambda: "its routes are closed"
                )
            await until_full(two, three)
            for node in (two, three):
                await node.stop()
                await node.start()
                await until_full(two, three)
            await asyncio.gather(two.stop(), three.stop())
            await asyncio.gather(two.start(), three.start())
            await until_full(two, three)


async def test_a_killed_server_is_back_with_its_clients_and_routes(tmp_path: Path) -> None:
    with no_process_left():
        first = await MeshNode("a", tmp_path / "a").start()
        two = MeshNode("b", tmp_path / "b", (first.route,))
        async with ending(first, two):
            await two.start()
            await until_full(first, two)
            for node in (first, two):
                pid, counters = node.server.pid, node.bus.counters
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await reached(node.bus, "disconnected")
                await reached(node.bus, "connected")
                assert counters.reconnects == 1
                first.forget_heard()
                two.forget_heard()
                await until_full(first, two, timeout_s=HEALED_S)


async def test_the_link_between_two_of_three_is_cut_and_heals(tmp_path: Path) -> None:
    """Silently, as a cable does; the third one hears both all the time, and nothing is forwarded by two hops."""
    ports = dict(zip("abc", free_ports(3), strict=True))
    with no_process_left():
        async with AsyncExitStack() as stack:
            ways = {
                (here, there): await stack.enter_async_context(TcpProxy(ports[there]))
                for here, there in permutations(ports, 2)
            }

            def node_of(name: str) -> MeshNode:
                """A node that reaches each other one by a way of its own; what the servers gossip leads nowhere."""
                seen = {there: f"127.0.0.1:{way.port}" for (here, there), way in ways.items() if here == name}
                told = {"route_port": ports[name], "route_advertise": "127.0.0.1:1"}
                return MeshNode(name, tmp_path / name, tuple(seen.values()), seen_routes=seen, **told)

            nodes = one, two, three = node_of("a"), node_of("b"), node_of("c")
            await stack.enter_async_context(ending(*nodes))
            await asyncio.gather(*(node.start() for node in nodes))
            await until_full(*nodes)
            link = ways["a", "b"], ways["b", "a"]
            for way in link:
                way.swallow(is_swallowing=True)
            await asyncio.gather(one.until_joined("c"), two.until_joined("c"), three.until_joined("a", "b"))
            for node in nodes:
                node.forget_heard()
            await asyncio.gather(one.until_hears("c"), two.until_hears("c"), three.until_hears("a", "b"))
            assert one.heard.keys() == two.heard.keys() == {"c"}
            for way in link:
                way.swallow(is_swallowing=False)
            await until_full(*nodes, timeout_s=HEALED_S)


async def test_a_peer_that_changes_its_port_is_followed(tmp_path: Path) -> None:
    with no_process_left():
        first, second = free_ports(2)
        one = await MeshNode("a", tmp_path / "a").start()
        two = MeshNode("b", tmp_path / "b", (one.route,), route_port=first)
        moved = MeshNode("b", tmp_path / "b", (one.route,), route_port=second)
        async with ending(one, two, moved):
            await two.start()
            await until_full(one, two)
            await two.stop()
            await moved.start()
            await until_full(one, moved)
            conf = Path(one.settings.home) / "nats" / "nats.conf"
            await wait_for(lambda: f"127.0.0.1:{second}" in conf.read_text(), HEALED_S, conf.read_text)
            assert f"127.0.0.1:{first}" not in conf.read_text()


async def test_the_copy_of_a_home_joins_so_that_its_id_is_heard_twice(tmp_path: Path) -> None:
    """What follows is the nodes' own doing: each hears its id from another incarnation."""
    with no_process_left():
        third = await MeshNode("c", tmp_path / "c").start()
        one, copy = (MeshNode("a", tmp_path / home, (third.route,)) for home in ("a", "copy"))
        async with ending(third, one, copy):
            await asyncio.gather(one.start(), copy.start())
            await asyncio.gather(*(node.until_hears("c") for node in (one, copy)))
            await asyncio.gather(*(node.heard_itself.wait() for node in (one, copy)))


async def test_it_is_told_why_a_peer_is_not_joined(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (closed,) = free_ports(1)
    with no_process_left():
        ours = MeshNode("a", tmp_path / "a", cluster_token="one")
        stranger = MeshNode("b", tmp_path / "b", cluster_token="other")
        open_one = MeshNode("c", tmp_path / "c")
        foreign = MeshNode("d", tmp_path / "d", cluster="garage", cluster_token="one")
        async with ending(ours, stranger, open_one, foreign):
            await asyncio.gather(stranger.start(), open_one.start(), foreign.start())
            told = {
                stranger.route: ("wrong_token", "is not this node's"),
                open_one.route: ("wrong_token", "it has none"),
                foreign.route: ("other_cluster", "cluster garage"),
                f"127.0.0.1:{closed}": ("port_closed", "nobody listens"),
                f"127.0.0.1:{stranger.endpoint.client_port}": ("other_program", "for clients"),
            }
            ours = MeshNode("a", tmp_path / "a", tuple(told), cluster_token="one")
            with caplog.at_level("INFO", "skulk.mesh"):
                await ours.start()
                async with ending(ours):
                    await wait_for(lambda: len(caplog.messages) >= len(told), 15.0, lambda: str(caplog.messages))
                    problems = {one.route: (one.problem, one.detail) for one in ours.mesh.standings()}
            for route, (problem, part) in told.items():
                assert problems[route][0] == problem and part in problems[route][1], problems[route]
                assert sum(problems[route][1] in line for line in caplog.messages) == 1
            conf = (tmp_path / "a" / "nats" / "nats.conf").read_text()
            # Those that say no aren't dialled: they would log it every second.
            assert conf.count("nats://") == 0
            assert ours.mesh.joined == frozenset()


async def test_the_server_shows_no_secret_and_opens_no_other_door(tmp_path: Path) -> None:
    with no_process_left():
        node = await MeshNode("a", tmp_path / "a", cluster_token="a secret").start()
        async with ending(node):
            server = psutil.Process(node.server.pid)
            doors = {one.laddr.port: one.laddr.ip for one in server.net_connections("tcp") if one.status == "LISTEN"}
            endpoint = node.endpoint
            assert doors.keys() == {endpoint.client_port, endpoint.monitor_port, endpoint.route_port}
            assert set(doors.values()) == {"127.0.0.1"}
            conf = tmp_path / "a" / "nats" / "nats.conf"
            assert stat.S_IMODE(conf.stat().st_mode) == 0o600
            secrets = ("a secret", route_credentials("a secret").password)
            assert all(secret in conf.read_text() for secret in secrets)
            told = [*server.cmdline(), *server.environ().values()]
            assert not [word for word in told if any(secret in word for secret in secrets)]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
async def test_routes_over_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    made = await asyncio.create_subprocess_exec(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"),
        *("-subj", "/CN=node", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)),
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await made.wait() == 0
    tls: dict[str, Any] = {
        "tls_cert": str(certificate),
        "tls_key": str(key),
        "tls_ca": str(certificate),
        "cluster_token": "hush",
    }
    with no_process_left():
        first = await MeshNode("a", tmp_path / "a", **tls).start()
        two, bare = MeshNode("b", tmp_path / "b", (first.route,), **tls), MeshNode("c", tmp_path / "c", (first.route,))
        async with ending(first, two, bare):
            await asyncio.gather(two.start(), bare.start())
            await until_full(first, two)
            await wait_for(
                lambda: [one.problem for one in bare.mesh.standings()] == ["wrong_tls"],
                HEALED_S,
                lambda: str(bare.mesh.standings()),
            )
