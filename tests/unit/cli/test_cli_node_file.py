"""``node.json``: written whole, believed only while its process lives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from skulk.cli.client import target_url
from skulk.cli.node_file import NODE_FILE, NodeFile, has_running_node, read_node_file, remove_node_file, write_node_file
from skulk.settings import Settings


def node(pid: int, **changes: str) -> NodeFile:
    return NodeFile(node_id="a", pid=pid, version="0", cluster="skulk", started_at=1.0, **changes)  # pyright: ignore[reportArgumentType]


def settings(home: Path, **changes: str) -> Settings:
    return Settings(home=str(home), models_dir="", **changes)  # pyright: ignore[reportArgumentType]


def test_a_running_node_is_read_back(tmp_path: Path):
    written = node(os.getpid(), api_url="http://127.0.0.1:7")
    write_node_file(tmp_path, written)
    assert read_node_file(tmp_path) == written
    assert has_running_node(str(tmp_path))
    assert target_url(settings(tmp_path)) == "http://127.0.0.1:7"
    assert target_url(settings(tmp_path, api_url="http://box:1")) == "http://box:1"
    remove_node_file(tmp_path)
    remove_node_file(tmp_path)
    assert target_url(settings(tmp_path)) == "http://127.0.0.1:52415"


def test_a_node_whose_process_is_gone_does_not_run(tmp_path: Path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    write_node_file(tmp_path, node(process.pid, api_url="http://127.0.0.1:7"))
    assert read_node_file(tmp_path) is None
    assert target_url(settings(tmp_path)) == "http://127.0.0.1:52415"


@pytest.mark.parametrize("body", ["", "{", "[]", '{"pid": 1}', '{"pid": "x"}'])
def test_a_damaged_file_is_no_node(body: str, tmp_path: Path):
    (tmp_path / NODE_FILE).write_text(body)
    assert read_node_file(tmp_path) is None


def test_a_node_without_an_api_is_not_talked_to(tmp_path: Path):
    write_node_file(tmp_path, node(os.getpid()))
    assert not has_running_node(str(tmp_path))
    assert target_url(settings(tmp_path)) == "http://127.0.0.1:52415"


def test_a_file_of_a_newer_version_is_understood(tmp_path: Path):
    write_node_file(tmp_path, node(os.getpid(), api_url="http://127.0.0.1:7"))
    path = tmp_path / NODE_FILE
    path.write_text(path.read_text().replace("{", '{"wings": 2,', 1))
    assert has_running_node(str(tmp_path))
