"""What `tests/fault` shows at every tenth token, at every one of 60; on the real model too: `make test-failover`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skulk.batching.rate import MAX_RUN
from skulk.batching.step import StepPlan, StepRow
from skulk.engines.llama_cpp.engine import LlamaCppEngine
from skulk.wire.generation import Sampling
from tests.fault.test_failover import GREEDY, kill_at, kill_node_at, two_fakes
from tests.support.child_processes import no_process_left
from tests.support.engine_play import logits_of
from tests.support.engines import load_small, text_of
from tests.support.failover import Replicas, every, replicas
from tests.support.gguf import embedded_model
from tests.support.mesh import MeshNode, ending, until_full
from tests.support.nats import NatsServer
from tests.support.real_models import exact_copy
from tests.support.runner_processes import model_spec

TOKENS = 60
CLOSE = 0.5
MOST_TRIES = 10
REAL: dict[str, Any] = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
# With a stop string, which never comes, each token is a message; without it several may come together.
ONE_BY_ONE: dict[str, Any] = {"stop": ["\0"]}
HELD: dict[str, Any] = {**ONE_BY_ONE, "max_tokens": 24, "grammar": 'root ::= ([A-Z] [a-z]+ ", "){4,9}'}


async def test_every_token_on_a_runner_kill(tmp_path: Path) -> None:
    async with two_fakes(tmp_path, hang_at=2) as world:
        for index in every(TOKENS, step=1):
            await kill_at(world, index, **GREEDY)


async def test_every_token_on_a_node_kill(tmp_path: Path) -> None:
    with no_process_left():
        near = await MeshNode("a", tmp_path / "a").start()
        far = MeshNode("b", tmp_path / "b", (near.route,))
        async with ending(near, far):
            for index in every(TOKENS, step=1):
                await far.start()
                await until_full(near, far)
                await kill_node_at(near, far, index, tmp_path / str(index))


@asynccontextmanager
async def two_real(folder: Path, model: Path) -> AsyncGenerator[Replicas]:
    with no_process_left(), NatsServer() as server:
        async with replicas(folder, server.url) as world:
            for name in "ab":
                await world.serve(name, model_spec(server, model, n_parallel=2, kv_cells=1024))
            yield world


@pytest.mark.parametrize("kind", ["as it is", "F32"])
async def test_the_real_model_at_every_token(tmp_path: Path, kind: str) -> None:
    """No token twice, none lost; each resumed one as good as the best of an undisturbed run, and with F32 the same."""
    model = embedded_model() if kind == "as it is" else exact_copy()
    engine = await asyncio.to_thread(load_small, model, context_length=512, n_parallel=2, kv_cells=1024)
    try:
        async with two_real(tmp_path, model) as world:
            undisturbed = await world.whole(**REAL)
            expected = world.ids_of_last()[0]
            assert len(expected) == TOKENS
            for index in every(TOKENS - 1, step=1):
                # Otherwise the last of them may have come with the one at which the runner is killed.
                fields = REAL if index + MAX_RUN < TOKENS else {**REAL, **ONE_BY_ONE}
                ids, text = await killed_real(world, index, **fields)
                heard = text_of(engine, ids)
                assert world.runs[-1].resumptions == 1
                assert len(ids) == TOKENS
                assert text == heard, f"the text is not that of the {TOKENS} tokens, killed at {index}"
                if kind == "F32":
                    assert ids == expected
                else:
                    gaps = await asyncio.to_thread(gaps_of, engine, world.runs[-1].prompt_ids, ids)
                    assert max(gaps[index:]) <= CLOSE, f"killed at {index}: {gaps[index:]}"
            assert undisturbed.is_whole
    finally:
        engine.close()


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0}, {"temperature": 1, "top_k": 40, "seed": 5}, {"temperature": 1, "seed": 5}],
    ids=["greedy", "top_k", "temperature"],
)
async def test_an_answer_that_is_held_to_a_grammar(tmp_path: Path, sampling: dict[str, Any]) -> None:
    """Where it stands in its grammar comes from the tokens, and it goes on elsewhere as if nothing had been.

    Over the whole vocabulary a draw may fall among thousands of tokens that weigh next to nothing each; which of those
    it is, hangs on how the heavy ones were rounded, and a prompt is rounded otherwise than a step. There the answer
    only has to begin with what was sent, and to be of the grammar.
    """
    fields = {**HELD, **sampling}
    async with two_real(tmp_path, exact_copy()) as world:
        undisturbed = await world.whole(**fields)
        expected = world.ids_of_last()[0]
        for index in every(len(expected) - 1, step=3):
            ids, text = await killed_real(world, index, **fields)
            assert world.runs[-1].resumptions == 1
            assert ids[:index] == expected[:index]
            assert re.fullmatch(r"(?:[A-Z][a-z]+, )*(?:[A-Z][a-z]*,?)?", text), text
            if "top_k" in sampling or not sampling["temperature"]:
                assert (ids, text) == (expected, undisturbed.texts()[0])


async def killed_real(world: Replicas, index: int, **fields: Any) -> tuple[tuple[int, ...], str]:
    """Ids and text of an answer during which its runner is killed, once ``index`` tokens have come.

    On a busy machine the runner may have said all of it by then: such a kill hits nothing, and the next one counts.
    """
    victim: list[str] = []

    async def kill() -> None:
        name = world.runs[-1].current.instance.instance_id
        victim.append(name)
        await world.kill(name)

    for _ in range(MOST_TRIES):
        heard = await world.killed_at(index, kill, **fields)
        ids = world.ids_of_last()[0]
        await world.revive(victim.pop())
        if world.runs[-1].resumptions:
            return ids, heard.texts()[0]
    raise AssertionError(f"{MOST_TRIES} kills at token {index} came when the answer was there")


def gaps_of(engine: LlamaCppEngine, prompt: tuple[int, ...], ids: tuple[int, ...]) -> list[float]:
    """How far each token's logit lies below the best one, computed on exactly the tokens before it."""
    engine.begin(0, Sampling(temperature=0.0), prompt)
    gaps: list[float] = []
    row, start = prompt, 0
    for token in ids:
        engine.run(StepPlan(rows=(StepRow(slot=0, tokens=row, start=start, sample=True),)))
        logits = logits_of(engine, len(row) - 1)
        gaps.append(float(np.max(logits) - logits[token]))
        start += len(row)
        row = (token,)
    engine.end(0)
    engine.keep(0, 0)
    return gaps
