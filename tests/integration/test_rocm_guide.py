"""The Strix Halo guide: its launcher runs for real (without the GPU), and what it tells people to type exists."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from skulk.cli.commands import COMMANDS
from skulk.settings_options import OPTIONS
from skulk.telemetry.backends import EngineProbe, tags_of
from tests.support.whole_node import FREE_PORTS, MODEL, environment, processes_of

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deployment" / "rocm"
GUIDE = (FOLDER / "README.md").read_text()
WAIT_S = 60.0


class Launched:
    """The launcher in a user's home."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.log = folder / "skulk.log"
        self.script = folder / "launch-skulk.sh"
        shutil.copy(FOLDER / "launch-skulk.sh.example", self.script)
        (folder / "clone").mkdir()
        (folder / "clone" / ".venv").symlink_to(sys.prefix)
        self.environment = {
            **environment(self.home),
            "SKULK_DIR": str(folder / "clone"),
            "SKULK_LOG_FILE": str(self.log),
            "SKULK_FLAGS": " ".join(("--local", *FREE_PORTS)),
        }

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.script), *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            stdin=subprocess.DEVNULL,
        )

    @property
    def pid(self) -> int:
        return int((self.home / "launched.pid").read_text())


@contextmanager
def launched(folder: Path) -> Generator[Launched]:
    """The launcher; at the end nothing that it started is left."""
    launcher = Launched(folder)
    try:
        yield launcher
    finally:
        left = processes_of(launcher.home)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=5.0)


async def until(look: Callable[[], Any], what: str) -> Any:
    """What `look` finds, once it finds something."""
    deadline = time.monotonic() + WAIT_S
    while not (found := look()):
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.1)
    return found


def call_in_guide(path: str, url: str) -> tuple[str, dict[str, Any]]:
    """The body of the guide's curl call to a path, for a model that is here, and where it goes."""
    (body,) = re.findall(rf"http://NODE:52415{path} .*\n\s+-d '(.*)'", GUIDE)
    told: dict[str, Any] = json.loads(body)
    return f"{url}{path}", told | {key: MODEL for key in ("model", "model_id") if key in told}


async def test_the_launcher_starts_a_detached_node_that_serves_and_stops(tmp_path: Path) -> None:
    with launched(tmp_path) as launcher:
        done = await asyncio.to_thread(launcher.run, "--detach")
        assert (done.returncode, done.stderr) == (0, ""), done
        facts = await until(
            lambda: (launcher.home / "node.json").exists() and json.loads((launcher.home / "node.json").read_text()),
            launcher.log.read_text() if launcher.log.exists() else "no log",
        )
        url, pid = facts["api_url"], launcher.pid
        assert os.getsid(pid) == pid, "a session of its own: no hang-up of ours reaches it"
        assert psutil.Process(pid).terminal() is None
        again = await asyncio.to_thread(launcher.run, "--detach")
        assert f"it runs already, as process {pid}" in again.stdout
        async with aiohttp.ClientSession() as session:
            await _serves(session, url)
        stopped = await asyncio.to_thread(launcher.run, "--stop")
        assert stopped.stdout == "stopped\n", stopped
        assert not psutil.pid_exists(pid)
        assert "is up" in launcher.log.read_text()
        assert "nothing that was started" in (await asyncio.to_thread(launcher.run, "--stop")).stdout


async def _serves(session: aiohttp.ClientSession, url: str) -> None:
    """The guide's calls on a machine whose wheel has no Vulkan: it degrades, says what to build, and answers."""

    async def state() -> dict[str, Any]:
        async with session.get(f"{url}/state") as response:
            return await response.json()

    deadline = time.monotonic() + WAIT_S
    while not any((await state())["nodeBackends"].values()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)
    now = await state()
    (tags,) = now["nodeBackends"].values()
    (health,) = now["nodeHealth"].values()
    if "llama_cpp-vulkan" not in tags:
        assert tags == ["llama_cpp", "llama_cpp-cpu"]
        assert {reason["code"] for reason in health["reasons"]} & {"gpu_offload_missing", "gpu_device_missing"}
    place_url, body = call_in_guide("/place_instance", url)
    async with session.post(place_url, json=body) as response:
        assert response.status == 200, await response.text()
        assert (await response.json())["instance_id"]
    while not any("RunnerReady" in runner for runner in (await state())["runners"].values()):
        assert time.monotonic() < deadline, await state()
        await asyncio.sleep(0.1)
    chat_url, body = call_in_guide("/v1/chat/completions", url)
    async with session.post(chat_url, json={**body, "stream": False, "max_tokens": 8}) as response:
        answer = await response.json()
    assert answer["choices"][0]["message"]["content"].strip()


def test_a_launcher_without_an_environment_says_what_to_do(tmp_path: Path) -> None:
    launcher = Launched(tmp_path)
    launcher.environment["SKULK_DIR"] = str(tmp_path / "nowhere")
    done = launcher.run()
    assert done.returncode == 1
    assert "make setup" in done.stderr
    launcher.environment["SKULK_DIR"] = str(tmp_path / "clone")
    wrong = launcher.run("--wrong")
    assert wrong.returncode == 2
    assert "--detach" in wrong.stderr


def test_what_the_guide_tells_to_type_exists() -> None:
    lines = [line.strip() for line in GUIDE.splitlines() if line.startswith("    ")]
    commands = {command.name for command in COMMANDS}
    typed = re.findall(r"(?:^|/|`)skulk ([a-z]+)", "\n".join([*lines, GUIDE]), re.MULTILINE)
    assert set(typed) <= commands
    assert {"doctor", "nodes", "ps", "preview"} <= set(typed)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    made = [name for found in re.findall(r"`make\s+([a-z-]+)`|    make ([a-z-]+)", GUIDE) for name in found if name]
    assert set(made) <= set(targets)
    for path in re.findall(r"`((?:tools|deployment)/[\w./-]+)`|cp (deployment/\S+)", GUIDE):
        assert (ROOT / next(filter(None, path))).exists(), path
    script = (FOLDER / "launch-skulk.sh.example").read_text()
    own = {"SKULK_DIR", "SKULK_LOG_FILE", "SKULK_FLAGS"}
    known = {option.env for option in OPTIONS} | own
    assert set(re.findall(r"SKULK_[A-Z_]+[A-Z]", GUIDE + script)) <= known
    for flag in re.findall(r"launch-skulk\.sh (--[a-z]+)", GUIDE):
        assert f"{flag})" in script, flag


def test_the_guide_and_the_warning_tell_the_same_build() -> None:
    probe = EngineProbe(installed=True, package_version="0.3.36", computes=("cpu",))
    (warning,) = tags_of(("vulkan",), probe).warnings
    for part in (
        'CMAKE_ARGS="-DGGML_VULKAN=on"',
        "--force-reinstall",
        "--no-cache-dir",
        "--no-binary llama-cpp-python",
    ):
        assert part in warning.remediation
        assert part in GUIDE
