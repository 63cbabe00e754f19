"""Steps an engine by hand, and loads the real one small: one thread, short windows, quick warm-up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skulk.batching.step import StepPlan, StepRow
from skulk.engines.llama_cpp.engine import LlamaCppEngine
from skulk.engines.llama_cpp.loader import load
from skulk.engines.protocol import Engine, LoadSpec
from skulk.wire.generation import Sampling
from tests.support.gguf import embedded_model

GREEDY = Sampling(temperature=0.0)


def small_spec(path: Path | None = None, **changes: Any) -> LoadSpec:
    """The embedded model, or another, in a window of 256 tokens for each of two slots."""
    fields: dict[str, Any] = {
        "path": str(path or embedded_model()),
        "backend": "llama_cpp-cpu",
        "context_length": 256,
        "n_parallel": 2,
        "kv_cells": 512,
        "n_ubatch": 64,
        "n_threads": 1,
    }
    return LoadSpec(**(fields | changes))


def load_small(path: Path | None = None, **changes: Any) -> LlamaCppEngine:
    engine = load(small_spec(path, **changes), lambda _: True)
    assert isinstance(engine, LlamaCppEngine)
    return engine


class Stepper:
    """Several requests on one engine, as a runner would step them; tokens are kept by slot."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tokens: dict[int, list[int]] = {}
        self._next: dict[int, tuple[int, ...]] = {}
        self._position: dict[int, int] = {}

    def begin(self, slot: int, prompt: Sequence[int], sampling: Sampling = GREEDY, *, choice: int = 0) -> None:
        self.engine.begin(slot, sampling, prompt, choice=choice)
        self.tokens[slot] = []
        self._next[slot] = tuple(prompt)
        self._position[slot] = 0

    def step(self, steps: int = 1) -> None:
        """One step of all open slots: decode rows first. Or a run of so many, at most."""
        order = sorted(self._next, key=lambda slot: (len(self._next[slot]) > 1, slot))
        rows = tuple(
            StepRow(slot=slot, tokens=self._next[slot], start=self._position[slot], sample=True) for slot in order
        )
        result = self.engine.run(StepPlan(rows=rows, steps=steps))
        assert set(result.sampled) == set(order) and result.elapsed_s > 0
        for row in rows:
            tokens = result.sampled[row.slot]
            assert len(tokens) == result.steps <= steps
            self._position[row.slot] += result.computed(row)
            self._next[row.slot] = tokens[-1:]
            self.tokens[row.slot] += tokens

    def end(self, slot: int) -> None:
        self.engine.end(slot)
        self.engine.keep(slot, 0)
        del self._next[slot], self._position[slot]


def generate(
    engine: Engine, prompt: Sequence[int], count: int, sampling: Sampling = GREEDY, *, slot: int = 0, choice: int = 0
) -> list[int]:
    """``count`` tokens, or fewer up to and with the end token."""
    stepper = Stepper(engine)
    stepper.begin(slot, prompt, sampling, choice=choice)
    try:
        while len(stepper.tokens[slot]) < count:
            stepper.step()
            if engine.is_end(stepper.tokens[slot][-1]):
                break
    finally:
        stepper.end(slot)
    return stepper.tokens[slot]


def text_of(engine: Engine, tokens: Sequence[int]) -> str:
    return b"".join(engine.piece(token) for token in tokens).decode()
