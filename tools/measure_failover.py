"""How long a cluster is without a master: nodes as users run them, whose master is killed again and again.

    tools/measure_failover.py                three nodes, 100 kills (a quarter of an hour)
    tools/measure_failover.py --kills 20

Each kill is SIGKILL to the master's launcher (its nats-server and gateway die with it). What is measured is the time
until the gateways of all that are left show another master, asked every 20 ms: election, the round that merges, the
first event written, and its way to the gateway. Then the killed node is started again. Bar: median 2 s, p99 3 s.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_figures import percentile, table

START_S: Final = 60.0
SETTLE_S: Final = 60.0
LOOK_S: Final = 0.02
MASTER_S: Final = 30.0


class Member:
    """A node of the cluster: its home, its port, and its process while it runs."""

    def __init__(self, home: Path, route_port: int, peers: str) -> None:
        self.home = home
        self.route_port = route_port
        self.peers = peers
        self.process: asyncio.subprocess.Process | None = None
        self.facts: dict[str, Any] = {}

    async def start(self) -> None:
        """Starts it and waits until it is up."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("SKULK_")}
        words = ("--no-worker", "--no-mdns", "--api-host", "127.0.0.1", "--api-port", "0", "--nats-port", "0")
        words = (*words, "--files-port", "0", "--route-port", str(self.route_port), "--bootstrap-peers", self.peers)
        told = self.home.with_suffix(".log")
        with told.open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "skulk", "up", *words, "--home", str(self.home)),
                env=environ,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        assert self.process.stdout is not None
        async with asyncio.timeout(START_S):
            while b"is up" not in (line := await self.process.stdout.readline()):
                if not line:
                    raise SystemExit(f"a node ended at its start: {told.read_text()[-2000:]}")
        self.facts = msgspec.json.decode((self.home / "node.json").read_bytes())

    async def end(self, number: signal.Signals) -> None:
        """Sends it a signal and waits for its end."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)
            await self.process.wait()


async def shown_master(client: aiohttp.ClientSession, member: Member) -> tuple[str | None, int]:
    """Whom a member's gateway shows as the master, and how many live nodes."""
    try:
        async with client.get(member.facts["api_url"] + "/state", timeout=aiohttp.ClientTimeout(2.0)) as answer:
            state = await answer.json()
    except (aiohttp.ClientError, TimeoutError):
        return None, 0
    return state["master"], len(state["lastSeen"])


async def agreed(client: aiohttp.ClientSession, members: list[Member], wait_s: float, *, besides: str = "") -> str:
    """The master, once all members show the same one, and it is another than ``besides``."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        told = await asyncio.gather(*(shown_master(client, member) for member in members))
        masters = {master for master, _ in told}
        has_all = besides or all(count == len(members) for _, count in told)
        if len(masters) == 1 and has_all and (master := masters.pop()) not in (None, besides):
            return str(master)
        await asyncio.sleep(LOOK_S)
    raise SystemExit(f"no master that all agree on within {wait_s:.0f} s")


@asynccontextmanager
async def cluster(folder: Path, count: int) -> AsyncGenerator[list[Member]]:
    """Nodes that name each other."""
    ports = _free_ports(count)
    peers = ",".join(f"127.0.0.1:{port}" for port in ports)
    members = [Member(folder / f"node{at}", port, peers) for at, port in enumerate(ports)]
    async with AsyncExitStack() as stack:
        for member in members:
            stack.push_async_callback(member.end, signal.SIGINT)
        await asyncio.gather(*(member.start() for member in members))
        yield members


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        holders = [stack.enter_context(socket.socket()) for _ in range(count)]
        for holder in holders:
            holder.bind(("127.0.0.1", 0))
        return [int(holder.getsockname()[1]) for holder in holders]


async def measure(nodes: int, kills: int) -> list[float]:
    """Seconds without a master, of each kill."""
    took: list[float] = []
    with tempfile.TemporaryDirectory(prefix="skulk-failover-") as folder:
        async with cluster(Path(folder), nodes) as members, aiohttp.ClientSession() as client:
            for number in range(kills):
                master = await agreed(client, members, SETTLE_S)
                victim = next(member for member in members if member.facts["node_id"] == master)
                left = [member for member in members if member is not victim]
                began = time.monotonic()
                await victim.end(signal.SIGKILL)
                await agreed(client, left, MASTER_S, besides=master)
                took.append(time.monotonic() - began)
                print(f"kill {number + 1} of {kills}: {took[-1]:.2f} s", file=sys.stderr, flush=True)
                await victim.start()
    return took


def main(arguments: list[str]) -> int:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(
        prog="tools/measure_failover.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=3, help="nodes of the cluster (default: 3)")
    parser.add_argument("--kills", type=int, default=100, help="how often the master is killed (default: 100)")
    flags = parser.parse_args(arguments)
    if flags.nodes < 2 or flags.kills < 1:
        parser.error("at least two nodes and one kill")
    took = asyncio.run(measure(flags.nodes, flags.kills))
    row = (f"{flags.nodes}", f"{len(took)}", *(f"{value:.2f}" for value in _figures(took)))
    print(table(("nodes", "kills", "median s", "p90 s", "p99 s", "longest s"), [row]))
    return 0


def _figures(took: list[float]) -> tuple[float, ...]:
    return (percentile(took, 0.5), percentile(took, 0.9), percentile(took, 0.99), max(took))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
