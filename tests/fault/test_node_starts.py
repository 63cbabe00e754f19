"""How a node starts and ends: restarts, kills, private clusters, and what it refuses at the start."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import psutil
import pytest

from tests.support.whole_node import FREE_PORTS, MODEL, START_S, processes_of, skulk, whole_node


async def test_ctrl_c_leaves_nothing_and_a_restart_brings_the_placement_back(tmp_path: Path) -> None:
    async with whole_node(tmp_path, "--place", MODEL) as first:
        instance_id = await first.wait_ready()
        assert await first.stop(signal.SIGINT) == 0
        assert not (tmp_path / "node.json").exists()
    async with whole_node(tmp_path) as again:
        assert await again.wait_ready() == instance_id
        assert len((await again.state())["instances"]) == 1
        # asked over HTTP, the same process starts anew
        before = again.facts
        status, told = await again.call("POST", "/admin/restart")
        assert (status, told["node_id"]) == (202, before["node_id"])
        await again.wait_output("starting again")
        again.output.clear()
        await again.wait_output("is up", START_S)
        assert await again.wait_ready() == instance_id
        assert again.facts["started_at"] > before["started_at"]
        assert again.process.returncode is None


async def test_children_die_with_a_killed_launcher(tmp_path: Path) -> None:
    async with whole_node(tmp_path, "--place", MODEL) as running:
        await running.wait_ready()
        children = [psutil.Process(pid) for pid in running.children().values()]
        assert len(children) == 3
        await running.stop(signal.SIGKILL)
        _, alive = await asyncio.to_thread(psutil.wait_procs, children, 10.0)
        assert not alive


def test_chat_without_a_cluster_starts_a_private_one_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = skulk(tmp_path, "chat", "Name three rivers.", timeout_s=120.0)
    assert done.returncode == 0, done.stderr
    assert "River" in done.stdout
    assert list(tmp_path.glob("skulk-private-*")) == []
    assert not processes_of(tmp_path)
    assert not (tmp_path / "node.json").exists()


def test_an_unknown_model_to_place_is_told_at_the_start(tmp_path: Path) -> None:
    done = skulk(tmp_path, "up", "--local", *FREE_PORTS, "--place", "no/such")
    assert done.returncode == 1
    assert "no/such" in done.stderr


def test_a_broken_model_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "org" / "broken"
    folder.mkdir(parents=True)
    (folder / "broken-Q4_0.gguf").write_bytes(b"not a model at all" * 100)
    done = skulk(tmp_path, "up", "--local", *FREE_PORTS, "--place", "org/broken")
    assert done.returncode == 1
    assert "broken-Q4_0.gguf" in done.stderr
