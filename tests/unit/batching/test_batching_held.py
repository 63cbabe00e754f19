"""Which prompts' beginnings a batch still has: what a runner tells gateways must be there to be taken over."""

from __future__ import annotations

import msgspec

from skulk.batching.admission import Reuse
from skulk.batching.apply import apply
from skulk.batching.plan import budget_for, plan_step
from skulk.batching.rate import Rate
from skulk.batching.requests import BatchRequest
from skulk.batching.schedule import schedule
from skulk.batching.slots import add
from skulk.batching.state import BatchState, held_digests
from skulk.batching.step import StepResult
from tests.support.batches import VOCABULARY, request_of, shape_of

FAST = Rate(decode_s=0.001, prefill_s=((0.001,),))


def asked(name: str, begins: int, *digests: int) -> BatchRequest:
    prompt = tuple((begins * 31 + index * 7) % 199 for index in range(120))
    return msgspec.structs.replace(request_of(name, prompt_ids=prompt, max_tokens=2), digests=digests)


class Batch:
    def __init__(self, reuse: Reuse = "cut", *, n_parallel: int = 2, park_tokens: int = 10_000) -> None:
        shape = shape_of(reuse=reuse, n_parallel=n_parallel, park_bytes=park_tokens * 8, token_bytes=8)
        self.state = BatchState(shape=shape)
        self.now = 0.0

    def add(self, request: BatchRequest) -> None:
        self.state = add(self.state, request, VOCABULARY, self.now).state

    def step(self) -> bool:
        self.now += 1.0
        self.state = schedule(self.state, self.now).state
        plan = plan_step(self.state, budget_for(self.state, FAST))
        if plan is None:
            return False
        drawn = StepResult(sampled={row.slot: (65,) for row in plan.rows if row.sample}, elapsed_s=0.01)
        self.state = apply(self.state, plan, drawn, VOCABULARY, self.now).state
        return True

    def play(self, *requests: BatchRequest) -> None:
        for request in requests:
            self.add(request)
            while not self.state.is_idle:
                assert self.step()


def test_running_ones_and_what_lies_idle_count_the_newest_first() -> None:
    batch = Batch()
    batch.play(asked("a", 1, 11, 12))
    assert held_digests(batch.state) == (11, 12)
    batch.add(asked("b", 2, 21))
    assert held_digests(batch.state) == (11, 12), "what waits has computed nothing"
    batch.step()
    assert held_digests(batch.state) == (21, 11, 12)


def test_a_beginning_that_several_have_is_told_once() -> None:
    batch = Batch()
    batch.play(asked("a", 1, 11, 12), asked("b", 1, 11, 13))
    batch.add(asked("c", 1, 11, 14))
    batch.step()
    held = held_digests(batch.state)
    assert held[:2] == (11, 14)
    assert len(held) == len(set(held))


def test_what_was_evicted_is_told_only_while_it_is_parked() -> None:
    kept, dropped = Batch(n_parallel=1), Batch(n_parallel=1, park_tokens=0)
    for batch in (kept, dropped):
        batch.play(asked("a", 1, 11), asked("b", 2, 21))
    assert set(held_digests(kept.state)) == {11, 21}
    assert set(held_digests(dropped.state)) == {21}


def test_a_model_whose_tokens_are_of_no_use_to_others_tells_nothing() -> None:
    batch = Batch("none")
    batch.add(asked("a", 1, 11))
    batch.step()
    assert held_digests(batch.state) == ()
