"""What must hold when processes are killed and frozen: no orphans, and a server that comes back on its ports."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import nats
import psutil
import pytest

from skulk.supervision.child import Child
from skulk.supervision.nats_binary import find_nats_server
from skulk.supervision.nats_config import NatsServerConfig, new_password
from skulk.supervision.nats_ping import PingConnection, PingPolicy
from skulk.supervision.nats_server import NatsEndpoint, NatsServer
from skulk.supervision.restarts import RestartPolicy
from skulk.supervision.supervisor import Crash
from tests.support.child_processes import ROOT, await_gone, no_process_left, python_spec

ON_LINUX = sys.platform.startswith("linux")
LINUX_ONLY = pytest.mark.skipif(not ON_LINUX, reason="only Linux ends children with their parent")

# A launcher in small: starts one child that ignores everything but SIGKILL, tells its number, waits.
LAUNCHER = """
import asyncio, sys
from skulk.supervision.child import Child, ChildSpec
DEAF = '''
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
print("deaf", flush=True)
while True:
    time.sleep(60)
'''
async def main():
    child = Child(ChildSpec(name="deaf", argv=(sys.executable, "-c", DEAF), ready="log_line:deaf", stdin={stdin}))
    await child.start()
    print(child.pid, flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def leaves_no_process() -> Iterator[None]:
    with no_process_left():
        yield


@LINUX_ONLY
@pytest.mark.parametrize("stdin", ["None", "b''"])
def test_a_child_dies_with_its_parent_by_the_kernel(stdin: str) -> None:
    code = LAUNCHER.format(stdin=stdin)
    launcher = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert launcher.stdout is not None
    child = int(launcher.stdout.readline())
    assert psutil.Process(child).status() != psutil.STATUS_ZOMBIE
    launcher.kill()
    launcher.communicate()
    assert await_gone(child)


@LINUX_ONLY
def test_a_child_whose_parent_died_before_it_asked_for_the_bond_ends_itself(tmp_path: Path) -> None:
    trampoline = ROOT / "skulk" / "supervision" / "trampoline.py"
    proof = tmp_path / "ran"
    command = [sys.executable, "-I", "-S", trampoline, str(os.getpid() + 1), "0", "--", "/usr/bin/env", "touch", proof]
    assert subprocess.run(command, timeout=30).returncode == -signal.SIGKILL
    assert not proof.exists()
    command[4] = str(os.getpid())
    assert subprocess.run(command, timeout=30).returncode == 0
    assert proof.exists()


@LINUX_ONLY
async def test_a_program_gets_no_signals_ignored_that_python_ignores() -> None:
    spec = msgspec.structs.replace(python_spec(""), argv=("grep", "SigIgn", "/proc/self/status"), ready="")
    child = Child(spec)
    await child.start()
    (line,) = (await child.exited).last_lines
    ignored = int(line.split()[1], 16)
    assert not [name for name in (signal.SIGPIPE, signal.SIGXFSZ) if ignored >> (name - 1) & 1]


class Watched:
    """A nats-server in a task of its own, with everything that it reported."""

    def __init__(self, home: Path, settings: NatsServerConfig, policy: RestartPolicy) -> None:
        self.endpoints: asyncio.Queue[NatsEndpoint] = asyncio.Queue(100)
        self.crashes: list[Crash] = []
        self.news: asyncio.Queue[Crash] = asyncio.Queue(100)
        self.server = NatsServer(
            find_nats_server(),
            home,
            settings,
            on_endpoint=self.endpoints.put_nowait,
            on_exit=self._on_exit,
            policy=policy,
            ping=PingPolicy(interval_s=0.1, timeout_s=0.3),
        )

    def _on_exit(self, crash: Crash) -> None:
        self.crashes.append(crash)
        self.news.put_nowait(crash)

    @property
    def pid(self) -> int:
        assert self.server.pid is not None
        return self.server.pid


@asynccontextmanager
async def watched(home: Path, **changes: object) -> AsyncGenerator[Watched]:
    fields: dict[str, object] = {
        "server_name": "n1",
        "cluster_name": "home",
        "client_password": new_password(),
        "local": True,
        **changes,
    }
    settings = NatsServerConfig(**fields)  # pyright: ignore[reportArgumentType]
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(60.0):
        life = Watched(home, settings, RestartPolicy(first_s=0.05, budget=100))
        task = tasks.create_task(life.server.run(), name="server")
        yield life
        await life.server.stop()
        assert await task is None


async def test_a_killed_server_comes_back_on_its_ports_and_clients_reconnect(tmp_path: Path) -> None:
    async with watched(tmp_path) as life:
        first = await life.endpoints.get()
        reconnected = asyncio.Event()

        async def on_reconnect() -> None:
            reconnected.set()

        async def on_error(_: Exception) -> None:
            """Lost connections are what this is about."""

        client = await nats.connect(
            first.client_url,
            user=first.user,
            password=first.password,
            reconnect_time_wait=0.05,
            max_reconnect_attempts=-1,
            reconnected_cb=on_reconnect,
            error_cb=on_error,
        )
        pid = life.pid
        os.kill(pid, signal.SIGKILL)
        assert await life.endpoints.get() == first
        await reconnected.wait()
        await client.flush(5)
        await client.close()
        assert life.pid != pid
        assert [crash.report.signal_name for crash in life.crashes if crash.report] == ["SIGKILL"]


async def test_a_frozen_server_is_noticed_killed_and_replaced_on_its_ports(tmp_path: Path) -> None:
    async with watched(tmp_path) as life:
        first = await life.endpoints.get()
        pid = life.pid
        os.kill(pid, signal.SIGSTOP)
        assert await life.endpoints.get() == first
        assert life.pid != pid and await_gone(pid)
        assert "it left 2 pings unanswered" in life.crashes[0].detail


async def test_a_second_crash_right_after_the_first_is_repaired_too(tmp_path: Path) -> None:
    async with watched(tmp_path) as life:
        first = await life.endpoints.get()
        for kind in (signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGKILL):
            os.kill(life.pid, kind)
            assert await life.endpoints.get() == first
        assert len(life.crashes) == 4


async def test_a_healthy_server_is_left_in_peace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered, enough, real_ping = 0, asyncio.Event(), PingConnection.ping

    async def counted(connection: PingConnection) -> None:
        nonlocal answered
        await real_ping(connection)
        answered += 1
        if answered == 35:  # past the 3 s after which a server cuts off who doesn't answer it
            enough.set()

    monkeypatch.setattr(PingConnection, "ping", counted)
    async with watched(tmp_path) as life:
        await life.endpoints.get()
        pid = life.pid
        await enough.wait()
        assert life.pid == pid and not life.crashes


# Kills the server and takes its port before anybody else can.
TAKER = """
import os, signal, socket, sys, time
port, pid = int(sys.argv[1]), int(sys.argv[2])
os.kill(pid, signal.SIGKILL)
taker = socket.socket()
taker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
while True:
    try:
        taker.bind(("127.0.0.1", port))
        break
    except OSError:
        pass
taker.listen()
time.sleep(60)
"""


@asynccontextmanager
async def port_taken(life: Watched, port: int) -> AsyncGenerator[None]:
    """The server is killed, and its port taken by a stranger until the end of the block."""
    argv = (sys.executable, "-c", TAKER, str(port), str(life.pid))
    stranger = await asyncio.create_subprocess_exec(*argv)
    try:
        yield
    finally:
        stranger.kill()
        await stranger.wait()


async def test_a_random_port_that_somebody_took_meanwhile_is_exchanged(tmp_path: Path) -> None:
    async with watched(tmp_path) as life:
        first = await life.endpoints.get()
        async with port_taken(life, first.client_port):
            second = await life.endpoints.get()
        assert second.client_port != first.client_port
        assert (second.route_port, second.monitor_port) == (first.route_port, first.monitor_port)
        assert any("lost its port" in crash.detail for crash in life.crashes)


async def test_a_configured_port_that_is_taken_at_a_restart_is_tried_again(tmp_path: Path) -> None:
    with socket.socket() as finder:
        finder.bind(("127.0.0.1", 0))
        port = finder.getsockname()[1]
    async with watched(tmp_path, client_port=port) as life:
        first = await life.endpoints.get()
        async with port_taken(life, port):
            while "in use by another program" not in (await life.news.get()).detail:
                pass
        assert await life.endpoints.get() == first


async def test_a_restart_needs_no_room_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(tmp_path) as life:
        first = await life.endpoints.get()
        os.kill(life.pid, signal.SIGKILL)
        assert await life.endpoints.get() == first  # from now on the ports in the file are the real ones

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("skulk.files._write_new", full)
        os.kill(life.pid, signal.SIGKILL)
        assert await life.endpoints.get() == first


async def test_a_reload_between_two_lives_reaches_the_next_one(tmp_path: Path) -> None:
    async with watched(tmp_path) as life:
        await life.endpoints.get()
        changed = msgspec.structs.replace(life.server._config, routes=("127.0.0.1:9",))
        os.kill(life.pid, signal.SIGKILL)
        await life.server.reload(changed)
        await life.endpoints.get()
        assert "127.0.0.1:9" in await asyncio.to_thread((tmp_path / "nats" / "nats.conf").read_text)
