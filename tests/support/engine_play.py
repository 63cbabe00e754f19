"""A batch played on a real engine, step by step as the engine thread does it, on this thread and without a clock.

After every step, what the batch believes of slots, cells and host memory is compared with what llama.cpp tells.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any, Final, NamedTuple
from unittest.mock import patch

import msgspec
import numpy as np
from numpy.typing import NDArray

from skulk.batching.admission import BatchShape, Reuse
from skulk.batching.apply import apply
from skulk.batching.cells import count_used
from skulk.batching.operations import Operation
from skulk.batching.plan import budget_for, plan_step
from skulk.batching.rate import Rate
from skulk.batching.requests import BatchRequest, Emitted, Output
from skulk.batching.schedule import schedule
from skulk.batching.slots import add, end_request
from skulk.batching.state import BatchState, Changed
from skulk.batching.step import StepPlan, StepResult, StepRow
from skulk.engines.llama_cpp.engine import LlamaCppEngine
from skulk.engines.llama_cpp.native import library
from skulk.runner.runner import shape_of as runners_shape
from tests.support.batches import ends_of, follow, request_of
from tests.support.runners import spec_of

FAST: Final = Rate(decode_s=0.001, prefill_s=((0.001,),))
"""A rate that isn't measured, so that the same test makes the same chunks on any machine: ``n_ubatch`` each."""
PARK_BYTES: Final = 64 * 1024 * 1024
WATCHED: Final = 256
"""Logits that are kept of each drawn token: those of the first tokens of the vocabulary."""


class Drawn(NamedTuple):
    """A drawn token; by how much its logit was above the next best; the first `WATCHED` logits."""

    token: int
    gap: float
    logits: NDArray[np.float32]


def asked(name: str, prompt: Iterable[int], max_tokens: int = 6, **changes: object) -> BatchRequest:
    """A greedy request that goes on to ``max_tokens`` whatever the model says."""
    request = request_of(name, prompt_ids=tuple(prompt), max_tokens=max_tokens, ignore_eos=True, greedy=True)
    return msgspec.structs.replace(request, **changes)


def shape_of(engine: LlamaCppEngine, *, park_bytes: int = PARK_BYTES, reuse: Reuse | None = None) -> BatchShape:
    """What a runner makes of the engine, with other reuse where that is given."""
    info = engine.info
    shape = runners_shape(info, spec_of("", n_ubatch=engine._layout.n_ubatch, park_bytes=park_bytes, max_waiting=64))
    return shape if reuse is None else msgspec.structs.replace(shape, reuse=reuse)


class EnginePlay:
    """See the module. What was open on the engine is ended, what its cells hold is forgotten.

    Attributes:
        computed: tokens that the engine computed.
        most_cells: of a unified cache, in use at once.
        idle_limit: see `schedule`.
        runs: whether a step may be a run of several.
    """

    def __init__(self, engine: LlamaCppEngine, *, reuse: Reuse | None = None, park_bytes: int = PARK_BYTES) -> None:
        for slot in tuple(engine._chains):
            engine.end(slot)
        for parked in tuple(engine._aside):
            engine.forget(parked)
        engine._memory.clear()
        self.engine = engine
        self.state = BatchState(shape=shape_of(engine, park_bytes=park_bytes, reuse=reuse))
        self.outputs: list[Output] = []
        self.operations: list[Operation] = []
        self.drawn: dict[tuple[str, int], list[Drawn]] = {}
        self.computed = 0
        self.most_cells = 0
        self.now = 0.0
        self.idle_limit: int | None = None
        self.runs = False

    def add(self, *requests: BatchRequest) -> EnginePlay:
        for request in requests:
            self._fold(add(self.state, request, self.engine, self.now))
        return self

    def end(self, name: str) -> None:
        self._fold(end_request(self.state, request_of(name).key, self.now))

    def step(self) -> None:
        self.now += 1.0
        self._fold(schedule(self.state, self.now, idle_limit=self.idle_limit))
        budget = budget_for(self.state, FAST)
        plan = plan_step(self.state, budget if self.runs else msgspec.structs.replace(budget, steps=1))
        assert plan is not None, "something is open and nothing runs"
        result = self._run(plan)
        self.computed += sum(map(result.computed, plan.rows))
        self._fold(apply(self.state, plan, result, self.engine, self.now))

    def play(self) -> EnginePlay:
        while not self.state.is_idle:
            self.step()
        return self

    # What came of it

    def tokens(self, name: str, choice: int = 0) -> list[int]:
        emitted = (one for one in self.outputs if isinstance(one, Emitted))
        return [t for one in emitted if one.key.request_id == name and one.choice == choice for t in one.tokens]

    def cached(self, name: str) -> int:
        [end] = ends_of(self.outputs)[name]
        assert end.end.usage is not None
        return end.end.usage.cached_tokens

    def reason(self, name: str) -> str:
        [end] = ends_of(self.outputs)[name]
        return end.end.reason

    def count(self, kind: type) -> int:
        return sum(isinstance(one, kind) for one in self.operations)

    # The step

    def _run(self, plan: StepPlan) -> StepResult:
        """Runs a step and keeps the logits that were drawn from."""
        engine = self.engine
        fill, decode = engine._batch.fill, engine._decode
        outputs: dict[int, int] = {}
        seen: dict[int, list[NDArray[np.float32]]] = {}

        def filled(rows: tuple[StepRow, ...]) -> dict[int, int]:
            outputs.clear()
            outputs.update(fill(rows))
            return dict(outputs)

        def decoded() -> None:
            decode()
            for slot, index in outputs.items():
                seen.setdefault(slot, []).append(logits_of(engine, index))

        with patch.object(engine._batch, "fill", filled), patch.object(engine, "_decode", decoded):
            result = engine.run(plan)
        for seq in self.state.running:
            if seq.slot in seen:
                drawn = self.drawn.setdefault((seq.request.key.request_id, seq.choice), [])
                drawn += map(_drawn, result.sampled[seq.slot], seen[seq.slot])
        return result

    def _fold(self, changed: Changed) -> None:
        self.state = changed.state
        self.outputs.extend(changed.outputs)
        self.operations.extend(changed.operations)
        follow(self.engine, changed.operations)
        self._check()

    def _check(self) -> None:
        """What the batch believes is what llama.cpp holds."""
        memory = self.engine._memory
        believed = {seq.slot: seq.computed for seq in self.state.running}
        believed |= {idle.slot: len(idle.tokens) for idle in self.state.idle}
        for slot in range(self.state.shape.n_parallel):
            count = believed.get(slot, 0)
            assert memory.position(slot) == count, f"slot {slot}"
            assert memory._span(slot).last == count - 1, f"slot {slot}"
        assert set(self.engine._chains) == {seq.slot for seq in self.state.running}
        sizes = {parked.id: parked.size_bytes for parked in self.state.parked}
        assert set(sizes) == set(memory._parked)
        for parked, state in memory._parked.items():
            assert len(state.data) <= sizes[parked], "host memory is counted short"
        if self.state.shape.is_unified:
            held = (*(seq.cells for seq in self.state.running), *(idle.cells for idle in self.state.idle))
            self.most_cells = max(self.most_cells, count_used(held))


def logits_of(engine: LlamaCppEngine, index: int) -> NDArray[np.float32]:
    """A copy of the logits of a row of the last call: (n_vocab,) float32."""
    lib: Any = library()
    pointer = lib.llama_get_logits_ith(engine._handle(), index)
    size = engine.info.vocabulary_size
    return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (size,)).copy()


def _drawn(token: int, logits: NDArray[np.float32]) -> Drawn:
    second, best = np.partition(logits, -2)[-2:]
    return Drawn(token, float(best - second), logits[:WATCHED].copy())


def play_alone(engine: LlamaCppEngine, *requests: BatchRequest) -> EnginePlay:
    """Each request after the one before has ended, everything computed."""
    alone = EnginePlay(engine, reuse="none")
    for request in requests:
        alone.add(request).play()
    return alone


def assert_alike(played: EnginePlay, alone: EnginePlay, *, close: float = 0.0, gap: float = 0.0) -> None:
    """The texts are the same ones, or first differ where two tokens were about as likely.

    Args:
        played: with reuse, and beside others.
        alone: the same requests, alone.
        close: how far logits may be apart while the texts are the same.
        gap: a text may differ from where the two best logits of the one alone lie within this.
    """
    assert played.drawn.keys() == alone.drawn.keys()
    for name, expected in alone.drawn.items():
        for at, (one, other) in enumerate(zip(played.drawn[name], expected, strict=True)):
            if one.token != other.token:
                assert other.gap <= gap, f"{name} differs at token {at}, where the best was {other.gap:.3f} ahead"
                break
            apart = float(np.max(np.abs(one.logits - other.logits)))
            assert apart <= close, f"{name}: logits of token {at} are {apart:.3g} apart"
