"""``skulk chat`` without a cluster: a private node that ends with the command, whatever ends it. And quiet endings."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import fake_gateway as fake
from tests.support.child_processes import await_gone, no_process_left
from tests.support.command_line import ROOT, Outcome, caller, command, process_environ

STUB = ("-m", "tests.support.stub_launcher")
TIMEOUT_S = 30.0
Call = Callable[..., Outcome]


@pytest.fixture
def gateway() -> Iterator[fake.FakeGateway]:
    with fake.FakeGateway() as gateway:
        gateway.states = [fake.placed_state()]
        yield gateway


@pytest.fixture
def free_port() -> str:
    """A port on which nothing answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where private homes are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    homes: Path,
    gateway: fake.FakeGateway,
    free_port: str,
) -> Call:
    """``skulk chat`` whose private node is the stub, served by the fake gateway."""
    environ = {
        "SKULK_HOME": str(tmp_path / "own"),
        "SKULK_API_PORT": free_port,
        "SKULK_API_KEYS": "ann:sk-1",
        "SKULK_LLAMA_CPP_THREADS": "3",
        "STUB_API": gateway.url,
        "STUB_NOTE": str(tmp_path / "note"),
        "PYTHONPATH": str(ROOT),
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    def with_mode(mode: str, *words: str) -> Outcome:
        monkeypatch.setattr("skulk.cli.chat.PROGRAM", (sys.executable, *STUB, mode))
        with no_process_left():
            return caller(capsys, environ)(*words)

    return with_mode


def noted(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "note").read_text())


def test_it_answers_and_leaves_nothing(call: Call, homes: Path, tmp_path: Path, gateway: fake.FakeGateway):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "skulk.toml").write_text('models_path = ["/mnt/models"]\nllama_cpp_parallel = 2\n')
    answer = call("serves", "chat", "--model", fake.MODEL, "Rivers?")
    assert (answer.status, answer.out) == (0, "Nile, Rhine, Amazon\n")
    assert answer.err.startswith("skulk: no cluster is running; starting a private node for org/model-GGUF")
    assert list(homes.iterdir()) == []
    assert "Authorization" not in gateway.requests[-1].headers
    note = noted(tmp_path)
    settings = note["settings"]
    assert settings["home"].startswith(str(homes))
    assert (settings["local"], settings["place"], settings["api_host"]) == (True, [fake.MODEL], "127.0.0.1")
    assert [settings[f"{name}_port"] for name in ("api", "nats", "route")] == [0, 0, 0]
    assert (settings["threads"], settings["parallel"], settings["models_path"]) == (3, 2, ["/mnt/models"])
    assert settings["models_dir"] == str(tmp_path / "own" / "models")
    assert settings["api_keys"] == []
    assert await_gone(note["pid"])


def test_a_node_that_cannot_start_tells_why(call: Call, homes: Path):
    answer = call("refuses", "chat", "Rivers?")
    assert (answer.status, answer.out) == (75, "")
    assert answer.err.endswith("skulk: port 7 is taken; choose another with --api-port\n")
    assert list(homes.iterdir()) == []


def test_a_node_that_dies_shows_the_end_of_its_log(call: Call, homes: Path):
    answer = call("dies", "chat", "Rivers?")
    assert answer.status == 1
    assert "skulk: log of the private node: stub: last words\n" in answer.err
    assert "exited with status 3" in answer.err
    assert list(homes.iterdir()) == []


def test_a_node_that_does_not_tell_its_address(call: Call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("STUB_API", "")
    answer = call("serves", "chat", "Rivers?")
    assert (answer.status, "didn't tell the address" in answer.err) == (1, True)


def test_an_error_of_the_api_is_told_without_the_log(call: Call, gateway: fake.FakeGateway, homes: Path):
    gateway.refusals["POST /v1/chat/completions"] = (400, fake.envelope("no empty prompts", "invalid_request"))
    answer = call("serves", "chat", "--model", fake.MODEL, "Rivers?")
    assert (answer.status, answer.err.count("\n")) == (1, 2)
    assert answer.err.endswith("skulk: no empty prompts\n")
    assert list(homes.iterdir()) == []


def test_a_named_cluster_that_does_not_answer_is_an_error(call: Call, free_port: str, tmp_path: Path):
    answer = call("serves", "chat", "Rivers?", "--api", f"http://127.0.0.1:{free_port}")
    assert (answer.status, "No cluster answers" in answer.err) == (1, True)
    assert not (tmp_path / "note").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_the_command_ends_the_node(
    number: signal.Signals, tmp_path: Path, gateway: fake.FakeGateway, free_port: str
):
    """Also SIGKILL, which leaves us no time: then the node notices the end of its stdin."""
    gateway.states = [fake.placed_state("RunnerLoading")]
    code = (
        "import sys, tempfile, skulk.cli.chat as chat; from skulk.cli.main import main\n"
        f"tempfile.tempdir = {str(tmp_path)!r}\n"
        f"chat.PROGRAM = (sys.executable, *{STUB!r}, 'serves')\n"
        f"sys.exit(main(['chat', '--model', {fake.MODEL!r}, 'Rivers?']))"
    )
    environ = process_environ(
        tmp_path / "own", STUB_API=gateway.url, STUB_NOTE=str(tmp_path / "note"), SKULK_API_PORT=free_port
    )
    waiting = threading.Event()
    gateway.on_request = lambda request: waiting.set() if request.line == "GET /state" else None
    with no_process_left():
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert waiting.wait(TIMEOUT_S)
        process.send_signal(number)
        out, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
        assert out == ""
        assert err.count("\n") == 1, err
        assert await_gone(noted(tmp_path)["pid"])
    if number != signal.SIGKILL:
        assert list(tmp_path.glob("skulk-private-*")) == []


def test_following_events_ends_quietly_with_ctrl_c(tmp_path: Path, gateway: fake.FakeGateway):
    gateway.events = [fake.event(1, "term_began", state={})]

    def more(request: fake.Request) -> None:
        if request.query == [("since", "1")]:
            gateway.events.append(fake.event(2, "node_drain_ended", node_id="aaaa"))

    gateway.on_request = more
    environ = process_environ(tmp_path, SKULK_API=gateway.url)
    with no_process_left():
        process = subprocess.Popen(
            command("events", "-f"), env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert "term_began" in process.stdout.readline()
        assert process.stdout.readline().endswith("node_drain_ended      node=aaaa\n")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_reader_that_leaves_is_no_error(tmp_path: Path, gateway: fake.FakeGateway):
    gateway.events = [fake.event(seq, "node_drain_ended", node_id="x" * 100) for seq in range(1, 1001)]
    environ = process_environ(tmp_path, SKULK_API=gateway.url)
    with no_process_left():
        process = subprocess.Popen(
            command("events"), env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        with process.stderr as stderr:
            assert stderr.read() == ""
        assert process.wait(TIMEOUT_S) == 141
