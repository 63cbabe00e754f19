"""A whole node as a user starts it: ``skulk up`` in a process of its own, on free ports and a home of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aiohttp
import psutil

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct-GGUF"
MARK = "TEST_OF_HOME"
START_S = 60.0
READY_S = 60.0
STOP_S = 30.0
FREE_PORTS = ("--api-port", "0", "--nats-port", "0", "--route-port", "0", "--files-port", "0")
LOCAL = ("--local",)
# As nodes on hosts of their own, so that they serve weights to each other.
NAMED_PEERS = ("--no-mdns", "--api-host", "127.0.0.1")
# Small steps and few cells: a warm-up of 512 tokens takes 5 s of a core, and cells are zeroed at the load. One thread:
# two nodes with two threads each on two cores hold each other up.
SMALL_ENGINE = {
    "SKULK_LLAMA_CPP_PARALLEL": "2",
    "SKULK_LLAMA_CPP_THREADS": "1",
    "SKULK_LLAMA_CPP_UBATCH": "64",
}


def environment(home: Path, **variables: str) -> dict[str, str]:
    """The environment of a user who set nothing but the home, and perhaps these variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SKULK_")}
    return {
        **kept,
        MARK: str(home),
        "SKULK_HOME": str(home),
        **SMALL_ENGINE,
        "SKULK_NO_FOREIGN_CACHES": "1",
        "PYTHONUNBUFFERED": "1",
        **variables,
    }


def processes_of(home: Path) -> list[psutil.Process]:
    """Every process that was started, directly or not, with the environment of a home."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == str(home):
                found.append(process)
    return found


def skulk(home: Path, *arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "skulk", *arguments],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
    )


class WholeNode:
    """A running node, and HTTP to it."""

    def __init__(self, home: Path, process: asyncio.subprocess.Process) -> None:
        self.home = home
        self.process = process
        self.output: list[str] = []
        self.descendants: list[psutil.Process] = []
        self._session: aiohttp.ClientSession | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """The node's own file: where it answers."""
        return json.loads((self.home / "node.json").read_text())

    @property
    def url(self) -> str:
        return self.facts["api_url"]

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession()
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def children(self) -> dict[str, int]:
        """The process ids of its children, by the first word of their names."""
        listed = json.loads((self.home / "children.json").read_text())["children"]
        return {child["name"].split()[0]: child["pid"] for child in listed}

    async def wait_replaced(self, name: str, pid: int) -> None:
        """Waits until a child of this name runs again as another process."""
        while True:
            if self.children().get(name, pid) != pid:
                return
            await asyncio.sleep(0.2)

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One call; its status and its JSON."""
        async with self.session.request(method, self.url + path, json=body) as response:
            return response.status, await response.json()

    async def state(self) -> dict[str, Any]:
        status, state = await self.call("GET", "/state")
        assert status == 200
        return state

    async def wait_state(self, is_true: Any, timeout_s: float = 20.0) -> dict[str, Any]:
        """Looks at the state until it satisfies a predicate, as the clients of the API do."""
        deadline = time.monotonic() + timeout_s
        while not is_true(state := await self.state()):
            assert time.monotonic() < deadline, f"not so within {timeout_s} s: {json.dumps(state)[:2000]}"
            await asyncio.sleep(0.1)
        return state

    async def wait_ready(self, timeout_s: float = READY_S) -> str:
        """The id of the instance that is ready."""

        def is_ready(state: dict[str, Any]) -> bool:
            return any("RunnerReady" in runner or "RunnerRunning" in runner for runner in state["runners"].values())

        state = await self.wait_state(is_ready, timeout_s)
        return next(iter(state["instances"]))

    async def wait_output(self, text: str, timeout_s: float = 30.0) -> str:
        """Waits until the node has printed a line with this text."""
        async with asyncio.timeout(timeout_s):
            while not any(text in line for line in self.output):
                await self._read_line()
        return next(line for line in self.output if text in line)

    async def _read_line(self) -> None:
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        assert line, f"the node ended: {''.join(self.output)}"
        self.output.append(line.decode())

    async def stream(self, messages: list[dict[str, str]], **fields: Any) -> AsyncGenerator[dict[str, Any]]:
        """The events of one streamed chat completion, ``[DONE]`` as an empty one."""
        body = {"model": MODEL, "stream": True, "messages": messages, **fields}
        async with self.session.post(self.url + "/v1/chat/completions", json=body) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if line.startswith(b"data: "):
                    data = line[6:].strip()
                    yield {} if data == b"[DONE]" else json.loads(data)

    async def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Stops it as Ctrl-C does; its exit status."""
        self.descendants = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        async with asyncio.timeout(STOP_S):
            await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode


@contextlib.asynccontextmanager
async def whole_node(
    home: Path, *arguments: str, scope: tuple[str, ...] = LOCAL, **variables: str
) -> AsyncGenerator[WholeNode]:
    """A node that is up; at the end no process of it is left, or the test fails.

    ``scope``: whom it may meet; ``variables``: of its environment.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "skulk",
        "up",
        *scope,
        *FREE_PORTS,
        *arguments,
        env=environment(home, **variables),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    node = WholeNode(home, process)
    try:
        await node.wait_output("is up", START_S)
        yield node
    finally:
        await node.close()
        if process.returncode is None:
            await node.stop()
        _, left = psutil.wait_procs(node.descendants, timeout=5.0)
        for child in left:
            child.kill()
        assert not left, f"left behind: {left}"


def text_of(events: list[dict[str, Any]]) -> str:
    """The answer's text."""
    choices = [choice for event in events for choice in event.get("choices", [])]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
