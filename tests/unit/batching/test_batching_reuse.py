"""Cells taken over, shared, cut, moved, parked and yielded: every answer is the one it would be alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from skulk.batching.admission import BatchShape, Reuse
from skulk.batching.apply import apply
from skulk.batching.cells import NO_CELLS, beginning, count_used, grown
from skulk.batching.operations import Forget, Move, Operation, Park, Restore, Share
from skulk.batching.plan import budget_for, plan_step
from skulk.batching.rate import IDLE_SHARE, Rate, idle_limit
from skulk.batching.requests import BatchRequest, Emitted, Output
from skulk.batching.reuse import COPIED_PER_TOKEN, MIN_SHORT_REUSE, common_beginning
from skulk.batching.schedule import schedule
from skulk.batching.slots import add, end_request
from skulk.batching.state import MIN_REUSE, BatchState, Changed
from tests.support.batches import VOCABULARY, ends_of, request_of, shape_of
from tests.support.cell_engine import CellEngine, answer_to

FAST = Rate(decode_s=0.001, prefill_s=((0.001,),))
"""A hundred and more prompt tokens fit a step."""


class Table:
    """A batch with its engine, step by step. ``operations``: all that the engine was asked for."""

    def __init__(self, shape: BatchShape) -> None:
        self.state = BatchState(shape=shape)
        self.engine = CellEngine(shape)
        self.outputs: list[Output] = []
        self.operations: list[Operation] = []
        self.now = 0.0
        self.idle_limit: int | None = None

    def add(self, *requests: BatchRequest) -> None:
        for request in requests:
            self.state = add(self.state, request, VOCABULARY, self.now).state

    def end(self, name: str) -> None:
        self._fold(end_request(self.state, request_of(name).key, self.now))

    def step(self) -> bool:
        """One turn; False: nothing ran."""
        self.now += 1.0
        self._fold(schedule(self.state, self.now, idle_limit=self.idle_limit))
        plan = plan_step(self.state, budget_for(self.state, FAST))
        if plan is None:
            return False
        self._fold(apply(self.state, plan, self.engine.run(plan), VOCABULARY, self.now))
        return True

    def play(self, most: int = 3000) -> Table:
        for _ in range(most):
            if self.state.is_idle:
                return self
            assert self.step(), "something is open and nothing runs"
        raise AssertionError(f"still open after {most} steps: {self.state}")

    def _fold(self, changed: Changed) -> None:
        self.state = changed.state
        self.outputs.extend(changed.outputs)
        self.operations.extend(changed.operations)
        self.engine.do(changed.operations)
        self.engine.check(self.state)
        if self.state.shape.is_unified:
            held = (*(seq.cells for seq in self.state.running), *(idle.cells for idle in self.state.idle))
            assert count_used(held) == self.engine.used, "cells are counted as they are"

    def tokens(self, name: str, choice: int = 0) -> list[int]:
        emitted = (one for one in self.outputs if isinstance(one, Emitted))
        return [t for one in emitted if one.key.request_id == name and one.choice == choice for t in one.tokens]

    def cached(self, name: str) -> int:
        [end] = ends_of(self.outputs)[name]
        assert end.end.usage is not None
        return end.end.usage.cached_tokens

    def count(self, kind: type) -> int:
        return sum(isinstance(one, kind) for one in self.operations)


def table(*, reuse: Reuse = "cut", park_tokens: int = 10_000, **shape: int | None) -> Table:
    fields: dict[str, Any] = shape
    return Table(shape_of(reuse=reuse, park_bytes=park_tokens * 8, token_bytes=8, **fields))


def text(start: int, count: int) -> tuple[int, ...]:
    """Tokens that no other start has."""
    return tuple((start * 31 + index * 7) % 199 for index in range(count))


def asked(name: str, prompt: Sequence[int], max_tokens: int = 6, **changes: object) -> BatchRequest:
    request = request_of(name, prompt_ids=tuple(prompt), max_tokens=max_tokens)
    return msgspec.structs.replace(request, **changes)


SYSTEM = text(1, 200)


@pytest.mark.parametrize("cells", [None, 1400], ids=["streams", "unified"])
class TestSharing:
    def test_the_next_turn_computes_only_what_is_new(self, cells: int | None) -> None:
        played = table(kv_cells=cells)
        played.add(asked("first", SYSTEM))
        played.play()
        turn = (*SYSTEM, *played.tokens("first"), *text(2, 30))
        before = played.engine.computed
        played.add(asked("second", turn))
        played.play()
        assert played.tokens("second") == answer_to(turn, 6)
        assert played.cached("first") == 0
        assert played.cached("second") == 205, "the answer's last token was drawn and never computed"
        assert played.engine.computed - before == len(turn) - 205 + 5
        assert played.count(Share) == 0, "the slot itself goes on"

    def test_concurrent_requests_share_one_prefill_nobody_sent_before(self, cells: int | None) -> None:
        played = table(kv_cells=cells, n_parallel=4)
        prompts = {name: (*SYSTEM, *text(index, 20)) for index, name in enumerate("abcd")}
        played.add(*(asked(name, prompt) for name, prompt in prompts.items()))
        played.play()
        for name, prompt in prompts.items():
            assert played.tokens(name) == answer_to(prompt, 6)
        assert [played.cached(name) for name in "abcd"] == [0, 200, 200, 200]
        assert played.engine.computed == 200 + 4 * (20 + 5)

    def test_choices_compute_their_prompt_once(self, cells: int | None) -> None:
        played = table(kv_cells=cells, n_parallel=4)
        for name, prompt in (("short", text(3, 9)), ("long", text(4, 150))):
            before = played.engine.computed
            played.add(asked(name, prompt, n=4))
            played.play()
            for choice in range(4):
                assert played.tokens(name, choice) == answer_to(prompt, 6)
            assert played.engine.computed - before == len(prompt) + 3 + 4 * 5, "its last token again for each"
            assert played.cached(name) == 0

    def test_who_waits_for_a_prompt_keeps_its_place(self, cells: int | None) -> None:
        played = table(kv_cells=cells, n_parallel=3)
        played.add(asked("leader", text(5, 400)), asked("follower", (*text(5, 390), *text(6, 9))))
        played.add(asked("other", text(7, 30)), asked("late", text(8, 30)))
        played.step()
        running = [seq.request.key.request_id for seq in played.state.running]
        assert running == ["leader", "other"], "the third slot is the follower's"
        played.play()
        assert played.cached("follower") == 390
        firsts = [one.key.request_id for one in played.outputs if isinstance(one, Emitted)]
        assert firsts.index("follower") < firsts.index("late")

    def test_what_a_template_puts_before_every_prompt_is_computed_once(self, cells: int | None) -> None:
        played = table(kv_cells=cells)
        prompts = {name: (*text(1, 30), *text(index, 90)) for index, name in enumerate("abcdefghij", start=2)}
        for name, prompt in prompts.items():
            played.add(asked(name, prompt))
            played.play()
            assert played.tokens(name) == answer_to(prompt, 6)
        assert [played.cached(name) for name in prompts] == [0] + [30] * 9

    def test_a_few_tokens_are_not_worth_it(self, cells: int | None) -> None:
        played = table(kv_cells=cells)
        played.add(asked("a", text(1, MIN_SHORT_REUSE - 1) + text(2, 90)))
        played.play()
        played.add(asked("b", text(1, MIN_SHORT_REUSE - 1) + text(3, 90)))
        played.play()
        assert played.cached("b") == 0

    def test_a_short_beginning_of_a_long_state_is_shared_but_never_copied(self, cells: int | None) -> None:
        played = table(kv_cells=cells)
        played.add(asked("a", text(1, 30) + text(2, 30 * COPIED_PER_TOKEN)))
        played.play()
        played.add(asked("b", text(1, 30) + text(3, 90)))
        played.play()
        assert played.cached("b") == (0 if cells is None else 30)

    def test_a_short_beginning_does_not_cost_the_long_text_it_was_taken_of(self, cells: int | None) -> None:
        played = table(kv_cells=cells, n_parallel=2)
        talk = text(1, 300)
        played.add(asked("a", talk))
        played.play()
        for number in range(4):
            played.add(asked(f"b{number}", talk[:30] + text(3 + number, 90)), asked(f"c{number}", text(9 + number, 90)))
            played.play()
        played.add(asked("again", talk))
        played.play()
        assert played.cached("again") == len(talk) - 1

    def test_a_cancelled_prompt_is_not_lost(self, cells: int | None) -> None:
        played = table(kv_cells=cells)
        prompt = text(9, 500)
        played.add(asked("a", prompt))
        played.step()
        played.step()
        done = played.state.running[0].computed
        assert done >= MIN_REUSE
        played.end("a")
        played.add(asked("b", prompt))
        played.play()
        assert played.cached("b") == done
        assert played.tokens("b") == answer_to(prompt, 6)


class TestUnified:
    def test_the_newest_yields_and_goes_on_where_it_was(self) -> None:
        played = table(n_ctx=400, kv_cells=400, n_parallel=2)
        prompts = {"old": text(1, 120), "new": text(2, 120)}
        played.add(*(asked(name, prompt, 200) for name, prompt in prompts.items()))
        played.play()
        for name, prompt in prompts.items():
            assert played.tokens(name) == answer_to(prompt, 200)
        parks = [one for one in played.operations if isinstance(one, Park)]
        restores = [one for one in played.operations if isinstance(one, Restore)]
        assert len(parks) >= 1
        assert [one.parked for one in restores] == [parks[0].parked]
        assert played.engine.computed == 2 * (120 + 199), "nothing was computed again"

    def test_without_host_memory_it_is_computed_again(self) -> None:
        played = table(n_ctx=400, kv_cells=400, n_parallel=2, park_tokens=0)
        prompts = {"old": text(1, 120), "new": text(2, 120)}
        played.add(*(asked(name, prompt, 200) for name, prompt in prompts.items()))
        played.play()
        for name, prompt in prompts.items():
            assert played.tokens(name) == answer_to(prompt, 200)
            assert [one.end.reason for one in ends_of(played.outputs)[name]] == ["length"]
        assert played.engine.computed > 2 * (120 + 199)
        assert played.cached("new") == 0

    def test_a_cancel_of_one_that_yielded_frees_what_was_parked(self) -> None:
        played = table(n_ctx=400, kv_cells=400, n_parallel=2)
        played.add(asked("old", text(1, 120), 200), asked("new", text(2, 120), 200))
        while not any(seq.parked for seq in played.state.waiting):
            played.step()
        played.end("new")
        assert played.state.parked == ()
        assert played.engine.aside == {}
        assert isinstance(played.operations[-1], Forget)
        played.play()

    def test_idle_cells_are_parked_beyond_their_share_and_come_back(self) -> None:
        played = table(n_ctx=1024, kv_cells=2048, n_parallel=3)
        prompt = text(1, 300)
        played.add(asked("a", prompt))
        played.play()
        played.idle_limit = 100
        played.add(asked("b", text(2, 50), 40))
        assert [len(idle.tokens) for idle in played.state.idle] == [305]
        played.step()
        assert played.state.idle == ()
        assert [len(parked.tokens) for parked in played.state.parked] == [305]
        played.add(asked("c", (*prompt, *text(3, 5))))
        played.play()
        assert played.cached("c") == 300
        assert played.tokens("c") == answer_to((*prompt, *text(3, 5)), 6)

    def test_the_limit_follows_what_a_cell_costs(self) -> None:
        rate = Rate(decode_s=0.010)
        assert idle_limit(rate, cell_s=1e-6, rows=4) == pytest.approx(IDLE_SHARE * 0.010 / 4e-6, abs=1)
        assert idle_limit(rate, cell_s=0.0, rows=4) is None
        assert idle_limit(rate, cell_s=1e-6, rows=0) is None
        assert idle_limit(Rate(), cell_s=1e-6, rows=4) is None

    def test_a_parked_state_comes_back_whole_or_not_at_all(self) -> None:
        """Only the beginning of it is wanted, but for a moment all of it needs cells."""
        played = table(n_ctx=400, kv_cells=400, n_parallel=3)
        played.add(asked("first", text(1, 300)))
        played.play()
        played.idle_limit = 0
        played.add(asked("second", text(2, 150), 40))
        played.step()
        assert [len(parked.tokens) for parked in played.state.parked] == [305]
        played.add(asked("third", (*text(1, 100), *text(3, 5))))
        played.play()
        assert played.cached("third") == 0
        assert played.tokens("third") == answer_to((*text(1, 100), *text(3, 5)), 6)
        played.add(asked("fourth", (*text(1, 250), *text(4, 5))))
        played.play()
        assert played.cached("fourth") == 250

    def test_where_cells_cannot_be_shared_they_are_copied_into_others(self) -> None:
        """A fork fills as many cells again, so fewer sequences run side by side; none fails."""
        played = table(n_ctx=400, kv_cells=600, n_parallel=3, reuse="whole", shares_cells=False)
        prompts = {name: (*text(1, 150), *text(index, 20)) for index, name in enumerate("abc")}
        played.add(*(asked(name, prompt, 100) for name, prompt in prompts.items()))
        played.play()
        assert [played.cached(name) for name in "abc"] == [0, 150, 150]
        for name, prompt in prompts.items():
            assert played.tokens(name) == answer_to(prompt, 100)

    def test_a_copy_that_finds_no_room_beside_its_source_takes_its_place(self) -> None:
        played = table(n_ctx=400, kv_cells=400, n_parallel=3, reuse="whole", shares_cells=False)
        played.add(asked("first", text(1, 250)))
        played.play()
        turn = (*text(1, 250), *played.tokens("first"), *text(2, 30))
        played.add(asked("second", turn))
        played.play()
        assert played.cached("second") == 255
        assert played.count(Share) == 0
        assert played.tokens("second") == answer_to(turn, 6)


class TestStreams:
    def test_running_streams_stay_neighbours(self) -> None:
        played = table(n_parallel=4)
        lengths = {"a": 30, "b": 5, "c": 30, "d": 5}
        played.add(*(asked(name, text(index, 80), lengths[name]) for index, name in enumerate(lengths)))
        played.play()
        moves = [(one.source, one.slot) for one in played.operations if isinstance(one, Move)]
        assert moves == [(3, 1), (2, 1)], "d goes where b was; when d has ended, c does"
        for index, name in enumerate(lengths):
            assert played.tokens(name) == answer_to(text(index, 80), lengths[name])

    def test_what_lay_in_a_hole_is_parked(self) -> None:
        played = table(n_parallel=3)
        played.add(*(asked(name, text(index, 80), 3 if name == "b" else 30) for index, name in enumerate("abc")))
        played.play()
        assert played.count(Move) == 1
        played.add(asked("again", (*text(1, 80), *text(9, 4))))
        played.play()
        assert played.cached("again") == 80


@pytest.mark.parametrize("cells", [None, 1400], ids=["streams", "unified"])
class TestWholeStates:
    """Models whose states can't be cut: what is wanted has to be kept at its very place."""

    def test_the_next_turn_goes_on_from_the_whole_state(self, cells: int | None) -> None:
        played = table(reuse="whole", kv_cells=cells)
        played.add(asked("first", SYSTEM))
        played.play()
        turn = (*SYSTEM, *played.tokens("first"), *text(2, 30))
        played.add(asked("second", turn))
        played.play()
        assert played.cached("second") == 205
        assert played.tokens("second") == answer_to(turn, 6)

    def test_another_turn_after_the_same_beginning_takes_the_border(self, cells: int | None) -> None:
        played = table(reuse="whole", kv_cells=cells)
        first, second = (*SYSTEM, *text(2, 30)), (*SYSTEM, *text(3, 30))
        played.add(asked("first", first, border=200))
        played.play()
        played.add(asked("second", second, border=200))
        played.play()
        assert played.cached("second") == 200
        assert (played.tokens("first"), played.tokens("second")) == (answer_to(first, 6), answer_to(second, 6))

    def test_concurrent_requests_share_what_nobody_marked(self, cells: int | None) -> None:
        played = table(reuse="whole", kv_cells=cells, n_parallel=4)
        prompts = {name: (*SYSTEM, *text(index, 20)) for index, name in enumerate("abcd")}
        played.add(*(asked(name, prompt) for name, prompt in prompts.items()))
        played.play()
        assert [played.cached(name) for name in "abcd"] == [0, 200, 200, 200]
        for name, prompt in prompts.items():
            assert played.tokens(name) == answer_to(prompt, 6)

    def test_choices_fork_without_host_memory(self, cells: int | None) -> None:
        played = table(reuse="whole", kv_cells=cells, n_parallel=4, park_tokens=0)
        prompt = text(4, 150)
        played.add(asked("a", prompt, n=4))
        played.play()
        for choice in range(4):
            assert played.tokens("a", choice) == answer_to(prompt, 6)
        assert played.engine.computed == len(prompt) + 3 + 4 * 5


def test_models_without_memory_of_use_compute_everything() -> None:
    played = table(reuse="none")
    played.add(asked("a", SYSTEM), asked("b", SYSTEM))
    played.play()
    assert played.engine.computed == 2 * (200 + 5)


@given(st.lists(st.integers(0, 3), max_size=300), st.lists(st.integers(0, 3), max_size=300), st.integers(0, 300))
def test_the_common_beginning(first: list[int], second: list[int], shared: int) -> None:
    one, other = tuple(first), (*first[:shared], *second)
    expected = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    assert common_beginning(one, other) == (min(len(one), len(other)) if expected is None else expected)


@given(st.lists(st.tuples(st.sampled_from(["grow", "take", "keep", "drop"]), st.integers(0, 3), st.integers(0, 9))))
def test_cells_are_counted_as_they_are(events: list[tuple[str, int, int]]) -> None:
    """Against cells that are objects."""
    counted = [NO_CELLS] * 4
    real: list[list[object]] = [[] for _ in range(4)]
    for fresh, (what, holder, number) in enumerate(events):
        match what:
            case "grow":
                counted[holder] = grown(counted[holder], number, fresh)
                real[holder] = [*real[holder], *(object() for _ in range(number))]
            case "take":
                source = (holder + 1) % 4
                counted[holder] = beginning(counted[source], number)
                real[holder] = real[source][:number]
            case "keep":
                counted[holder] = beginning(counted[holder], number)
                real[holder] = real[holder][:number]
            case _:
                counted[holder], real[holder] = NO_CELLS, []
        assert count_used(counted) == len({id(cell) for cells in real for cell in cells})


PROMPTS = st.lists(
    st.tuples(
        st.integers(0, 2),  # which beginning
        st.integers(0, 180),  # how much of it
        st.integers(0, 60),  # own tokens behind it
        st.integers(1, 60),  # max_tokens
        st.integers(1, 3),  # n
        st.integers(0, 40),  # arrives at step
        st.one_of(st.none(), st.integers(0, 60)),  # cancelled at step
    ),
    min_size=1,
    max_size=9,
)


@settings(deadline=None, max_examples=150)
@given(
    PROMPTS,
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from(["cut", "whole", "none"]),
    st.integers(0, 500),
    st.booleans(),
)
@example([(0, 180, 30, 60, 1, 0, None), (0, 180, 20, 60, 3, 1, None), (1, 90, 9, 60, 2, 2, 20)], 3, 0, "cut", 100, True)
@example([(0, 180, 30, 60, 1, 0, None), (0, 180, 20, 60, 1, 40, None)], 3, 0, "whole", 0, False)
def test_every_answer_is_the_one_alone(
    prompts: list[tuple[int, int, int, int, int, int, int | None]],
    n_parallel: int,
    spare: int,
    reuse: Reuse,
    park_tokens: int,
    shares_cells: bool,
) -> None:
    """Random arrivals, cancels, beginnings in common, in caches that are too small for all: nobody fails or starves."""
    n_ctx = 320
    cells = n_ctx + spare * 130
    played = table(
        reuse=reuse,
        shares_cells=shares_cells,
        park_tokens=park_tokens,
        n_ctx=n_ctx,
        n_parallel=n_parallel,
        max_waiting=100,
        **({"kv_cells": cells} if cells < n_ctx * n_parallel else {}),
    )
    played.idle_limit = 50 * spare
    requests: list[BatchRequest] = []
    for index, (which, shared, own, max_tokens, n, _, _) in enumerate(prompts):
        prompt = (*text(which, shared), *text(index + 10, own)) or (1,)
        border = shared if shared < len(prompt) else 0
        requests.append(asked(str(index), prompt, max_tokens, n=n, border=border))
    for step in range(3000):
        for request, (*_, at, cancel_at) in zip(requests, prompts, strict=True):
            if at == step:
                played.add(request)
            if cancel_at == step and at <= step:
                played.end(request.key.request_id)
        if not played.step() and step > 60 and played.state.is_idle:
            break
    assert played.state.is_idle
    for request, (*_, cancel_at) in zip(requests, prompts, strict=True):
        ends = ends_of(played.outputs).get(request.key.request_id, [])
        assert len(ends) == 1
        expected = answer_to(request.prompt, request.max_tokens)
        for choice in range(request.n):
            drawn = played.tokens(request.key.request_id, choice)
            assert drawn == expected[: len(drawn)]
            assert cancel_at is not None or len(drawn) == request.max_tokens
        if cancel_at is None:
            assert ends[0].end.reason == "length"
