"""Nodes as hosts of their own (network namespaces): mDNS between them, changed addresses, links that break silently.

Not among the suites of `make test`: `make test-mesh` runs it, as root, where the machine has namespaces.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.child_processes import no_process_left
from tests.support.namespaces import Host, lan
from tests.support.whole_node import environment

JOIN_S = 45.0
HEALED_S = 10.0
STOP_S = 30.0
UP = ("up", "--no-worker", "--no-api")


class HostNode:
    """A node on a host."""

    def __init__(self, host: Host, home: Path, environ: Mapping[str, str]) -> None:
        self.host = host
        self.home = home
        self.environ = {**environment(home), **environ}

    def command(self, *words: str) -> list[str]:
        return [*self.host.prefix, sys.executable, "-m", "skulk", *words]

    @property
    def node_id(self) -> str:
        return json.loads((self.home / "identity.json").read_text())["node_id"]

    def peers(self) -> dict[str, dict[str, Any]]:
        """How it stands with each peer, by node id."""
        try:
            found = json.loads((self.home / "mesh.json").read_text())["peers"]
        except FileNotFoundError:
            return {}
        return {one["peer"]: one for one in found}

    def joined(self) -> set[str]:
        return {peer for peer, one in self.peers().items() if one["state"] == "joined"}

    def doctor(self) -> str:
        """What it says here, as rows of JSON."""
        done = subprocess.run(
            self.command("doctor", "--json"), env=self.environ, capture_output=True, text=True, timeout=120
        )
        return done.stdout


@contextmanager
def node(host: Host, folder: Path, *words: str, name: str = "", **environ: str) -> Generator[HostNode]:
    """A running node; its output is in ``<home>.log``."""
    home = folder / f"host{host.number}{name}"
    running = HostNode(host, home, environ)
    with open(folder / f"{home.name}.log", "wb") as log:
        process = subprocess.Popen(
            running.command(*UP, *words), env=running.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            yield running
        finally:
            process.terminate()
            process.wait(STOP_S)


def until(is_so: Callable[[], bool], timeout_s: float, nodes: list[HostNode]) -> None:
    """Waits for what only looking tells."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        told = "\n".join(f"{one.home.name}: {one.peers()}" for one in nodes)
        assert time.monotonic() < deadline, f"not so within {timeout_s} s:\n{told}"
        time.sleep(0.1)


def is_full(nodes: list[HostNode]) -> bool:
    if not all((one.home / "identity.json").exists() for one in nodes):
        return False
    names = {one.node_id for one in nodes}
    return all(one.joined() == names - {one.node_id} for one in nodes)


def test_nodes_of_one_network_find_each_other_and_follow_an_address(tmp_path: Path) -> None:
    with no_process_left(), lan(2) as hosts, ExitStack() as stack:
        nodes = [stack.enter_context(node(host, tmp_path, SKULK_CLUSTER_TOKEN="hush")) for host in hosts]
        one, two = nodes
        until(lambda: is_full(nodes), JOIN_S, nodes)
        told = f"{two.host.address}:52416"
        until(lambda: one.peers()[two.node_id]["route"] == told, JOIN_S, nodes)
        until((one.home / "node.json").exists, JOIN_S, nodes)
        assert f"node {two.node_id} is joined at {told}" in one.doctor()
        two.host.move(12)
        conf = one.home / "nats" / "nats.conf"
        until(lambda: f"@{two.host.address}:52416" in conf.read_text() and is_full(nodes), JOIN_S, nodes)
        assert "@10.77.0.2:" not in conf.read_text()


def test_two_nodes_of_one_host_and_one_of_another(tmp_path: Path) -> None:
    free = ("--nats-port", "0", "--route-port", "0", "--files-port", "0")
    with no_process_left(), lan(2) as hosts, ExitStack() as stack:
        nodes = [
            stack.enter_context(node(hosts[0], tmp_path, *free, name="a")),
            stack.enter_context(node(hosts[0], tmp_path, *free, name="b")),
            stack.enter_context(node(hosts[1], tmp_path, *free)),
        ]
        until(lambda: is_full(nodes), JOIN_S, nodes)


def test_a_link_of_three_is_cut_and_heals(tmp_path: Path) -> None:
    with no_process_left(), lan(3) as hosts, ExitStack() as stack:
        nodes = [stack.enter_context(node(host, tmp_path)) for host in hosts]
        one, two, three = nodes
        until(lambda: is_full(nodes), JOIN_S, nodes)
        one.host.cut(two.host)
        two.host.cut(one.host)
        until(lambda: one.joined() == two.joined() == {three.node_id}, JOIN_S, nodes)
        assert three.joined() == {one.node_id, two.node_id}
        one.host.heal(two.host)
        two.host.heal(one.host)
        until(lambda: is_full(nodes), HEALED_S, nodes)


@pytest.mark.parametrize(
    ("environ", "words", "told"),
    [
        ({"SKULK_CLUSTER": "garage"}, (), "belongs to the cluster garage"),
        ({"SKULK_CLUSTER_TOKEN": "other"}, (), "SKULK_CLUSTER_TOKEN is not this node's"),
    ],
)
def test_a_stranger_is_told_and_not_dialled(
    environ: dict[str, str], words: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    with no_process_left(), lan(2) as hosts, ExitStack() as stack:
        token = {"SKULK_CLUSTER_TOKEN": "hush"}
        ours = stack.enter_context(node(hosts[0], tmp_path, **token))
        stranger = stack.enter_context(node(hosts[1], tmp_path, *words, **{**token, **environ}))
        until(lambda: any(one["state"] == "apart" for one in ours.peers().values()), JOIN_S, [ours, stranger])
        assert told in ours.doctor()
        assert (tmp_path / "host1.log").read_text().count("is not joined") == 1
        assert ours.joined() == stranger.joined() == set()
        assert "nats://" not in (ours.home / "nats" / "nats.conf").read_text()
        assert os.path.exists(stranger.home / "mesh.json")
