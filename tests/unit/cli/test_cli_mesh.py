"""What the launcher knows of peers at its start, by which routes others reach it, and what the doctor says of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from skulk.cli import doctor_peers
from skulk.cli.doctor_peers import check_peer, check_peers, look_around
from skulk.cli.mesh import known_at_start, own_routes, routes_of
from skulk.cli.mesh_file import MESH_FILE, read_mesh_file, remove_mesh_file, write_mesh_file
from skulk.cli.nats_settings import route_tls
from skulk.cli.node_file import NodeFile
from skulk.clock import SystemClock
from skulk.discovery.adverts import Advert
from skulk.discovery.peers import Neighbour, Standing
from skulk.discovery.store import PEERS_FILE, Remembered, load_peers, save_peers
from skulk.errors import StartError
from skulk.settings import Settings
from skulk.supervision.nats_config import NatsPorts
from skulk.supervision.nats_monitor import read_routes

NODE = NodeFile(node_id="me", pid=1, version="0", cluster="skulk", started_at=0.0)
APART = Standing(peer="x", state="apart", name="attic", problem="wrong_token", detail="its token differs", route="a:7")


def settings(home: Path, **changes: Any) -> Settings:
    return Settings(home=str(home), models_dir="", **changes)


def test_peers_on_the_disk_are_dialled_at_the_start_and_the_port_is_taken_again(tmp_path: Path) -> None:
    peers = (Neighbour(node_id="x", routes=("10.0.0.2:7", "10.1.0.2:7"), heard_at=1.0),)
    assert save_peers(tmp_path, Remembered(cluster="skulk", route_port=9, peers=peers))
    known, kept = known_at_start(settings(tmp_path, bootstrap_peers=("attic:52416",)), "me")
    assert (routes_of(known), kept) == (("10.0.0.2:7", "attic:52416"), NatsPorts(route=9))
    known, kept = known_at_start(settings(tmp_path, cluster="garage"), "me")
    assert (routes_of(known), kept) == ((), NatsPorts())
    assert (tmp_path / PEERS_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("body", ["", "{", '{"cluster": 7}'])
def test_a_damaged_memory_is_begun_anew(body: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / PEERS_FILE).write_text(body)
    assert load_peers(tmp_path, "skulk") == Remembered(cluster="skulk")
    assert "peers are found anew" in caplog.text


def test_a_memory_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert not save_peers(tmp_path / "absent", Remembered(cluster="skulk"))
    write_mesh_file(tmp_path / "absent", ())
    assert len(caplog.messages) == 2


def test_by_which_routes_others_reach_this_node(tmp_path: Path) -> None:
    def found() -> tuple[str, ...]:
        return ("10.0.0.5", "fd00::5")

    assert own_routes(settings(tmp_path), 7, found) == ("10.0.0.5:7", "[fd00::5]:7")
    assert own_routes(settings(tmp_path, local=True), 7, found) == ("127.0.0.1:7",)
    assert own_routes(settings(tmp_path, route_advertise="box.example"), 7, found) == ("box.example:7",)
    assert own_routes(settings(tmp_path, route_advertise="box.example:99"), 7, found) == ("box.example:99",)


def test_on_a_local_cluster_only_loopback_is_dialled(tmp_path: Path) -> None:
    known, _ = known_at_start(settings(tmp_path, local=True, bootstrap_peers=("127.0.0.1:7", "10.0.0.1:7")), "me")
    assert routes_of(known) == ("127.0.0.1:7",)


def test_tls_takes_three_files_or_none(tmp_path: Path) -> None:
    assert route_tls(settings(tmp_path)) is None
    (tmp_path / "f").touch()
    path = str(tmp_path / "f")
    with pytest.raises(StartError, match="SKULK_TLS_CA is missing"):
        route_tls(settings(tmp_path, tls_cert=path, tls_key=path))
    with pytest.raises(StartError, match=r"SKULK_TLS_KEY: .* is no file"):
        route_tls(settings(tmp_path, tls_cert=path, tls_key=f"{path}x", tls_ca=path))
    tls = route_tls(settings(tmp_path, tls_cert=path, tls_key=path, tls_ca=path))
    assert tls is not None and tls.ca_file == path


def test_the_monitor_s_answer() -> None:
    body = (
        b'{"routes":[{"remote_name":"skulk-a","did_solicit":true,"ip":"10.0.0.1","port":7},'
        b'{"remote_name":"skulk-b","did_solicit":true,"ip":"fd00::1","port":7},{"remote_name":"skulk-c","port":9},{"rid":1}]}'
    )
    found = read_routes(b"HTTP/1.0 200 OK\r\nA: b\r\n\r\n" + body)
    assert found == {"skulk-a": "10.0.0.1:7", "skulk-b": "[fd00::1]:7", "skulk-c": ""}
    for answer in (b"", b"HTTP/1.0 404 Not Found\r\n\r\n{}", b"HTTP/1.0 200 OK\r\n\r\n{"):
        with pytest.raises(OSError):
            read_routes(answer)


def test_the_doctor_tells_what_the_launcher_knows(tmp_path: Path) -> None:
    joined = Standing(peer="y", state="joined", route="10.0.0.2:7")
    write_mesh_file(tmp_path, (APART, joined))
    assert read_mesh_file(tmp_path) == (APART, joined)
    apart, well = check_peers(settings(tmp_path), NODE)
    assert (apart.check, apart.verdict, apart.detail) == ("peer attic", "warn", "not joined: its token differs.")
    assert "same SKULK_CLUSTER_TOKEN" in apart.remedy
    assert (well.verdict, well.detail) == ("ok", "node y is joined at 10.0.0.2:7")
    remove_mesh_file(tmp_path)
    assert read_mesh_file(tmp_path) is None and not (tmp_path / MESH_FILE).exists()


def test_a_peer_that_does_not_answer_yet_is_no_failure() -> None:
    trying = Standing(peer="x", state="trying", route="a:7")
    assert check_peer(trying, is_running=True).verdict == "warn"
    assert check_peer(trying, is_running=False).verdict == "ok"


def test_without_other_nodes_nothing_is_looked_for(tmp_path: Path) -> None:
    assert list(check_peers(settings(tmp_path, local=True), None)) == []
    assert list(check_peers(settings(tmp_path, nats_url="nats://box"), None)) == []
    (alone,) = check_peers(settings(tmp_path, mdns=False), None)
    assert (alone.verdict, alone.detail) == ("ok", "no other node is seen")


async def test_the_doctor_looks_around_where_no_node_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def browse(wait_s: float) -> tuple[Advert, ...]:
        del wait_s
        return tuple(
            Advert(cluster=cluster, node_id=node_id, version="0", protocol=1, port=port, addresses=("192.0.2.1",))
            for cluster, node_id in (("skulk", "aaaa"), ("garage", "bbbb"))
        )

    async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        del reader
        writer.write(b'INFO {"server_name":"skulk-cccc","cluster":"skulk-skulk"} \r\n')
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(hello, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    monkeypatch.setattr(doctor_peers, "browse_once", browse)
    monkeypatch.setattr("skulk.discovery.probe.TIMEOUT_S", 0.5)
    named = (f"127.0.0.1:{port}", "127.0.0.1:1")
    found = {one.peer: one for one in await look_around(settings(tmp_path, bootstrap_peers=named), "me", SystemClock())}
    server.close()
    await server.wait_closed()
    assert {peer: (one.state, one.problem) for peer, one in found.items() if peer != "aaaa"} == {
        "bbbb": ("apart", "other_cluster"),
        "cccc": ("trying", None),
        "127.0.0.1:1": ("apart", "port_closed"),
    }
    assert found["aaaa"].state == "apart"
