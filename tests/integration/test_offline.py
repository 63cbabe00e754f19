"""A node told to stay offline makes no network call at all: every process of it runs with its sockets watched.

The watch is a `sitecustomize` that each Python process of the node loads first: whatever isn't loopback is written down
and refused, name look-ups included. nats-server, the one process that isn't Python, listens on loopback here and is
told no peer.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.hub import SmallHub
from tests.support.whole_node import WholeNode, environment, skulk, whole_node

WATCH = """
import os, socket
_LOG = os.environ["TEST_OF_SOCKETS"]
_LOCAL = ("127.", "::1", "localhost", "0.0.0.0", "::")
def _check(what, host):
    host = host.decode() if isinstance(host, bytes) else host
    if host and not str(host).startswith(_LOCAL):
        with open(_LOG, "a") as log:
            log.write(f"{os.getpid()} {what} {host}\\n")
        raise OSError(101, "this process must stay offline")
def _watched(name):
    plain = getattr(socket.socket, name)
    def call(self, *given):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            address = given[-1]
            _check(name, address[0] if isinstance(address, tuple) else address)
        return plain(self, *given)
    return call
for _name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, _name, _watched(_name))
_getaddrinfo = socket.getaddrinfo
def getaddrinfo(host, *rest, **named):
    _check("getaddrinfo", host if host != socket.gethostname() else None)
    return _getaddrinfo(host, *rest, **named)
socket.getaddrinfo = getaddrinfo
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where forbidden calls are written down; it isn't there while there were none."""
    watch = tmp_path / "watch"
    watch.mkdir()
    (watch / "sitecustomize.py").write_text(WATCH)
    log = tmp_path / "calls.txt"
    monkeypatch.setenv("PYTHONPATH", str(watch))
    monkeypatch.setenv("TEST_OF_SOCKETS", str(log))
    return log


def written(calls: Path) -> str:
    """The forbidden calls."""
    return calls.read_text() if calls.exists() else ""


@pytest.fixture
async def node(tmp_path: Path, calls: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[WholeNode]:
    with SmallHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        async with whole_node(tmp_path / "home", "--offline") as running:
            yield running
        # the hub is on loopback, where the watch lets everything pass: it must not have been asked all the same
        assert hub.seen == []
    assert written(calls) == ""


def test_the_watch_sees_what_it_should(tmp_path: Path, calls: Path) -> None:
    program = "import socket\nsocket.create_connection(('192.0.2.1', 9), timeout=1)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert "must stay offline" in done.stderr
    assert "getaddrinfo 192.0.2.1" in calls.read_text()


async def test_an_offline_node_makes_no_network_call_whatever_it_is_asked(node: WholeNode) -> None:
    status, told = await node.call("POST", "/place_instance", {"model_id": "org/unknown-GGUF:Q8_0"})
    assert (status, told["error"]["code"]) == (404, "model_not_found")
    status, told = await node.call("GET", "/models/search?query=qwen")
    assert (status, told["data"]) == (200, [])
    status, told = await node.call("POST", "/models/add", {"model_id": "org/unknown-GGUF"})
    assert (status, told["error"]["code"]) == (404, "model_not_found")
    pulled = await asyncio.to_thread(skulk, node.home, "pull", "org/unknown-GGUF")
    assert pulled.returncode == 1 and "no model 'org/unknown-GGUF' is known" in pulled.stderr
    status, models = await node.call("GET", "/v1/models")
    assert status == 200 and models["data"]
