"""Batches played without an engine: a vocabulary of bytes, and a loop that draws what a test says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from skulk.batching.admission import BatchShape
from skulk.batching.apply import apply
from skulk.batching.operations import Begin, Operation
from skulk.batching.plan import StepBudget, budget_for, plan_step
from skulk.batching.rate import Rate, measured
from skulk.batching.requests import BatchRequest, Emitted, Ended, Output, RequestKey
from skulk.batching.schedule import schedule
from skulk.batching.state import BatchState
from skulk.batching.step import StepPlan, StepResult, StepRow
from skulk.engines.protocol import Engine
from skulk.runner.engine_thread import perform
from skulk.wire.generation import Sampling

END_TOKEN = 256

Draw = Callable[[BatchState, StepRow], int]


class ByteVocabulary:
    """Token b is the byte b; 256 is the end token."""

    def piece(self, token: int) -> bytes:
        return b"" if token == END_TOKEN else bytes([token])

    def is_end(self, token: int) -> bool:
        return token == END_TOKEN


VOCABULARY = ByteVocabulary()


def shape_of(
    *,
    n_ctx: int = 1024,
    n_parallel: int = 4,
    kv_cells: int | None = None,
    n_batch: int = 512,
    n_ubatch: int = 128,
    max_waiting: int = 8,
    **reuse: Any,
) -> BatchShape:
    """Streams whose tokens are of no use to others, unless told otherwise."""
    return BatchShape(
        n_ctx=n_ctx,
        kv_cells=kv_cells or n_ctx * n_parallel,
        n_parallel=n_parallel,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        max_waiting=max_waiting,
        vocabulary_size=END_TOKEN + 1,
        is_unified=kv_cells is not None and kv_cells < n_ctx * n_parallel,
        **reuse,
    )


def request_of(
    name: str = "a",
    *,
    prompt: int = 3,
    max_tokens: int = 4,
    stop: tuple[str, ...] = (),
    n: int = 1,
    arrived_at: float = 0.0,
    deadline: float = 1e9,
    ignore_eos: bool = False,
    emitted: bytes = b"",
    sent_characters: int = 0,
    prompt_ids: tuple[int, ...] = (),
    greedy: bool = False,
) -> BatchRequest:
    return BatchRequest(
        key=RequestKey(name, 1),
        prompt=prompt_ids or tuple(range(prompt)),
        sampling=Sampling(temperature=0.0 if greedy else None),
        max_tokens=max_tokens,
        stop=stop,
        n=n,
        arrived_at=arrived_at,
        deadline=deadline,
        ignore_eos=ignore_eos,
        emitted=tuple(emitted),
        sent_characters=sent_characters,
    )


def saying(text: str | bytes, *, end: bool = True) -> Draw:
    """Every sequence answers ``text``, then the end token (or the last byte for ever)."""
    tokens = [*(text.encode() if isinstance(text, str) else text), *([END_TOKEN] if end else [])]

    def draw(state: BatchState, row: StepRow) -> int:
        sequence = next(seq for seq in state.running if seq.slot == row.slot)
        return tokens[min(len(sequence.drawn), len(tokens) - 1)]

    return draw


def play_step(
    state: BatchState, draw: Draw, budget: StepBudget, now: float
) -> tuple[BatchState, StepPlan | None, tuple[Output, ...]]:
    """Starts what fits, plans, draws, applies."""
    started = schedule(state, now)
    plan = plan_step(started.state, budget)
    if plan is None:
        return started.state, None, started.outputs
    sampled = {row.slot: (draw(started.state, row),) for row in plan.rows if row.sample}
    changed = apply(started.state, plan, StepResult(sampled=sampled, elapsed_s=0.01), VOCABULARY, now)
    return changed.state, plan, (*started.outputs, *changed.outputs)


def play(state: BatchState, draw: Draw, *, prefill_tokens: int = 64, most: int = 10_000) -> list[Output]:
    """Steps until nothing is open; each step takes one second. All outputs in order."""
    outputs: list[Output] = []
    budget = StepBudget(tokens=state.shape.n_batch, prefill_tokens=prefill_tokens)
    for second in range(1, most):
        state, _, told = play_step(state, draw, budget, float(second))
        outputs.extend(told)
        if state.is_idle:
            return outputs
    raise AssertionError(f"still open after {most} steps: {state}")


def play_engine(state: BatchState, engine: Engine) -> list[Output]:
    """Runs a batch on an engine, on this thread, until nothing is open."""
    outputs: list[Output] = []
    rate = Rate()
    while not state.is_idle:
        scheduled = schedule(state, 0.0)
        follow(engine, scheduled.operations)
        plan = plan_step(scheduled.state, budget_for(scheduled.state, rate))
        assert plan is not None
        result = engine.run(plan)
        rate = measured(rate, plan, result.elapsed_s)
        changed = apply(scheduled.state, plan, result, engine, 0.0)
        follow(engine, changed.operations)
        state = changed.state
        outputs.extend(changed.outputs)
    return outputs


def follow(engine: Engine, operations: Iterable[Operation]) -> None:
    """Has an engine do what a batch asks of it."""
    for operation in operations:
        if isinstance(operation, Begin):
            sequence = operation.sequence
            history = sequence.known_tokens(0, sequence.known)
            engine.begin(
                sequence.slot,
                sequence.request.sampling,
                history,
                drawn=sequence.drawn.count,
                choice=sequence.choice,
                parked=operation.parked,
            )
        else:
            perform(engine, operation)


def text_of(outputs: list[Output], name: str = "a", choice: int = 0) -> str:
    return "".join(
        one.text for one in outputs if isinstance(one, Emitted) and one.key.request_id == name and one.choice == choice
    )


def ends_of(outputs: list[Output]) -> dict[str, list[Ended]]:
    ends: dict[str, list[Ended]] = {}
    for one in outputs:
        if isinstance(one, Ended):
            ends.setdefault(one.key.request_id, []).append(one)
    return ends
