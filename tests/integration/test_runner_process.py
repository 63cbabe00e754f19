"""A runner as a process of its own, on a real nats-server: the real model's text, statuses, exit statuses."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from skulk.batching.requests import Emitted
from skulk.batching.slots import BatchState, add
from skulk.engines.fake import FakeOptions
from skulk.engines.llama_cpp.loader import load
from skulk.errors import RequestError, StartError
from skulk.runner.process import load_spec
from skulk.runner.runner import shape_of
from skulk.supervision.child import Child
from skulk.wire.base import encode
from skulk.wire.generation import ChatMessage, ChatPrompt
from skulk.wire.runner import EXIT_FAILED, EXIT_REFUSED, EXIT_SPEC, EXIT_STOPPED, RunnerSpec
from tests.support.batches import play_engine, request_of
from tests.support.child_processes import no_process_left, python_spec
from tests.support.gguf import embedded_model
from tests.support.nats import NatsServer
from tests.support.runner_processes import child_of, fake_spec, gateway_on, model_spec, running
from tests.support.runners import fake_answer, generate_of

RUNNER_CODE = "from skulk.runner.process import main; main()"
QUESTIONS = ("Name three rivers.", "Count from one to five.", "What is the capital of France?")


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


def chat(question: str) -> ChatPrompt:
    return ChatPrompt(messages=(ChatMessage(role="user", content=question),))


def alone(spec: RunnerSpec, question: str, max_tokens: int) -> tuple[list[int], str]:
    """The engine's own greedy answer, with nothing of the runner between."""
    engine = load(load_spec(spec), lambda _: True)
    try:
        prompt = tuple(engine.tokens_of(chat(question)))
        state = BatchState(shape=shape_of(engine.info, spec))
        request = request_of("alone", prompt_ids=prompt, max_tokens=max_tokens, greedy=True)
        emitted = [
            one for one in play_engine(add(state, request, engine, 0.0).state, engine) if isinstance(one, Emitted)
        ]
        return [token for one in emitted for token in one.tokens], "".join(one.text for one in emitted)
    finally:
        engine.close()


async def test_streams_carry_the_real_model_s_greedy_text(server: NatsServer) -> None:
    spec = model_spec(server)
    async with gateway_on(server) as gateway, running(spec):
        status = await gateway.statuses.until(lambda status: status.phase == "ready")
        assert status.n_ctx == 512
        assert status.memory_bytes > 0
        stream = await gateway.generate(generate_of("one", prompt=chat(QUESTIONS[0]), max_tokens=24))
        await stream.finish()
        tokens, text = await asyncio.to_thread(alone, spec, QUESTIONS[0], 24)
        assert stream.tokens == tokens
        assert stream.text() == text
        assert text.strip()
        assert stream.end.usage is not None
        assert stream.end.usage.completion_tokens == len(tokens)


async def test_several_at_once_and_a_cancel_among_them(server: NatsServer) -> None:
    async with gateway_on(server) as gateway, running(model_spec(server)):
        streams = [
            await gateway.generate(generate_of(f"r{number}", prompt=chat(question), max_tokens=60))
            for number, question in enumerate(QUESTIONS)
        ]
        await streams[1].read(lambda stream: len(stream.tokens) >= 3)
        assert (await gateway.cancel("r1")).was_running
        for stream in streams:
            await stream.finish()
        assert streams[1].end.reason == "cancelled"
        assert len(streams[1].tokens) < 60
        assert all(stream.end.reason in ("stop", "length") for stream in (streams[0], streams[2]))
        assert all(stream.text().strip() for stream in streams)


async def test_a_prompt_beyond_the_window_is_refused_with_both_numbers(server: NatsServer) -> None:
    async with gateway_on(server) as gateway, running(model_spec(server)):
        with pytest.raises(RequestError, match="512 tokens") as refused:
            await gateway.generate(generate_of(prompt=chat("river " * 600), max_tokens=8))
        assert refused.value.code == "context_length_exceeded"


async def test_a_damaged_model_file_is_told_by_announcement_status_and_exit_status(
    server: NatsServer, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.gguf"
    with embedded_model().open("rb") as source:
        cut.write_bytes(source.read(3_000_000))
    text = tmp_path / "text.gguf"
    text.write_text("this is no model")
    for path, words in ((cut, "cut short"), (text, "not a GGUF")):
        async with gateway_on(server) as gateway:
            child = child_of(model_spec(server, path))
            with pytest.raises(RequestError, match=words) as refused:
                await child.start()
            assert refused.value.code == "model_file_invalid"
            status = await gateway.statuses.until(lambda status: status.phase == "failed")
            assert status.error is not None
            assert status.error.code == "model_file_invalid"
            assert words in status.error.detail
            # Whoever starts it kills it once it has announced the refusal, unless it is quicker.
            assert (await child.exited).returncode in (EXIT_REFUSED, -signal.SIGKILL)


async def exit_status_of(spec: RunnerSpec) -> int:
    """The exit status of a runner that nobody hurries, started without an announcement to wait for."""
    child = Child(python_spec(RUNNER_CODE, ready="", stdin=encode(spec)))
    await child.start()
    async with asyncio.timeout(60.0):
        return (await child.exited).returncode


async def test_exit_statuses(server: NatsServer, tmp_path: Path) -> None:
    refused = fake_spec(tmp_path, server, FakeOptions(load_error="cut short"))
    assert await exit_status_of(refused) == EXIT_REFUSED
    missing = fake_spec(tmp_path, server, backend="nothing-cpu")
    assert await exit_status_of(missing) == EXIT_REFUSED


async def test_a_runner_that_finds_no_bus_fails_and_may_be_started_again(tmp_path: Path, server: NatsServer) -> None:
    spec = fake_spec(tmp_path, server, nats_url="nats://127.0.0.1:9")
    assert await exit_status_of(spec) == EXIT_FAILED


async def test_a_wrong_specification_is_refused_with_a_sentence() -> None:
    child = Child(python_spec(RUNNER_CODE, stdin=b'{"runner_id": 1}'))
    with pytest.raises(StartError, match="started by a node") as refused:
        await child.start()
    assert refused.value.code == "config_invalid"
    assert (await child.exited).returncode in (EXIT_SPEC, -signal.SIGKILL)


@pytest.mark.parametrize("how", ["stdin", "SIGTERM"])
async def test_a_polite_stop_finishes_the_streams_and_exits_with_nothing(
    server: NatsServer, tmp_path: Path, how: str
) -> None:
    spec = fake_spec(tmp_path, server, FakeOptions(step_s=0.02))
    with no_process_left():
        async with gateway_on(server) as gateway, running(spec) as child:
            stream = await gateway.generate(generate_of())
            await stream.read(lambda stream: len(stream.tokens) >= 2)
            if how == "stdin":
                stopping = asyncio.create_task(child.stop())
            else:
                child.signal(signal.SIGTERM)
                stopping = asyncio.create_task(asyncio.wait_for(child.exited, 30.0))
            assert (await stream.finish()).text() == fake_answer()
            assert (await stopping).returncode == EXIT_STOPPED
            assert gateway.statuses.phases[-2:] == ["draining", "stopped"]


async def test_a_second_signal_stops_at_once(server: NatsServer, tmp_path: Path) -> None:
    spec = fake_spec(tmp_path, server, FakeOptions(step_s=0.2, answer_tokens=500))
    async with gateway_on(server) as gateway, running(spec) as child:
        stream = await gateway.generate(generate_of())
        await stream.read(lambda stream: len(stream.tokens) >= 2)
        child.signal(signal.SIGTERM)
        await gateway.statuses.until(lambda status: status.phase == "draining")
        child.signal(signal.SIGTERM)
        assert (await stream.finish()).error_code == "draining"
        assert (await asyncio.wait_for(child.exited, 30.0)).returncode == EXIT_STOPPED
