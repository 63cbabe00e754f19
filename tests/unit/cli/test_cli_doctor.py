"""What the doctor finds, and the remedy it names."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skulk.cli import doctor
from skulk.cli.node_file import NodeFile
from skulk.engines.llama_cpp.probe import Probe
from skulk.settings import Settings

GOOD = Probe(installed=True, package_version="0.3.36", computes=("cpu",))


def settings(tmp_path: Path, **changes: Any) -> Settings:
    return Settings(home=str(tmp_path), models_dir=str(tmp_path / "models"), **changes)


@pytest.mark.parametrize(
    ("version", "verdict"),
    [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 13, 7), "ok"), ((3, 14, 0), "fail")],
)
def test_python(version: tuple[int, int, int], verdict: str):
    assert doctor.check_python(version).verdict == verdict


def test_home(tmp_path: Path):
    assert doctor.check_home(tmp_path / "new" / "home").verdict in ("ok", "warn")
    file = tmp_path / "file"
    file.touch()
    found = doctor.check_home(file / "home")
    assert (found.verdict, str(file) in found.detail) == ("fail", True)
    assert "--home" in found.remedy


def test_a_home_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "LOW_DISK_BYTES", 2**80)
    assert doctor.check_home(tmp_path).verdict == "warn"


def test_ports(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = settings(tmp_path, local=True, api_host="127.0.0.1", api_port=port, nats_port=0)
        api, nats = doctor.check_ports(told, None)
        assert (api.check, api.verdict) == ("api_port", "fail")
        assert f"port {port}" in api.detail
        assert "--api-port" in api.remedy
        assert (nats.check, nats.verdict) == ("nats_port", "ok")
        node = NodeFile(node_id="a", pid=1, version="0", cluster="skulk", started_at=0.0, api_port=port)
        assert [found.verdict for found in doctor.check_ports(told, node)] == ["ok", "ok"]
    assert [found.verdict for found in doctor.check_ports(told, None)] == ["ok", "ok"]


def test_only_ports_that_a_start_would_take_are_looked_at(tmp_path: Path):
    told = settings(tmp_path, api=False, nats_url="nats://box:4222")
    assert list(doctor.check_ports(told, None)) == []
    names = [
        found.check for found in doctor.check_ports(settings(tmp_path, api_port=0, nats_port=0, route_port=0), None)
    ]
    assert names == ["api_port", "nats_port", "route_port"]


def test_a_host_that_is_not_of_this_machine():
    assert doctor.check_port("api_port", "nowhere.invalid", 7).verdict == "fail"


def test_nats_server(tmp_path: Path):
    assert doctor.check_nats_server("").verdict == "ok"
    found = doctor.check_nats_server(str(tmp_path / "absent"))
    assert (found.verdict, "SKULK_NATS_SERVER" in found.detail) == ("fail", True)


def test_engine(tmp_path: Path):
    assert doctor.check_engine(settings(tmp_path), GOOD).verdict == "ok"
    declared = doctor.check_engine(settings(tmp_path, backends=("vulkan", "cpu")), GOOD)
    assert (declared.verdict, "declares vulkan" in declared.detail) == ("warn", True)
    missing = doctor.check_engine(settings(tmp_path), Probe(installed=False, problem="Install it."))
    assert (missing.verdict, missing.detail) == ("fail", "Install it.")
    assert doctor.check_engine(settings(tmp_path, participation="management"), Probe(installed=False)).verdict == "ok"


@pytest.mark.parametrize(
    ("outcome", "sentence"),
    [
        (subprocess.TimeoutExpired("probe", 60), "Looking for GPUs hung for 60 s"),
        (
            subprocess.CompletedProcess("probe", -4, b"", b"Traceback\nlibggml.so is missing\n"),
            "(libggml.so is missing)",
        ),
        (subprocess.CompletedProcess("probe", -11, b"", b""), "(status -11)"),
    ],
)
def test_an_engine_that_hangs_or_crashes(outcome: Any, sentence: str, monkeypatch: pytest.MonkeyPatch):
    def ended(*_: Any, **__: Any) -> Any:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(subprocess, "run", ended)
    found = doctor.probe_engine()
    assert (found.installed, sentence in found.problem) == (False, True)


def test_a_probe_that_answers(monkeypatch: pytest.MonkeyPatch):
    done = subprocess.CompletedProcess("probe", 0, msgspec.json.encode(GOOD) + b"\n", b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert doctor.probe_engine() == GOOD


def test_models(tmp_path: Path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "broken.gguf").write_bytes(b"no model")
    found = doctor.check_models(settings(tmp_path))
    assert found.verdict == "warn"
    assert "broken.gguf" in found.detail or "no model lies" in found.detail
