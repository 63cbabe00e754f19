"""Hosts of their own on one machine: Linux network namespaces, joined by a bridge like a LAN. Needs root and `ip`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import pytest

NETWORK = "10.77.0."


class Host:
    """One namespace: its name, its address, and links that can be cut."""

    def __init__(self, namespace: str, number: int) -> None:
        self.namespace = namespace
        self.number = number
        self.address = f"{NETWORK}{number}"

    @property
    def prefix(self) -> tuple[str, ...]:
        """What to put before a command that is to run there."""
        return ("ip", "netns", "exec", self.namespace)

    def ip(self, *words: str) -> None:
        """One `ip` command inside."""
        run("-n", self.namespace, *words)

    def cut(self, other: Host) -> None:
        """Swallows what goes from here to another host, as a broken link does: nobody is told."""
        self.ip("route", "add", "blackhole", f"{other.address}/32")

    def heal(self, other: Host) -> None:
        self.ip("route", "del", "blackhole", f"{other.address}/32")

    def move(self, number: int) -> None:
        """Gives it another address, as DHCP does."""
        self.ip("addr", "flush", "dev", "eth0")
        self.number, self.address = number, f"{NETWORK}{number}"
        self.ip("addr", "add", f"{self.address}/24", "dev", "eth0")
        self.ip("route", "replace", "224.0.0.0/4", "dev", "eth0")


def run(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def why_not() -> str:
    """Why this machine has no namespaces for us; empty where it has."""
    if shutil.which("ip") is None:
        return "iproute2 is missing"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"sk{os.getpid()}-try"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        return f"no network namespaces here: {done.stderr.strip()}"
    made = subprocess.run(["ip", "-n", name, "link", "add", "br0", "type", "bridge"], capture_output=True, timeout=20)
    run("netns", "del", name)
    return "" if made.returncode == 0 else "no bridges in network namespaces here"


@contextmanager
def lan(count: int) -> Generator[list[Host]]:
    """So many hosts on one network; gone at the end."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with ExitStack() as stack:
        switch = f"sk{os.getpid()}-sw"
        stack.enter_context(_namespace(switch))
        run("-n", switch, "link", "add", "br0", "type", "bridge")
        run("-n", switch, "link", "set", "br0", "up")
        hosts = [Host(f"sk{os.getpid()}-{number}", number) for number in range(1, count + 1)]
        for host in hosts:
            stack.enter_context(_namespace(host.namespace))
            port = f"p{host.number}"
            run("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            run("-n", switch, "link", "set", port, "master", "br0", "up")
            host.ip("link", "set", "eth0", "up")
            host.ip("addr", "add", f"{host.address}/24", "dev", "eth0")
            host.ip("route", "add", "224.0.0.0/4", "dev", "eth0")
        yield hosts


@contextmanager
def _namespace(name: str) -> Generator[None]:
    run("netns", "add", name)
    try:
        run("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        run("netns", "del", name)
