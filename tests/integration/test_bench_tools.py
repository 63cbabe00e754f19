"""The benchmarks against real parts: a gateway, servers that answer and servers that don't, our own engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_client
import bench_engine
import bench_gateway
import bench_serving
import bench_sides
import msgspec
import pytest
from bench_client import Plan, Server
from bench_serving import parse, run
from bench_sides import Case, measure_ours

from skulk.bus.streams import StreamWriter
from tests.support.fake_gateway import MODEL, FakeGateway, answer_chunks, envelope
from tests.support.http import FakeRunner, running_gateway, two_words

SHORT = Plan(concurrency=2, requests=5, words=4, max_tokens=3, rounds=2, rate=1000.0, timeout_s=20.0, deadline_s=60.0)


@pytest.fixture
def fake() -> Iterator[FakeGateway]:
    with FakeGateway() as gateway:
        yield gateway


def plan(**changes: Any) -> Plan:
    return msgspec.structs.replace(SHORT, **changes)


async def test_a_closed_loop_on_the_real_gateway(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway:
        runner = await gateway.serve_model()
        open_now, most = 0, 0

        async def counted(runner: FakeRunner, writer: StreamWriter) -> None:
            nonlocal open_now, most
            open_now += 1
            most = max(most, open_now)
            await two_words(runner, writer)
            open_now -= 1

        runner.script = counted
        [measured] = await run([Server(name="ours", url=gateway.url, model="")], SHORT)
    assert measured.model, "the first model of the list is taken"
    assert [(one.completed, one.failed) for one in measured.rounds] == [(5, 0), (5, 0)]
    # two_words tells 2 tokens of usage, 5 of prompt and 1 of them cached
    assert [(one.completion_tokens, one.prompt_tokens, one.cached_tokens) for one in measured.rounds] == [
        (10, 25, 5)
    ] * 2
    assert 1 <= most <= 2, "more requests at a time than asked for"
    assert all(one.tokens_per_s > 0 and one.ttft_p50_s > 0 for one in measured.rounds)
    prompts = [one.prompt for one in runner.asked[1:]]
    assert len(set(map(str, prompts))) == 10, "every request of every round has a prompt of its own"


async def test_two_servers_get_the_same_in_turned_order(fake: FakeGateway) -> None:
    with FakeGateway() as other:
        order: list[str] = []
        fake.on_request = lambda request: order.append("a") if request.line.startswith("POST") else None
        other.on_request = lambda request: order.append("b") if request.line.startswith("POST") else None
        servers = [Server(name="a", url=fake.url), Server(name="b", url=other.url)]
        measured = await run(servers, plan(scenario="open", requests=3))
        sent = [[one.body for one in gateway.requests if one.body is not None] for gateway in (fake, other)]
    assert "".join(order) == "ab" + "aaabbb" + "bbbaaa"
    assert sorted(sent[0], key=str) == sorted(sent[1], key=str) and sent[0][0]["model"] == MODEL
    told = bench_serving.report(plan(scenario="open", requests=3), measured)
    assert "open: 3 requests, 1000 a second" in told and "a / b" in told


async def test_a_seen_prefix_is_sent_before(fake: FakeGateway) -> None:
    await run([Server(name="a", url=fake.url)], plan(rounds=1, requests=2, shared_words=6, is_seen=True))
    prompts = [one.body["messages"][0]["content"] for one in fake.requests if one.body is not None]
    warm, seen, first, second = prompts
    prefix = seen.removesuffix(" and")
    assert warm == "Hello" and len(prefix.split()) == 6
    assert first.startswith(f"{prefix} ") and second.startswith(f"{prefix} ") and first != second


async def test_failures_are_counted_with_their_reason(fake: FakeGateway) -> None:
    fake.refusals["POST /v1/chat/completions"] = (503, envelope("the queue is full", "overloaded"))
    [measured] = await run([Server(name="a", url=fake.url)], plan(rounds=1, requests=2))
    assert measured.rounds[0].errors == ("status 503: the queue is full",) and measured.rounds[0].failed == 2
    fake.refusals.clear()
    fake.breaks_off = True
    [measured] = await run([Server(name="a", url=fake.url)], plan(rounds=1, requests=2))
    assert measured.rounds[0].errors == ("the stream broke off before [DONE]",)
    fake.breaks_off, fake.chunks = False, [*answer_chunks("one")[:2], envelope("the runner died", "runner_failed")]
    [measured] = await run([Server(name="a", url=fake.url)], plan(rounds=1, requests=1))
    assert measured.rounds[0].errors == ("the runner died",)


async def test_a_long_prompt_beside_streams(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as gateway:
        runner = await gateway.serve_model()

        async def scripted(runner: FakeRunner, writer: StreamWriter) -> None:
            if writer.request.limits.max_tokens != 400:
                await two_words(runner, writer)
                return
            for at in range(bench_client.STEADY_TOKENS):
                writer.send(0, "word ", (at,))
            async with asyncio.timeout(20.0):
                await runner.cancelled.wait()

        runner.script = scripted
        long = plan(scenario="long", concurrency=2, max_tokens=400, long_words=50, rounds=1)
        [measured] = await run([Server(name="ours", url=gateway.url)], long)
    [found] = measured.rounds
    assert found.ttft_p50_s > 0
    # These streams say no more once the long prompt came: that is told, not passed over.
    assert found.failed == 2 and "was over before the long prompt's first token" in found.errors[0]
    assert len(runner.asked) == 4, "the warm-up, two streams, the long prompt"
    assert len(str(runner.asked[-1].prompt).split()) > 40


async def test_a_server_that_is_not_there_ends_the_run() -> None:
    with pytest.raises(bench_client.BenchError, match="names no model"):
        await run([Server(name="a", url="http://127.0.0.1:1")], SHORT)


def test_the_command_line(fake: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--requests", "2", "--words", "3", "--rounds", "1", "--json"]
    assert bench_serving.main([f"ours={fake.url}/v1", *base]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["measured"][0]["server"] == "ours" and told["measured"][0]["rounds"][0]["completed"] == 2
    assert fake.body_of("POST /v1/chat/completions")["ignore_eos"] is True
    fake.breaks_off = True
    assert bench_serving.main([fake.url, *base]) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["http://192.0.2.1:80"], "--allow-remote"),
        (["ftp://127.0.0.1"], "is no URL"),
        (["http://127.0.0.1:1", "http://127.0.0.1:1"], "names of their own"),
        (["http://127.0.0.1:1", "--concurrency", "0"], "--concurrency is 0"),
        (["http://127.0.0.1:1", "--rate", "nan"], "--rate is nan"),
        (["http://127.0.0.1:1", "--extra", "[]"], "object"),
    ],
)
def test_wrong_use_is_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert told in capsys.readouterr().err
    assert parse(["http://192.0.2.1:80", "--allow-remote"])[1][0].url == "http://192.0.2.1:80"


def test_our_engine_is_measured_on_the_real_model() -> None:
    case = Case(model=bench_engine.embedded_model(), sequences=2, prompt=16, generated=4, threads=1, n_ubatch=64)
    measured = measure_ours(case)
    assert measured.speed > 0 and measured.depth >= 16 and "llama.cpp" in measured.version
    assert measure_ours(msgspec.structs.replace(case, phase="prefill")).speed > 0


def test_without_the_binary_only_ours_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(bench_sides, "PACKAGE", "no_such_package_of_programs")
    arguments = ["--sizes", "1", "--rounds", "1", "--prompt", "16", "--generated", "4", "--threads", "1"]
    arguments += ["--phases", "decode", "--sampling", "top_k"]
    assert bench_engine.main(arguments) == 0
    assert "not measured: llama-batched-bench is not here" in capsys.readouterr().out
    assert bench_engine.main(["--binary", "nowhere/llama-batched-bench"]) == 1
    assert "is no program" in capsys.readouterr().err


def test_a_model_that_cannot_be_loaded_is_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"not a model")
    assert bench_engine.main(["--model", str(broken), "--sizes", "1", "--rounds", "1"]) == 1
    assert "is not a GGUF file" in capsys.readouterr().err


def test_the_gateways_bench_measures_both_sides_in_pairs() -> None:
    ours, bare = bench_gateway.pairs(bench_gateway.Load(tokens=5, rate=100.0), 2, 1)
    for side in (ours, bare):
        [measured] = side
        assert [one.is_whole for one in measured.heard] == [True, True]
        assert measured.tokens == 10
        assert all(wait > 0 for one in measured.heard for wait in one.waits)
    assert bench_gateway.added(ours, bare, lambda one: one.tokens) == 0
