"""``skulk up`` as a process: what it says, and how it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skulk.errors import StartError
from skulk.supervision.child import Child, ChildSpec
from tests.support import fake_gateway as fake
from tests.support.child_processes import no_process_left
from tests.support.command_line import process_environ

STUB = ("-m", "tests.support.stub_launcher")
TIMEOUT_S = 30.0


def argv(mode: str, *words: str) -> list[str]:
    return [sys.executable, *STUB, mode, "up", "--local", *words]


@contextmanager
def up(tmp_path: Path, mode: str, *words: str, **environ: str) -> Generator[subprocess.Popen[str]]:
    """A running `skulk up` over the stub, killed if the test leaves it."""
    with no_process_left():
        process = subprocess.Popen(
            argv(mode, *words),
            env=process_environ(tmp_path, **environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def await_line(process: subprocess.Popen[str], part: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if part in line:
            return
    pytest.fail(f"it ended before it said {part!r}")


def end_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_it_gracefully(number: signal.Signals, tmp_path: Path):
    with up(tmp_path, "serves") as process:
        await_line(process, "is up")
        process.send_signal(number)
        status, out, err = end_of(process)
    assert (status, err) == (0, "skulk: stopping; a second Ctrl-C stops at once\n")
    assert out.endswith("stub: stopped\n")


def test_the_second_signal_stops_it_at_once(tmp_path: Path):
    with up(tmp_path, "drains") as process:
        await_line(process, "is up")
        process.send_signal(signal.SIGTERM)
        await_line(process, "draining")
        process.send_signal(signal.SIGTERM)
        status, out, _ = end_of(process)
    assert (status, out) == (143, "stub: hurried\n")


def test_a_signal_while_it_starts_ends_the_start(tmp_path: Path):
    with up(tmp_path, "starts") as process:
        await_line(process, "starting")
        process.send_signal(signal.SIGINT)
        status, out, err = end_of(process)
    assert (status, out, err) == (130, "stub: hurried\n", "")


@pytest.mark.parametrize(
    ("mode", "status", "sentence"),
    [
        ("refuses", 75, "skulk: port 7 is taken; choose another with --api-port\n"),
        ("fails", 1, "skulk: the bus is gone for good\n"),
    ],
)
def test_a_failure_is_one_line_and_a_status(mode: str, status: int, sentence: str, tmp_path: Path):
    with up(tmp_path, mode) as process:
        ended = end_of(process)
    assert (ended[0], ended[2]) == (status, sentence)


def test_a_stdin_that_ends_does_not_end_a_node_that_a_person_started(tmp_path: Path):
    with no_process_left():
        process = subprocess.Popen(
            argv("serves"), env=process_environ(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        process.stdin.close()
        await_line(process, "watch ")
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0
        assert process.stdout is not None
        process.stdout.close()


def child(tmp_path: Path, mode: str) -> Child:
    environ = process_environ(tmp_path, STUB_API="http://127.0.0.1:7")
    return Child(ChildSpec(name="up", argv=tuple(argv(mode)), env=environ, stdin=b"", drain_s=TIMEOUT_S))


async def test_a_parent_is_told_the_address_and_its_end_ends_the_node(tmp_path: Path):
    node = child(tmp_path, "serves")
    ready = await node.start()
    assert ready.fields == {"api_url": "http://127.0.0.1:7", "node_id": "aaaa000000000001"}
    report = await node.stop()  # begins with the end of its stdin
    assert (report.returncode, report.signal_name) == (0, None)
    assert "stub: stopped" in report.last_lines


async def test_a_parent_is_told_why_the_node_cannot_start(tmp_path: Path):
    with pytest.raises(StartError) as caught:
        await child(tmp_path, "refuses").start()
    assert (caught.value.code, caught.value.detail[:15]) == ("port_in_use", "port 7 is taken")


def test_it_says_what_to_type_next(tmp_path: Path):
    with up(tmp_path, "serves", "--place", "org/it's", STUB_API="http://127.0.0.1:7") as process:
        await_line(process, "is up, API http://127.0.0.1:7")
        assert process.stdout is not None
        assert process.stdout.readline() == "API    http://127.0.0.1:7\n"
        call = process.stdout.readline().removeprefix("ask    curl ").rstrip("\n")
        assert process.stdout.readline() == "watch  nats -s nats://127.0.0.1:4222 sub 'skulk.>'\n"
    words = subprocess.run(["sh", "-c", f"printf '%s\\n' {call}"], capture_output=True, text=True, check=True).stdout
    assert words.splitlines()[:2] == ["-sN", "http://127.0.0.1:7/v1/chat/completions"]
    assert '"model":"org/it\'s"' in words.splitlines()[-1]


def test_an_api_beyond_loopback_is_told_in_one_line(tmp_path: Path):
    for words, environ, is_told in (
        (("--api-host", "0.0.0.0"), {}, True),
        (("--api-host", "0.0.0.0"), {"SKULK_API_KEYS": "ann:sk-1"}, False),
        (("--api-host", "127.0.0.1"), {}, False),
        (("--no-api",), {}, False),
    ):
        with no_process_left():
            process = subprocess.Popen(
                [sys.executable, *STUB, "serves", "up", *words],
                env=process_environ(tmp_path, **environ),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            await_line(process, "watch ")
            process.send_signal(signal.SIGTERM)
            status, _, err = end_of(process)
        assert (status, "trusts its network" in err) == (0, is_told), words
        # one line or the other: without a token the routes are open too
        assert ("the bus is open to the network" in err) == (not is_told), words


def test_greeting(tmp_path: Path):
    with fake.FakeGateway() as gateway:
        loading = fake.placed_state("RunnerLoading")
        gateway.states = [fake.state(), loading, loading, fake.placed_state()]
        with up(tmp_path, "serves", "--place", fake.MODEL, "--greet", STUB_API=gateway.url) as process:
            await_line(process, "> Name three rivers.")
            await_line(process, "Nile, Rhine, Amazon")
            await_line(process, "watch ")
            process.send_signal(signal.SIGINT)
            status, _, err = end_of(process)
        body = gateway.body_of("POST /v1/chat/completions")
    assert status == 0
    assert (body["model"], body["temperature"]) == (fake.MODEL, 0.0)
    assert f"skulk: {fake.MODEL} loading on attic\n" in err


def test_a_greeting_that_fails_is_told_and_the_node_serves_on(tmp_path: Path):
    with fake.FakeGateway() as gateway:
        gateway.refusals["GET /state"] = (503, fake.envelope("no master", "no_master"))
        with up(tmp_path, "serves", "--place", fake.MODEL, "--greet", STUB_API=gateway.url) as process:
            await_line(process, "watch ")
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            status, _, err = end_of(process)
    assert (status, "skulk: no master\n" in err) == (0, True)
