"""The commands against a whole node: a real nats-server, a real gateway, the real embedded model."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from skulk.cli.state_view import SERVING
from skulk.models.catalogue import EMBEDDED_MODEL
from tests.support.child_processes import no_process_left
from tests.support.command_line import caller, command, process_environ
from tests.support.whole_node import FREE_PORTS, SMALL_ENGINE

START_S = 180.0


def test_a_node_and_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    home = tmp_path / "home"
    words = command("up", "--local", "--home", str(home), *FREE_PORTS, "--place", EMBEDDED_MODEL, "--greet")
    # The usual ports may be another test's at this moment, and doctor would say so.
    ports = {f"SKULK_{name}_PORT": "0" for name in ("API", "NATS", "ROUTE", "FILES")}
    call = caller(capsys, {"SKULK_HOME": str(home), **ports})
    with no_process_left(), (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            words,
            env=process_environ(home, **SMALL_ENGINE),
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            assert process.stdout is not None
            said: list[str] = []
            for line in process.stdout:
                said.append(line)
                if line.startswith("watch "):
                    break
            text = "".join(said)
            assert "> Name three rivers.\n1. " in text, (tmp_path / "log").read_text()

            (row,) = json.loads(call("ps", "--json").out)
            assert (row["model_id"], row["backend"]) == (EMBEDDED_MODEL, "llama_cpp-cpu")
            assert row["state"] in SERVING
            assert row["context_length"] > 0
            (node,) = json.loads(call("nodes", "--json").out)
            assert (node["is_master"], "llama_cpp-cpu" in node["backends"]) == (True, True)
            assert json.loads(call("models", "--json").out)[0]["state"] == "ready"
            assert call("preview", EMBEDDED_MODEL).out.endswith("\n")

            placed = call("place", EMBEDDED_MODEL, "--context", "512", "--explain", "--wait")
            assert placed.status == 0, placed.err
            assert "chosen" in placed.out
            both = {one["instance_id"]: one["context_length"] for one in json.loads(call("ps", "--json").out)}
            (second,) = both.keys() - {row["instance_id"]}
            assert both[second] == 512
            assert call("rm", second[:8]).status == 0
            assert [one["instance_id"] for one in json.loads(call("ps", "--json").out)] == [row["instance_id"]]

            answer = json.loads(call("chat", "--json", "Name three rivers.").out)
            assert answer["finish_reason"] in ("stop", "length")
            assert "River" in answer["content"]
            kinds = [json.loads(line)["event"]["type"] for line in call("events", "--json").out.splitlines()]
            assert kinds.count("instance_created") == 2
            assert kinds[-1] == "instance_deleted"

            again = call("up", "--local", *FREE_PORTS)
            assert (again.status, again.err.count("\n")) == (75, 1)
            unknown = call("place", "org/unknown")
            assert (unknown.status, unknown.out) == (1, "")
            assert "org/unknown" in unknown.err
            assert call("doctor").status == 0

            process.send_signal(signal.SIGINT)
            process.communicate(timeout=START_S)
            assert process.returncode == 0
            assert call("ps", "--api", "http://127.0.0.1:1").status == 1
        finally:
            process.kill()
            process.communicate()
