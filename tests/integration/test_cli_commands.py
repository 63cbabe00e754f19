"""The commands against a gateway of recorded answers: what they print, send and return."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skulk.cli.node_file import NodeFile, write_node_file
from tests.support import fake_gateway as fake
from tests.support.command_line import Outcome, caller

Call = Callable[..., Outcome]


@pytest.fixture
def gateway() -> Iterator[fake.FakeGateway]:
    with fake.FakeGateway() as gateway:
        yield gateway


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], gateway: fake.FakeGateway, tmp_path: Path) -> Call:
    return caller(capsys, {"SKULK_API": gateway.url, "SKULK_HOME": str(tmp_path), "TZ": "UTC"})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skulk.cli.placing.POLL_S", 0.001)
    monkeypatch.setattr("skulk.cli.placing.FAILURE_S", 0.01)
    monkeypatch.setattr("skulk.cli.events.POLL_S", 0.001)


def test_ps(call: Call, gateway: fake.FakeGateway):
    other = "ffff0000-0000-4000-8000-000000000001"
    gateway.states = [
        fake.state(
            instances={fake.INSTANCE: fake.instance(), other: fake.instance(other, model_id="org/big")},
            runners={
                f"{fake.INSTANCE}-1": fake.runner("RunnerRunning", memory={"loadedBytes": 242_221_056, "ratio": 1.034}),
                f"{other}-1": fake.runner("RunnerLoading"),
            },
        )
    ]
    answer = call("ps")
    assert answer.out == (
        "INSTANCE  MODEL           STATE    NODE   BACKEND        CONTEXT  MEMORY\n"
        "ffff0000  org/big         loading  attic  llama_cpp-cpu  4096     -\n"
        "1b6cf1e0  org/model-GGUF  running  attic  llama_cpp-cpu  4096     231.0 MiB (1.03)\n"
    )
    assert (answer.status, answer.err) == (0, "")


def test_ps_tells_why_an_instance_failed_or_waits(call: Call, gateway: fake.FakeGateway):
    gateway.states = [
        fake.state(
            instances={
                fake.INSTANCE: fake.instance(),
                "w": fake.instance("w", model_id="org/wait", node_id=None, reason="no node has 5.2 GiB\x1b[2J"),
            },
            runners={f"{fake.INSTANCE}-1": fake.runner("RunnerFailed", errorMessage="out of memory")},
        )
    ]
    assert call("ps").out == (
        "INSTANCE  MODEL           STATE    NODE   BACKEND        CONTEXT  MEMORY  DETAIL\n"
        "1b6cf1e0  org/model-GGUF  failed   attic  llama_cpp-cpu  4096     -       out of memory\n"
        "w         org/wait        pending  -      -              -        -       no node has 5.2 GiB?[2J\n"
    )


def test_ps_as_json_and_empty(call: Call, gateway: fake.FakeGateway):
    assert call("ps") == (0, "", "skulk: no model is placed; `skulk place MODEL` places one\n")
    assert call("ps", "--json") == (0, "[]\n", "")
    gateway.states = [fake.placed_state()]
    assert json.loads(call("ps", "--json").out) == [
        {
            "instance_id": fake.INSTANCE,
            "model_id": fake.MODEL,
            "state": "ready",
            "nodes": ["attic"],
            "backend": "llama_cpp-cpu",
            "context_length": 4096,
            "detail": "",
            "loaded_bytes": 0,
            "memory_ratio": None,
        }
    ]


def test_nodes(call: Call, gateway: fake.FakeGateway):
    reason = {"code": "cpu_wheel", "message": "The wheel has no GPU offload.", "remediation": "Build it with Vulkan."}
    gateway.states = [fake.state(nodeHealth={fake.NODE: {"level": "warn", "reasons": [reason]}})]
    answer = call("nodes")
    assert answer.out == (
        "NODE              NAME   ROLE    HEALTH  BACKENDS                 FREE      MEMORY    VERSION\n"
        "aaaa000000000001  attic  master  warn    llama_cpp,llama_cpp-cpu  12.0 GiB  16.0 GiB  0.1.0\n"
    )
    assert answer.err == "skulk: attic: warn: The wheel has no GPU offload. Build it with Vulkan.\n"
    row = json.loads(call("nodes", "--json").out)[0]
    assert (row["is_master"], row["memory_total_bytes"], row["reasons"][0][:9]) == (True, 16 * 2**30, "The wheel")


def test_models(call: Call, gateway: fake.FakeGateway):
    gateway.models = [fake.model(), fake.model("org/other", "available", context_length=None)]
    assert call("models").out == (
        "MODEL           STATE      SIZE      CONTEXT  FAMILY\n"
        "org/model-GGUF  ready      98.0 MiB  8192     llama\n"
        "org/other       available  98.0 MiB  -        llama\n"
    )
    assert [row["id"] for row in json.loads(call("models", "--json").out)] == [fake.MODEL, "org/other"]


def test_place(call: Call, gateway: fake.FakeGateway):
    answer = call("place", fake.MODEL, "--exclude", "cellar", "--exclude", "shed", "--context", "2048")
    assert answer == (0, f"placed {fake.INSTANCE} ({fake.MODEL})\n", "")
    assert gateway.body_of("POST /place_instance") == {
        "model_id": fake.MODEL,
        "excluded_nodes": ["cellar", "shed"],
        "context_length": 2048,
    }


def test_place_replicas(call: Call, gateway: fake.FakeGateway):
    answer = call("place", fake.MODEL, "--replicas", "3", "--json")
    ids = [row["instance_id"] for row in json.loads(answer.out)]
    assert len(set(ids)) == 3
    assert gateway.lines == ["POST /place_instance"]
    assert gateway.body_of("POST /place_instance")["replicas"] == 3


def test_place_by_force_warns(call: Call, gateway: fake.FakeGateway):
    gateway.warnings = ["attic: forced though memory need 44.4 GiB have 12.0 GiB"]
    answer = call("place", fake.MODEL, "--force")
    assert answer.status == 0
    assert answer.out == f"placed {fake.INSTANCE} ({fake.MODEL})\n"
    assert answer.err == "skulk: warning: attic: forced though memory need 44.4 GiB have 12.0 GiB\n"
    assert gateway.body_of("POST /place_instance")["force"] is True
    gateway.decision = fake.decision(reports=[fake.report(warning=gateway.warnings[0])])
    assert gateway.warnings[0] in call("preview", fake.MODEL, "--force").out
    assert ("force", "1") in gateway.requests[-1].query


def test_place_explained(call: Call, gateway: fake.FakeGateway):
    full = fake.report("bbbb", name="cellar", filter="memory", detail="need 300 MiB have 0 MiB", available_bytes=0)
    gateway.decision = fake.decision(reports=[fake.report(), full])
    assert call("place", fake.MODEL, "--explain", "--exclude", "shed").out == (
        "NODE    VERDICT  BACKEND        NEED       HAVE      CONTEXT  WHY\n"
        "attic   chosen   llama_cpp-cpu  300.0 MiB  12.0 GiB  4096     backend_rank=3\n"
        "cellar  memory   llama_cpp-cpu  300.0 MiB  0 B       4096     need 300 MiB have 0 MiB\n"
        "placed: attic has the room\n"
        f"placed {fake.INSTANCE} ({fake.MODEL})\n"
    )
    assert gateway.requests[0].query == [("model_id", fake.MODEL), ("excluded_node_ids", "shed")]


def test_preview_changes_nothing_and_fails_where_nothing_fits(call: Call, gateway: fake.FakeGateway):
    assert call("preview", fake.MODEL).status == 0
    gateway.decision = fake.decision("unplaceable", reason="no node has room", reports=[])
    assert call("preview", fake.MODEL) == (1, "unplaceable: no node has room\n", "")
    assert json.loads(call("preview", fake.MODEL, "--json").out)["outcome"] == "unplaceable"
    assert set(gateway.lines) == {"GET /instance/previews"}


@pytest.mark.usefixtures("quick")
def test_place_waits_until_it_is_ready(call: Call, gateway: fake.FakeGateway):
    gateway.states = [fake.placed_state("RunnerIdle"), fake.placed_state("RunnerLoading"), fake.placed_state()]
    answer = call("place", fake.MODEL, "--wait")
    assert answer.status == 0
    assert answer.err == "".join(
        f"skulk: {fake.MODEL} {state} on attic\n" for state in ("starting", "loading", "ready")
    )


@pytest.mark.usefixtures("quick")
def test_waiting_ends_with_a_failure_that_stays_but_not_with_one_that_passes(call: Call, gateway: fake.FakeGateway):
    failed = fake.placed_state("RunnerFailed", errorMessage="the file is cut short")
    gateway.states = [failed, fake.placed_state("RunnerLoading"), fake.placed_state()]
    assert call("place", fake.MODEL, "--wait").status == 0
    gateway.states = [failed]
    answer = call("place", fake.MODEL, "--wait")
    assert answer.status == 1
    assert answer.err.endswith(f"skulk: {fake.MODEL} failed to load: the file is cut short\n")


@pytest.mark.usefixtures("quick")
def test_waiting_ends_when_the_instance_is_deleted(call: Call):
    answer = call("place", fake.MODEL, "--wait")
    assert (answer.status, answer.err) == (1, "skulk: It was deleted while this command waited for it.\n")


def test_rm_takes_the_beginning_of_an_id(call: Call, gateway: fake.FakeGateway):
    gateway.states = [fake.placed_state()]
    assert call("rm", fake.INSTANCE[:4]) == (0, f"deleted {fake.INSTANCE} ({fake.MODEL})\n", "")
    assert gateway.lines == ["GET /state", f"DELETE /instance/{fake.INSTANCE}"]
    assert json.loads(call("rm", fake.INSTANCE, "--json").out)["instance_id"] == fake.INSTANCE


def test_drain_begins_and_ends(call: Call, gateway: fake.FakeGateway):
    assert call("drain", "my host") == (0, f"{fake.NODE} takes no new work; 1 instances leave it\n", "")
    assert call("drain", fake.NODE, "--undo") == (0, f"{fake.NODE} takes work again\n", "")
    assert gateway.lines == ["POST /nodes/my host/drain", f"DELETE /nodes/{fake.NODE}/drain"]
    told = json.loads(call("drain", fake.NODE, "--json").out)
    assert told == {"node_id": fake.NODE, "draining": True, "leaving": [fake.INSTANCE]}


def test_rm_refuses_what_names_none_or_several(call: Call, gateway: fake.FakeGateway):
    other = fake.INSTANCE[:4] + "ffff"
    gateway.states = [fake.state(instances={fake.INSTANCE: fake.instance(), other: fake.instance(other)})]
    answer = call("rm", fake.INSTANCE[:4])
    assert answer.status == 1
    assert f"begins the ids of 2 instances ({fake.INSTANCE}, {other})" in answer.err
    assert call("rm", "zzz").err == "skulk: No instance's id begins with 'zzz'; `skulk ps` lists them.\n"
    assert not any(line.startswith("DELETE") for line in gateway.lines)


def test_events(call: Call, gateway: fake.FakeGateway, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("skulk.cli.events.time.localtime", time.gmtime)
    body = {"instance_id": fake.INSTANCE, "request": {"card": {"model_id": fake.MODEL}}}
    assignment = {"epoch": 1, "node_id": fake.NODE, "backend": "llama_cpp-cpu"}
    gateway.events = [
        fake.event(1, "term_began", state={"cluster": "skulk", "instances": {}}),
        fake.event(2, "instance_created", instance=body, command_id="c1"),
        fake.event(3, "instance_assigned", instance_id=fake.INSTANCE, assignment=assignment, reason="most room"),
        fake.event(4, "of_the_future", wings=2),
    ]
    assert call("events").out == (
        "     1     1  2026-01-31 12:00:01  term_began            instances=0\n"
        f"     2     1  2026-01-31 12:00:02  instance_created      instance={fake.INSTANCE} model={fake.MODEL}\n"
        f"     3     1  2026-01-31 12:00:03  instance_assigned     instance={fake.INSTANCE} node={fake.NODE} "
        "backend=llama_cpp-cpu epoch=1 reason=most room\n"
        "     4     1  2026-01-31 12:00:04  of_the_future\n"
    )
    lines = call("events", "--json").out.splitlines()
    assert [json.loads(line) for line in lines] == gateway.events


def test_chat_with_a_ready_model(call: Call, gateway: fake.FakeGateway):
    assert call("chat", "Name three rivers.") == (0, "Nile, Rhine, Amazon\n", "")
    assert gateway.body_of("POST /v1/chat/completions") == {
        "model": fake.MODEL,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.0,
        "messages": [{"role": "user", "content": "Name three rivers."}],
    }
    assert "POST /place_instance" not in gateway.lines


def test_chat_as_json(call: Call, gateway: fake.FakeGateway):
    gateway.chunks = fake.answer_chunks("Ni", "le €", finish="length")
    answer = call("chat", "--json", "--model", fake.MODEL, "Rivers?")
    assert json.loads(answer.out) == {
        "model": fake.MODEL,
        "content": "Nile €",
        "finish_reason": "length",
        "prompt_tokens": 5,
        "completion_tokens": 2,
    }
    assert "cut off" in answer.err


@pytest.mark.usefixtures("quick")
def test_chat_places_a_model_that_is_not_placed(call: Call, gateway: fake.FakeGateway):
    gateway.models = [fake.model("org/other"), fake.model(kind="downloaded")]
    gateway.states = [fake.state(), fake.placed_state("RunnerLoading"), fake.placed_state()]
    assert call("chat", "--model", fake.MODEL, "Rivers?").out == "Nile, Rhine, Amazon\n"
    assert gateway.body_of("POST /place_instance")["model_id"] == fake.MODEL
    assert gateway.body_of("POST /v1/chat/completions")["model"] == fake.MODEL


@pytest.mark.usefixtures("quick")
def test_chat_waits_for_an_instance_that_is_on_its_way(call: Call, gateway: fake.FakeGateway):
    gateway.models = [fake.model(kind="loading")]
    gateway.states = [fake.placed_state("RunnerLoading"), fake.placed_state("RunnerWarmingUp"), fake.placed_state()]
    assert call("chat", "--model", fake.MODEL, "Rivers?").status == 0
    assert "POST /place_instance" not in gateway.lines


def test_chat_ends_with_an_error_inside_the_stream(call: Call, gateway: fake.FakeGateway):
    gateway.chunks = [fake.chunk("Nile, "), fake.envelope("the runner died", "runner_failed", "server_error")]
    assert call("chat", "Rivers?") == (1, "Nile, \n", "skulk: the runner died\n")


def test_chat_ends_with_a_stream_that_breaks_off(call: Call, gateway: fake.FakeGateway):
    gateway.breaks_off = True
    answer = call("chat", "Rivers?")
    assert answer.status == 1
    assert "closed the connection before the answer was complete" in answer.err
    gateway.breaks_off = False
    gateway.chunks = [fake.chunk("Nile")]
    assert "without saying why" in call("chat", "Rivers?").err


def test_a_model_that_never_ends_is_hung_up_on(call: Call, gateway: fake.FakeGateway):
    gateway.chunks = fake.answer_chunks(*["la "] * 2000)
    answer = call("chat", "--json", "Rivers?")
    told = json.loads(answer.out)
    assert (told["content"], told["finish_reason"], told["completion_tokens"]) == ("la " * 1024, "length", 1024)
    assert "cut off" in answer.err
    assert "max_tokens" not in gateway.body_of("POST /v1/chat/completions")


def test_an_answer_may_hold_what_looks_like_an_error(call: Call, gateway: fake.FakeGateway):
    gateway.chunks = fake.answer_chunks('{"error": {"message": "m"}}')
    assert call("chat", "Rivers?").out == '{"error": {"message": "m"}}\n'


def test_errors_of_the_api_are_one_line(call: Call, gateway: fake.FakeGateway):
    gateway.refusals["POST /place_instance"] = (
        404,
        fake.envelope("nothing here knows the model 'x'", "model_not_found"),
    )
    assert call("place", "x") == (1, "", "skulk: nothing here knows the model 'x'\n")
    gateway.refusals["GET /state"] = (503, fake.envelope("no master", "of_the_future", "server_error"))
    assert call("ps") == (1, "", "skulk: no master (of_the_future)\n")
    gateway.refusals["GET /state"] = (502, "<html>bad gateway")
    assert f"skulk: What answers at {gateway.url} doesn't speak Skulk's API (status 502); name" in call("ps").err
    gateway.refusals["GET /state"] = (200, "[]")
    assert "doesn't speak Skulk's API" in call("ps").err


def test_no_cluster_is_one_line_that_says_how_to_start_one(call: Call):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        for words in (
            ["ps"],
            ["nodes"],
            ["models"],
            ["rm", "x"],
            ["place", "x"],
            ["preview", "x"],
            ["events"],
            ["chat", "x"],
        ):
            answer = call(*words, SKULK_API=url)
            assert answer.status == 1, words
            assert answer.err == (
                f"skulk: No cluster answers at {url}: start one with `skulk up`, or name another with --api.\n"
            )


def test_which_cluster(call: Call, gateway: fake.FakeGateway, tmp_path: Path):
    assert call("ps", "--api", gateway.url, SKULK_API="http://127.0.0.1:1").status == 0
    assert call("ps", SKULK_API="http://127.0.0.1:1").status == 1
    node = NodeFile(node_id="a", pid=os.getpid(), version="0", cluster="skulk", started_at=0.0, api_url=gateway.url)
    write_node_file(tmp_path, node)
    assert call("ps", SKULK_API="").status == 0
    elsewhere = {"SKULK_API": "", "SKULK_HOME": str(tmp_path / "empty")}
    port = gateway.url.rpartition(":")[2]
    assert call("ps", **elsewhere, SKULK_API_PORT=port).status == 0


def test_the_first_key_is_shown(call: Call, gateway: fake.FakeGateway, tmp_path: Path):
    call("ps")
    assert "Authorization" not in gateway.requests[-1].headers
    call("ps", SKULK_API_KEYS="ann:sk-1,bob:sk-2")
    assert gateway.requests[-1].headers["Authorization"] == "Bearer sk-1"
    (tmp_path / "keys").write_text("# ours\n\nann:sk-9\n")
    call("ps", SKULK_API_KEYS=f"@{tmp_path / 'keys'}")
    assert gateway.requests[-1].headers["Authorization"] == "Bearer sk-9"
    answer = call("ps", SKULK_API_KEYS="@/nowhere")
    assert (answer.status, "can't be read" in answer.err) == (2, True)
