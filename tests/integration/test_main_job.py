"""The main job from end to end: ``skulk up`` as a user runs it, the embedded model, the real bus, every command."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import nats
import openai
import psutil
import pytest
import pytest_asyncio
from llama_cpp import Llama

from skulk.models.catalogue import Catalogue
from skulk.placement.prefixes import held_by, prefix_of
from skulk.wire.generation import ChatMessage, ChatPrompt
from tests.support.whole_node import FREE_PORTS, MODEL, WholeNode, skulk, text_of, whole_node

QUESTION = [{"role": "user", "content": "Name three rivers."}]
TOKENS = 48
LACKED: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "response_format": {"type": "json_object"},
    "logprobs": True,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def node(tmp_path_factory: pytest.TempPathFactory) -> AsyncGenerator[WholeNode]:
    home = tmp_path_factory.mktemp("home")
    async with whole_node(home, "--place", MODEL, "--greet") as running:
        await running.wait_ready()
        yield running


pytestmark = pytest.mark.asyncio(loop_scope="module")


def greedy_text(tmp_path: Path) -> str:
    """What llama-cpp-python itself answers to the question."""
    catalogue = Catalogue(tmp_path, verified_file=tmp_path / "verified.json")
    catalogue.rescan()
    llama = Llama(str(catalogue.path_of(MODEL)), n_ctx=2048, n_batch=512, flash_attn=True, verbose=False, n_threads=1)
    try:
        answer: Any = llama.create_chat_completion(
            messages=QUESTION,  # pyright: ignore[reportArgumentType]
            temperature=0.0,
            max_tokens=TOKENS,
        )
        return answer["choices"][0]["message"]["content"]
    finally:
        llama.close()


async def test_up_greets_and_tells_what_to_type_next(node: WholeNode) -> None:
    await node.wait_output("nats -s ")
    output = "".join(node.output)
    assert "> Name three rivers." in output
    assert f"API    {node.url}" in output
    assert f"curl -sN {node.url}/v1/chat/completions" in output
    assert f"nats -s {node.facts['nats_url']} sub 'skulk.>'" in output


async def test_the_text_is_the_models_streamed_and_whole(node: WholeNode, tmp_path: Path) -> None:
    expected = await asyncio.to_thread(greedy_text, tmp_path)
    events = [event async for event in node.stream(QUESTION, temperature=0, max_tokens=TOKENS)]
    assert text_of(events) == expected
    assert events[-1] == {}
    whole = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": TOKENS}
    status, answer = await node.call("POST", "/v1/chat/completions", whole)
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["usage"]["completion_tokens"] <= TOKENS


async def test_place_state_and_delete(node: WholeNode) -> None:
    asked = {"model_id": MODEL, "instance_meta": "MlxRing", "min_nodes": 1}
    status, placed = await node.call("POST", "/place_instance", asked)
    assert status == 200
    assert {"message", "command_id", "instance_id", "model_card"} <= placed.keys()
    state = await node.state()
    assert placed["instance_id"] in state["instances"]
    assert state["master"] == node.facts["node_id"]
    assert "llama_cpp-cpu" in state["nodeBackends"][node.facts["node_id"]]
    status, _ = await node.call("GET", f"/instance/{placed['instance_id']}")
    assert status == 200
    status, _ = await node.call("DELETE", f"/instance/{placed['instance_id']}")
    assert status == 200
    assert placed["instance_id"] not in (await node.state())["instances"]
    status, gone = await node.call("GET", f"/instance/{placed['instance_id']}")
    assert (status, gone["error"]["code"]) == (404, "instance_not_found")


async def test_the_next_turn_of_a_conversation_finds_its_replica(node: WholeNode) -> None:
    """Two replicas: each conversation goes on where it began, and computes only what is new."""
    status, placed = await node.call("POST", "/place_instance?wait=ready", {"model_id": MODEL, "n_parallel": 2})
    assert status == 200
    told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def heard(message: Any) -> None:
        await told.put(json.loads(message.data))

    bus = await nats.connect(node.facts["nats_url"])
    try:
        await bus.subscribe("skulk.*.v1.status.runner.>", cb=heard)
        await bus.flush()
        for number in range(2):
            story = [{"role": "user", "content": f"Story {number}: " + "a fox met a hare at the river. " * 44}]
            asked = {"model": MODEL, "messages": story, "max_tokens": 4, "temperature": 0}
            status, first = await node.call("POST", "/v1/chat/completions", asked)
            assert status == 200
            prompt = prefix_of(ChatPrompt(messages=(ChatMessage(role="user", content=story[0]["content"]),)))
            async with asyncio.timeout(20.0):
                while held_by((await told.get())["prefixes"]).share_of(prompt) < 0.5:
                    pass
            await node.state()  # the gateway has heard it too
            story = [*story, first["choices"][0]["message"], {"role": "user", "content": "Go on."}]
            _, second = await node.call("POST", "/v1/chat/completions", {**asked, "messages": story})
            assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 200
    finally:
        await bus.close()
        await node.call("DELETE", f"/instance/{placed['instance_id']}")


async def test_every_command_of_the_readme(node: WholeNode) -> None:
    def run(*arguments: str) -> str:
        done = skulk(node.home, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert node.facts["node_id"] in await asyncio.to_thread(run, "nodes")
    assert MODEL in await asyncio.to_thread(run, "ps")
    assert MODEL in await asyncio.to_thread(run, "models")
    assert json.loads(await asyncio.to_thread(run, "ps", "--json"))
    assert "instance_assigned" in await asyncio.to_thread(run, "events")
    assert node.facts["cluster"] in await asyncio.to_thread(run, "config")
    assert (await asyncio.to_thread(run, "chat", "Name three rivers.")).strip()
    await asyncio.to_thread(run, "preview", MODEL)
    await asyncio.to_thread(run, "place", MODEL, "--wait")
    listed = json.loads(await asyncio.to_thread(run, "ps", "--json"))
    assert len(listed) == 2
    oldest = await first_instance(node)
    newest = next(name for name in (await node.state())["instances"] if name != oldest)
    await asyncio.to_thread(run, "rm", newest)
    assert len((await node.state())["instances"]) == 1


async def first_instance(node: WholeNode) -> str:
    instances = (await node.state())["instances"].values()
    oldest = min((found["MlxRingInstance"] for found in instances), key=lambda found: found["createdAt"])
    return oldest["instanceId"]


async def test_everything_on_the_bus_is_readable_json_and_the_services_answer(node: WholeNode) -> None:
    """What ``nats sub 'skulk.>'`` and ``nats micro ls`` show, through a plain client without credentials."""
    client = await nats.connect(node.facts["nats_url"])
    try:
        seen: dict[str, Any] = {}
        has_beats = asyncio.Event()

        async def note(message: Any) -> None:
            seen.setdefault(".".join(message.subject.split(".")[3:5]), json.loads(message.data))
            if {"beat.node", "beat.master", "beat.gateway"} <= seen.keys():
                has_beats.set()

        await client.subscribe("skulk.>", cb=note)
        async for _ in node.stream(QUESTION, temperature=0, max_tokens=8):
            pass
        await asyncio.wait_for(has_beats.wait(), 5.0)
        chunk = next(message for plane, message in seen.items() if plane.startswith("stream."))
        assert {"request_id", "attempt", "seq", "text", "tokens"} <= chunk.keys()
        assert seen["beat.node"]["tags"] == ["llama_cpp", "llama_cpp-cpu"]

        services: set[str] = set()
        inbox = await client.subscribe("_INBOX.test")
        await client.publish("$SRV.PING", reply="_INBOX.test")
        while not {"master", "node", "events", "runner"} <= services:
            services.add(json.loads((await inbox.next_msg(timeout=2.0)).data)["name"])
        history = await client.request("skulk.skulk.v1.events.history", b'{"limit":200}', timeout=2.0)
        assert json.loads(history.data)["events"]
    finally:
        await client.close()


async def test_a_killed_runner_ends_its_stream_with_an_error_and_comes_back(node: WholeNode) -> None:
    instance_id = await node.wait_ready()
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(10.0):
        async for event in node.stream(QUESTION, ignore_eos=True, temperature=0):
            events.append(event)
            if len(events) == 5:
                psutil.Process(node.children()["runner"]).kill()
    assert events[-1]["error"]["code"] == "runner_failed"
    assert "SIGKILL" in events[-1]["error"]["message"]
    await node.wait_ready()
    assert list((await node.state())["instances"]) == [instance_id]
    again = [event async for event in node.stream(QUESTION, temperature=0, max_tokens=4)]
    assert text_of(again)


async def test_a_killed_nats_server_is_replaced_and_streams_lose_nothing(node: WholeNode) -> None:
    expected = text_of([event async for event in node.stream(QUESTION, temperature=0, max_tokens=200, ignore_eos=True)])
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(30.0):
        async for event in node.stream(QUESTION, temperature=0, max_tokens=200, ignore_eos=True):
            events.append(event)
            if len(events) == 20:
                psutil.Process(node.children()["nats-server"]).kill()
    assert events[-1] == {}
    assert text_of(events) == expected


async def test_a_second_start_on_the_same_home_or_port_is_refused_in_one_sentence(
    node: WholeNode, tmp_path: Path
) -> None:
    second = await asyncio.to_thread(skulk, node.home, "up", "--local", *FREE_PORTS)
    assert second.returncode == 75
    assert str(node.process.pid) in second.stderr
    assert "--home" in second.stderr
    for flag in ("--api-port", "--nats-port", "--route-port"):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            others = [part for name in FREE_PORTS[::2] if name != flag for part in (name, "0")]
            refused = await asyncio.to_thread(skulk, tmp_path, "up", "--local", flag, port, *others)
        assert refused.returncode == 75, refused.stderr
        assert port in refused.stderr
        assert flag in refused.stderr
    assert (await node.call("GET", "/health"))[0] == 200


async def test_the_statistics_of_one_request_after_another_are_its_own(node: WholeNode) -> None:
    body = {"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 4}
    for _ in range(3):
        status, answer = await node.call("POST", "/bench/chat/completions", body)
        assert status == 200
        assert answer["generation_stats"]["in_flight_at_admission"] == 0
        assert answer["generation_stats"]["serving_batches"] == 1


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/chat/completions", {"model": "no/such", "messages": QUESTION}, 404, "model_not_found"),
        ("POST", "/v1/chat/completions", {"model": MODEL, "messages": []}, 400, "invalid_request"),
        ("POST", "/v1/chat/completions", {"model": MODEL, "messages": "hi"}, 400, "invalid_request"),
        (
            "POST",
            "/v1/chat/completions",
            {"model": MODEL, "stream": True, "max_tokens": 99_999, "messages": QUESTION},
            400,
            "context_length_exceeded",
        ),
        ("POST", "/place_instance", {"model_id": "no/such"}, 404, "model_not_found"),
        ("POST", "/place_instance", {"model_id": MODEL, "min_nodes": "two"}, 400, "invalid_request"),
        ("DELETE", "/instance/nobody", None, 404, "instance_not_found"),
        ("GET", "/no/such/route", None, 404, "route_not_found"),
    ],
)
async def test_bad_input_gets_a_true_status_and_harms_nothing(
    node: WholeNode, method: str, path: str, body: Any, status: int, code: str
) -> None:
    told, answer = await node.call(method, path, body)
    assert (told, answer["error"]["code"]) == (status, code)
    assert answer["error"]["message"]
    assert (await node.call("GET", "/health"))[0] == 200


async def test_a_long_prompt_is_refused_before_any_event(node: WholeNode) -> None:
    long = [{"role": "user", "content": "river " * 20_000}]
    told, answer = await node.call("POST", "/v1/chat/completions", {"model": MODEL, "stream": True, "messages": long})
    assert (told, answer["error"]["code"]) == (400, "context_length_exceeded")
    tokens, window = (int(text.replace(",", "")) for text in re.findall(r"\d[\d,]+", answer["error"]["message"])[:2])
    assert tokens > 20_000
    assert (
        window == (await node.state())["instances"][await first_instance(node)]["MlxRingInstance"]["contextTokenLimit"]
    )


async def test_a_grammar_holds_the_answer_and_a_wrong_one_is_refused_before_any_event(node: WholeNode) -> None:
    body = {"model": MODEL, "messages": QUESTION, "max_tokens": 24, "n": 2, "grammar": 'root ::= ("yes" | "no") "!"?'}
    told, answer = await node.call("POST", "/v1/chat/completions", body)
    assert told == 200, answer
    assert {one["finish_reason"] for one in answer["choices"]} == {"stop"}
    assert {one["message"]["content"].rstrip("!") for one in answer["choices"]} <= {"yes", "no"}
    plain = {"model": MODEL, "prompt": "Three rivers:", "max_tokens": 12, "grammar": "root ::= [a-c]+"}
    told, answer = await node.call("POST", "/v1/completions", plain)
    assert (told, set(answer["choices"][0]["text"]) <= set("abc")) == (200, True), answer
    told, answer = await node.call("POST", "/v1/chat/completions", {**body, "stream": True, "grammar": "root ::= x"})
    assert (told, answer["error"]["code"], answer["error"]["param"]) == (400, "invalid_request", "grammar")
    assert "x is used and nowhere defined" in answer["error"]["message"]


async def test_the_openai_client_against_a_running_node(node: WholeNode) -> None:
    messages: Any = QUESTION
    short: Any = {"model": MODEL, "messages": messages, "max_tokens": 8, "temperature": 0}
    async with openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0) as client:
        whole = await client.chat.completions.create(**short, n=2, seed=1, stop=["###"])
        first, second = (choice.message.content for choice in whole.choices)
        assert first and first == second
        assert whole.usage is not None and whole.usage.completion_tokens == 16
        stream = await client.chat.completions.create(**short, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
        assert "".join(delta.content or "" for delta in deltas) == first
        assert [delta.role for delta in deltas if delta.role] == ["assistant"]
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 8
        texts = await client.completions.create(
            model=MODEL, prompt=["One, two,", "Red, green,"], echo=True, n=2, max_tokens=4, temperature=0
        )
        assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
        assert [choice.text.split(",")[0] for choice in texts.choices] == ["One", "One", "Red", "Red"]
        raw = await client.chat.completions.with_raw_response.create(**short, metadata={"a": "b"})
        assert raw.headers["X-Skulk-Inert"] == "metadata" and raw.headers["X-Request-Id"]
        assert raw.parse().choices[0].message.content == first
        for param, value in LACKED.items():
            with pytest.raises(openai.BadRequestError, match="this version lacks") as refused:
                asked: Any = {**short, param: value}
                await client.chat.completions.create(**asked)
            assert refused.value.param == param
        with pytest.raises(openai.BadRequestError, match="gives no embeddings"):
            await client.embeddings.create(model=MODEL, input="a")
        with pytest.raises(openai.NotFoundError):
            missing: Any = {**short, "model": "no/such"}
            await client.chat.completions.create(**missing)
        with pytest.raises(openai.BadRequestError) as long:
            await client.completions.create(model=MODEL, prompt="word " * 9000)
        assert long.value.code == "context_length_exceeded"

    def ask() -> str | None:
        with openai.OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0) as plain:
            return plain.chat.completions.create(**short).choices[0].message.content

    assert await asyncio.to_thread(ask) == first


async def test_what_a_user_types_stays_text(node: WholeNode) -> None:
    """The end marker in a user's message must not end the message."""
    told, plain = await node.call(
        "POST", "/v1/chat/completions", {"model": MODEL, "messages": QUESTION, "max_tokens": 1, "temperature": 0}
    )
    assert told == 200, plain
    typed = [{"role": "user", "content": "Name three rivers.<|im_end|>"}]
    told, marked = await node.call(
        "POST", "/v1/chat/completions", {"model": MODEL, "messages": typed, "max_tokens": 1, "temperature": 0}
    )
    assert told == 200, marked
    # one special token would add one; the seven letters and signs of its text add several
    assert marked["usage"]["prompt_tokens"] - plain["usage"]["prompt_tokens"] > 3
