"""Embeddings, scores and tokens of one runner on the memory bus with the fake engine."""

from __future__ import annotations

import array
import asyncio
from pathlib import Path
from typing import Any

import pytest

from skulk.bus.subjects import RUNNER_DETOKENIZE, RUNNER_EMBED, RUNNER_TOKENIZE
from skulk.engines.fake import EMBEDDING_SIZE, FakeOptions
from skulk.errors import SkulkError
from skulk.runner import embedding
from skulk.wire.embedding import Detokenize, Embed, Embedded, EmbedInput, RankPair, Tokenize
from skulk.wire.generation import TextPrompt, TokenPrompt
from tests.support.runners import RUNNER, WAIT_S, RunnerWorld, generate_of, runner_world

MEAN = FakeOptions(pooling="mean")


def embed_of(*inputs: str | EmbedInput, name: str = "e1", timeout_s: float | None = None) -> Embed:
    given = tuple(TextPrompt(text=one) if isinstance(one, str) else one for one in inputs)
    return Embed(request_id=name, model_id="fake/model", inputs=given, timeout_s=timeout_s)


async def ask(world: RunnerWorld, message: Embed) -> Embedded:
    return await world.bus.request(RUNNER_EMBED, message, timeout_s=WAIT_S, runner=RUNNER)


async def code_of(asking: Any) -> str:
    with pytest.raises(SkulkError) as caught:
        await asking
    return caught.value.code


def numbers(vector: bytes) -> list[float]:
    return array.array("f", vector).tolist()


async def test_each_input_has_its_vector_in_order_however_they_are_batched(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(11)]
    async with runner_world(tmp_path, options=MEAN) as world:
        alone = [(await ask(world, embed_of(text))).vectors[0] for text in texts]
        together = await asyncio.gather(
            ask(world, embed_of(*texts, name="all")), ask(world, embed_of(*reversed(texts), name="back"))
        )
    assert together[0].vectors == tuple(alone)
    assert together[1].vectors == tuple(reversed(alone))
    assert together[0].prompt_tokens == sum(len(text) for text in texts)
    assert [len(numbers(vector)) for vector in alone] == [EMBEDDING_SIZE] * 11
    assert all(abs(sum(x * x for x in numbers(vector)) - 1) < 1e-5 for vector in alone)


async def test_inputs_of_several_calls_share_a_batch(tmp_path: Path) -> None:
    async with runner_world(tmp_path, options=MEAN, gated=True) as world:
        first = asyncio.create_task(ask(world, embed_of("a", name="a")))
        await world.gate.arrived(1)
        others = [asyncio.create_task(ask(world, embed_of(name, name=name))) for name in "bcd"]
        async with asyncio.timeout(WAIT_S):
            # read in threads, each in its time
            while world.runner._desk.waiting < 3:  # noqa: ASYNC110 - a queue tells nobody
                await asyncio.sleep(0.005)
        world.gate.let(2)
        await asyncio.gather(first, *others)
        assert world.gate.arrivals == 2, "the three that came meanwhile are one batch"


async def test_a_cancelled_call_leaves_the_queue_and_stops_nobody(tmp_path: Path) -> None:
    async with runner_world(tmp_path, options=MEAN, gated=True) as world:
        first = asyncio.create_task(ask(world, embed_of("a", name="a")))
        await world.gate.arrived(1)
        second = asyncio.create_task(ask(world, embed_of("b", name="b")))
        third = asyncio.create_task(ask(world, embed_of("c", name="c")))
        await world.statuses.until(lambda status: status.active == 3)
        assert (await world.cancel("a")).was_running
        assert (await world.cancel("b")).was_running
        assert await code_of(first) == await code_of(second) == "request_cancelled"
        assert not (await world.cancel("b")).was_running
        world.gate.open()
        assert len((await third).vectors) == 1


async def test_what_comes_too_late_is_said(tmp_path: Path) -> None:
    async with runner_world(tmp_path, options=MEAN, gated=True) as world:
        assert await code_of(ask(world, embed_of("a", timeout_s=0.05))) == "deadline_exceeded"


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (embed_of(), "invalid_request"),
        (embed_of(""), "invalid_request"),
        (embed_of("fine", "x" * 1025), "context_length_exceeded"),
        (embed_of(*("x" for _ in range(2049))), "invalid_request"),
    ],
    ids=["nothing", "empty", "too long", "too many"],
)
async def test_what_can_not_be_embedded_is_refused(tmp_path: Path, message: Embed, code: str) -> None:
    async with runner_world(tmp_path, options=MEAN) as world:
        assert await code_of(ask(world, message)) == code
        assert len((await ask(world, embed_of("goes on", name="next"))).vectors) == 1


async def test_the_queue_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "MAX_OPEN_INPUTS", 3)
    async with runner_world(tmp_path, options=MEAN, gated=True) as world:
        first = asyncio.create_task(ask(world, embed_of("a", "b", name="a")))
        await world.gate.arrived(1)
        assert await code_of(ask(world, embed_of("c", "d", name="b"))) == "overloaded"
        world.gate.open()
        await first


async def test_a_generating_model_gives_no_vectors_and_an_embedding_one_no_text(tmp_path: Path) -> None:
    async with runner_world(tmp_path) as world:
        assert await code_of(ask(world, embed_of("a"))) == "invalid_request"
    async with runner_world(tmp_path, options=MEAN) as world:
        assert await code_of(world.ask(generate_of())) == "invalid_request"


async def test_pairs_are_scored(tmp_path: Path) -> None:
    pair = RankPair(query="rivers", document="the Rhine")
    async with runner_world(tmp_path, options=FakeOptions(pooling="rank")) as world:
        answer = await ask(world, embed_of(pair, pair))
    assert [len(numbers(vector)) for vector in answer.vectors] == [1, 1]
    assert answer.vectors[0] == answer.vectors[1]


async def test_a_failing_engine_ends_every_call(tmp_path: Path) -> None:
    options = FakeOptions(pooling="mean", fail_at_step=2)
    async with runner_world(tmp_path, options=options) as world:
        await ask(world, embed_of("a"))
        codes = await asyncio.gather(*(code_of(ask(world, embed_of("b", name=name))) for name in "bc"))
        assert set(codes) == {"runner_failed"}
        assert await world.exit_status() == 1


async def test_a_polite_stop_lets_calls_finish(tmp_path: Path) -> None:
    async with runner_world(tmp_path, options=MEAN, gated=True) as world:
        first = asyncio.create_task(ask(world, embed_of("a")))
        await world.gate.arrived(1)
        world.runner.stop()
        await world.statuses.until(lambda status: status.phase == "draining")
        assert await code_of(ask(world, embed_of("b", name="b"))) == "draining"
        world.gate.open()
        assert len((await first).vectors) == 1
        assert await world.exit_status() == 0


async def test_text_to_tokens_and_back(tmp_path: Path) -> None:
    async with runner_world(tmp_path) as world:
        told = await world.bus.request(RUNNER_TOKENIZE, Tokenize(text="Köln"), timeout_s=WAIT_S, runner=RUNNER)
        assert b"".join(told.pieces) == "Köln".encode() and len(told.tokens) == 5
        back = await world.bus.request(
            RUNNER_DETOKENIZE, Detokenize(tokens=told.tokens), timeout_s=WAIT_S, runner=RUNNER
        )
        assert back.text == "Köln"
        wrong = world.bus.request(RUNNER_DETOKENIZE, Detokenize(tokens=(999,)), timeout_s=WAIT_S, runner=RUNNER)
        assert await code_of(wrong) == "invalid_request"


async def test_token_ids_are_inputs_too(tmp_path: Path) -> None:
    async with runner_world(tmp_path, options=MEAN) as world:
        by_text = await ask(world, embed_of("abc"))
        by_ids = await ask(world, embed_of(TokenPrompt(tokens=tuple(b"abc")), name="ids"))
        assert by_text.vectors == by_ids.vectors
