"""Models whose memory works in different ways: what each can reuse is found out, and what is reused is right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skulk.batching.operations import Share
from skulk.batching.step import StepPlan, StepRow
from skulk.engines.llama_cpp.engine import LlamaCppEngine
from skulk.engines.llama_cpp.memory import Span
from skulk.engines.llama_cpp.native import library
from skulk.errors import ServiceError
from tests.support.engine_play import EnginePlay, asked, assert_alike, logits_of, play_alone
from tests.support.engines import GREEDY, load_small
from tests.support.loaded import LoadedEngines
from tests.support.reuse_cases import ALL_CASES, CELLS, LAYOUTS, SETTINGS, Cases, run_case
from tests.support.tiny_models import ARCHITECTURES, story_of_numbers, write_tiny

CLOSE = 0.1
"""How far logits of the same text may be apart, of a standard deviation of 2; wrong states put them `FAR` apart."""
FAR = 0.5
WORDS = story_of_numbers()
ENGINES = tuple((name, layout) for name in ARCHITECTURES for layout in LAYOUTS)
LONG = ("preempted", "recomputed", "cancelled_aside")
SEVERAL = (("gemma3", "unified"), ("jamba", "unified"), ("mamba", "streams"))
SHARED = tuple((name, "unified") for name in ARCHITECTURES)


def name_of(value: object) -> str:
    return "-".join(value) if isinstance(value, tuple) else str(value)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {name: write_tiny(folder / f"{name}.gguf", name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def engines() -> Iterator[LoadedEngines]:
    with LoadedEngines() as engines:
        yield engines


@pytest.fixture
def engine(request: pytest.FixtureRequest, engines: LoadedEngines, files: dict[str, Path]) -> LlamaCppEngine:
    architecture, layout = request.param
    return engines.get(files[architecture], kv_cells=CELLS[layout], **SETTINGS)


@pytest.mark.parametrize("engine", ENGINES, indirect=True, ids=name_of)
def test_what_can_be_reused_is_found_out(engine: LlamaCppEngine) -> None:
    info = engine.info
    assert info.reuse == ("cut" if info.architecture == "llama" else "whole")
    assert info.shares_cells == (info.architecture != "gemma3")


@pytest.mark.parametrize(
    ("engine", "case"),
    [
        ((name, layout), case)
        for name, layout in ENGINES
        for of, case in ALL_CASES
        if of == layout and (case not in LONG or name in ("llama", "gemma3", "jamba"))
    ],
    indirect=["engine"],
    ids=name_of,
)
def test_what_is_reused_is_right(engine: LlamaCppEngine, case: str) -> None:
    run_case(Cases(engine, WORDS, close=CLOSE, gap=CLOSE), case)


@pytest.mark.parametrize("engine", SEVERAL, indirect=True, ids=name_of)
def test_whoever_comes_and_goes_says_what_it_says_alone(engine: LlamaCppEngine) -> None:
    """Seed 2 once found a chunk of gemma3's beside a decode row wrong; `tests/exhaustive` takes many seeds."""
    Cases(engine, WORDS, close=CLOSE, gap=CLOSE).at_random(2)


def test_a_state_comes_back_although_the_cache_is_full(engines: LoadedEngines, files: dict[str, Path]) -> None:
    """Seed 0 once asked for the beginning of a parked state, and the whole of it found no room."""
    engine = engines.get(files["llama"], kv_cells=CELLS["unified"], **SETTINGS)
    Cases(engine, WORDS, close=CLOSE, gap=CLOSE).at_random(0)


@pytest.mark.parametrize("engine", ENGINES, indirect=True, ids=name_of)
def test_host_memory_is_counted_in_full(engine: LlamaCppEngine) -> None:
    """A parked state is never larger than what the batch, and the placement, count for it."""
    play = EnginePlay(engine)
    play.add(asked("a", WORDS[:200], 50))
    while not play.state.is_idle:
        play.step()
        for seq in play.state.running:
            assert 0 < engine._memory.size(seq.slot) <= play.state.shape.parked_size(seq.computed)


@pytest.mark.parametrize("engine", SHARED, indirect=True, ids=name_of)
def test_a_state_that_is_cut_all_the_same_computes_something_else(engine: LlamaCppEngine) -> None:
    """Why it has to be found out: native code says yes to the cut, and mostly computes, but not what it should."""
    architecture = engine.info.architecture
    prompt, other = WORDS[:100], WORDS[100:300]
    # Behind the window nothing is missed; a short convolution forgets its wrong beginning soon.
    kept = 60 if architecture == "gemma3" else 98
    engine._memory.clear()
    for slot in range(3):
        engine.begin(slot, GREEDY, ())
    try:
        right = _logits_after(engine, 0, prompt, 0)
        _logits_after(engine, 2, other, 0)
        slot = 0 if architecture == "gemma3" else 1
        _cut_all_the_same(engine, slot, kept)
        is_good = engine._memory._span(slot) == Span(0, kept - 1)
        assert is_good == (architecture == "llama"), "positions tell"
        if architecture == "mamba":
            with pytest.raises(ServiceError, match="inconsistent sequence positions"):
                _logits_after(engine, slot, prompt[kept:], kept)
            return
        wrong = _logits_after(engine, slot, prompt[kept:], kept)
        apart = float(np.max(np.abs(wrong - right)))
        assert apart < CLOSE if architecture == "llama" else apart > FAR
    finally:
        for slot in range(3):
            engine.end(slot)


def _cut_all_the_same(engine: LlamaCppEngine, slot: int, kept: int) -> None:
    lib: Any = library()
    memory = engine._memory
    if slot:
        lib.llama_memory_seq_cp(memory._memory, 0, slot, 0, kept)
    else:
        assert lib.llama_memory_seq_rm(memory._memory, slot, kept, -1)
    memory._positions[slot] = kept


def _logits_after(engine: LlamaCppEngine, slot: int, tokens: tuple[int, ...], start: int) -> Any:
    engine.run(StepPlan(rows=(StepRow(slot=slot, tokens=tokens, start=start, sample=True),)))
    return logits_of(engine, engine._batch.native.n_tokens - 1)


def test_a_window_s_cache_does_not_fill_up(tmp_path: Path) -> None:
    """Two that go on from one beginning, each beyond its window, in a cache for two windows and a chunk."""
    path = write_tiny(tmp_path / "gemma3.gguf", "gemma3", attention__sliding_window=96)
    engine = load_small(path, n_parallel=2, context_length=512, kv_cells=768)
    try:
        requests = [asked(name, (*WORDS[:100], *WORDS[at : at + 3]), 120) for at, name in enumerate("ab")]
        played = EnginePlay(engine).add(*requests).play()
        assert (played.cached("b"), played.count(Share)) == (100, 1)
        assert played.most_cells >= 2 * (103 + 118), "each has cells of its own"
        assert_alike(played, play_alone(engine, *requests), close=CLOSE, gap=CLOSE)
    finally:
        engine.close()
