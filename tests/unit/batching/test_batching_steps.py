"""Requests from the queue to their end, step by step."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skulk.batching.apply import apply
from skulk.batching.operations import Begin, End, Keep
from skulk.batching.plan import MAX_PASSED, StepBudget, budget_for, plan_step
from skulk.batching.rate import CHUNK_UNIT, MAX_RUN, STEP_CROWDED_S, Rate
from skulk.batching.requests import BatchRequest, Emitted, Ended, Output, Progressed
from skulk.batching.schedule import schedule
from skulk.batching.slots import add, end_all, end_request, expire
from skulk.batching.state import BatchState
from skulk.batching.step import StepPlan, StepResult, StepRow
from skulk.wire.base import ErrorBody
from skulk.wire.generation import ResumedChoice, Timings, Usage
from tests.support.batches import (
    END_TOKEN,
    VOCABULARY,
    Draw,
    ends_of,
    play,
    play_step,
    request_of,
    saying,
    shape_of,
    text_of,
)


def batch(*requests: BatchRequest, **shape: int) -> BatchState:
    state = BatchState(shape=shape_of(**shape))
    for request in requests:
        state = add(state, request, VOCABULARY, 0.0).state
    return state


def test_one_request_from_its_prompt_to_its_end() -> None:
    outputs = play(batch(request_of(prompt=100, max_tokens=20)), saying("hé"))
    assert text_of(outputs) == "hé"
    assert [(one.phase, one.processed, one.total) for one in outputs if isinstance(one, Progressed)] == [
        ("prefill", 0, 100),
        ("prefill", 64, 100),
        ("decode", 100, 100),
    ]
    last_text, end = outputs[-2:]
    assert isinstance(last_text, Emitted)
    assert last_text.finish_reason == "stop"
    assert last_text.tokens == (END_TOKEN,)
    assert isinstance(end, Ended)
    assert end.end.reason == "stop"
    assert end.end.usage == Usage(prompt_tokens=100, completion_tokens=4)
    assert end.end.timings == Timings(queue_s=1.0, prefill_s=1.0, decode_s=3.0, prefill_tps=100.0, decode_tps=1.0)


def test_the_limit_ends_with_length_and_what_was_held_goes_out() -> None:
    outputs = play(batch(request_of(max_tokens=3, stop=("bcd",))), saying("abc", end=False))
    assert text_of(outputs) == "abc"
    assert ends_of(outputs)["a"][0].end.reason == "length"


def test_a_character_cut_by_the_limit_is_replaced() -> None:
    assert text_of(play(batch(request_of(max_tokens=3)), saying("a日"))) == "a\ufffd"


def test_a_stop_string_over_token_borders_ends_and_is_no_text() -> None:
    outputs = play(batch(request_of(max_tokens=30, stop=("###", "User:"))), saying("Hi!\n## #Us Use User: more"))
    assert text_of(outputs) == "Hi!\n## #Us Use "
    assert ends_of(outputs)["a"][0].end.reason == "stop"


def test_text_held_for_a_stop_goes_out_with_the_end_token() -> None:
    assert text_of(play(batch(request_of(max_tokens=30, stop=("###",))), saying("yes##"))) == "yes##"


def test_ignore_eos_goes_on_to_the_limit() -> None:
    outputs = play(batch(request_of(max_tokens=5, ignore_eos=True)), saying("ab"))
    assert ends_of(outputs)["a"][0].end.usage == Usage(prompt_tokens=3, completion_tokens=5)
    assert ends_of(outputs)["a"][0].end.reason == "length"


def test_decode_rows_come_first_and_prompts_follow_in_their_order() -> None:
    budget = StepBudget(tokens=512, prefill_tokens=64)
    state, _, _ = play_step(batch(request_of("a")), saying("aaaa"), budget, 1.0)
    for name, prompt in (("b", 100), ("c", 100)):
        state = add(state, request_of(name, prompt=prompt), VOCABULARY, 1.0).state
    plans: list[list[tuple[int, int, bool]]] = []
    for _ in range(2):
        state, plan, _ = play_step(state, saying("aaaa"), budget, 2.0)
        assert plan is not None
        plans.append([(row.slot, len(row.tokens), row.sample) for row in plan.rows])
    assert plans == [
        [(0, 1, True), (1, 64, False)],
        [(0, 1, True), (1, 36, True), (2, 28, False)],
    ]


def test_who_is_done_does_not_wait_for_a_part_of_the_next_prompt() -> None:
    state = batch()
    for name, prompt in (("a", 100), ("b", 20), ("c", 100), ("d", 20)):
        state = add(state, request_of(name, prompt=prompt), VOCABULARY, 1.0).state
    plan = play_step(state, saying("aaaa"), StepBudget(tokens=512, prefill_tokens=150), 1.0)[1]
    assert plan is not None
    assert [(row.slot, len(row.tokens), row.sample) for row in plan.rows] == [(0, 100, True), (1, 20, True)]


def test_the_oldest_prompt_gets_what_those_that_pass_it_leave() -> None:
    state = batch()
    for name, prompt in (("long", 400), ("short", 80)):
        state = add(state, request_of(name, prompt=prompt), VOCABULARY, 1.0).state
    plan = play_step(state, saying("aaaa"), StepBudget(tokens=512, prefill_tokens=128), 1.0)[1]
    assert plan is not None
    assert [(row.slot, len(row.tokens), row.sample) for row in plan.rows] == [(1, 80, True), (0, 48, False)]


def test_a_short_prompt_passes_a_long_one_four_times() -> None:
    budget = StepBudget(tokens=512, prefill_tokens=64)
    state = batch(request_of("long", prompt=400), n_parallel=8, max_waiting=64)
    firsts: list[str] = []
    for step in range(8):
        state = add(state, request_of(f"short {step}", prompt=20, max_tokens=9), VOCABULARY, 1.0).state
        state, plan, _ = play_step(state, saying("x"), budget, 2.0)
        assert plan is not None
        slots = {seq.slot: seq.request.key.request_id for seq in state.running}
        prefill = [slots[row.slot] for row in plan.rows if len(row.tokens) > 1]
        firsts.append(prefill[0].split()[0])
        assert sum(len(row.tokens) for row in plan.rows if len(row.tokens) > 1) <= 64
    assert firsts == ["short"] * 4 + ["long"] * 4
    assert max(seq.passed for seq in state.running) == 4


def test_choices_of_one_request_end_it_once() -> None:
    outputs = play(batch(request_of(n=3, max_tokens=9), n_parallel=2), saying("xyz"))
    assert [text_of(outputs, "a", choice) for choice in range(3)] == ["xyz"] * 3
    assert [end.end.usage for end in ends_of(outputs)["a"]] == [Usage(prompt_tokens=3, completion_tokens=12)]
    assert isinstance(outputs[-1], Ended)


def test_the_lowest_free_slot_is_taken() -> None:
    state = schedule(batch(*(request_of(name) for name in "abc")), 1.0).state
    state = end_request(state, request_of("b").key, 1.0).state
    state = add(state, request_of("d"), VOCABULARY, 1.0).state
    started = schedule(state, 2.0)
    assert [one.sequence.slot for one in started.operations if isinstance(one, Begin)] == [1]
    assert {seq.request.key.request_id: seq.slot for seq in started.state.running} == {"a": 0, "c": 2, "d": 1}


def test_a_prompt_waits_for_cells_and_those_behind_it_wait_too() -> None:
    state = batch(
        request_of("a", prompt=60, max_tokens=40),
        request_of("b", prompt=60, max_tokens=40),
        request_of("c", prompt=1, max_tokens=1),
        n_ctx=100,
        kv_cells=150,
    )
    started = schedule(state, 1.0)
    assert [seq.request.key.request_id for seq in started.state.running] == ["a"], "b waits for cells, c behind b"
    assert set(ends_of(play(state, saying("ok")))) == {"a", "b", "c"}


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["queued", "prefill", "decode"])
def test_a_request_ended_from_outside_leaves_no_trace(steps: int) -> None:
    state = batch(request_of("a", prompt=100, max_tokens=50), request_of("b"))
    budget = StepBudget(tokens=512, prefill_tokens=64)
    for second in range(steps):
        state, _, _ = play_step(state, saying("x" * 40), budget, float(second + 1))
    changed = end_request(state, request_of("a").key, 9.0)
    assert changed.operations == ((End(slot=0), Keep(slot=0, count=0)) if steps else ())
    assert [(type(one), one.key.request_id) for one in changed.outputs] == [(Ended, "a")]
    assert isinstance(changed.outputs[0], Ended)
    assert changed.outputs[0].end.reason == "cancelled"
    assert end_request(changed.state, request_of("a").key, 9.0).outputs == ()
    assert set(ends_of(play(changed.state, saying("x")))) == {"b"}


def test_a_cancel_between_two_choices_counts_both() -> None:
    state = batch(request_of(n=2, max_tokens=9), n_parallel=1)
    budget = StepBudget(tokens=512, prefill_tokens=64)
    while not state.closed:
        state, _, _ = play_step(state, saying("x"), budget, 1.0)
    changed = end_request(state, request_of().key, 9.0)
    assert isinstance(changed.outputs[0], Ended)
    assert changed.outputs[0].end.usage == Usage(prompt_tokens=3, completion_tokens=2)
    assert changed.state.is_idle
    assert changed.state.closed == ()


def test_deadlines_end_what_is_late_and_nothing_else() -> None:
    state = batch(request_of("a", deadline=5.0), request_of("b", deadline=6.0))
    state = schedule(state, 1.0).state
    assert expire(state, 4.9).outputs == ()
    changed = expire(state, 5.0)
    end = changed.outputs[0]
    assert isinstance(end, Ended)
    assert (end.key.request_id, end.end.reason) == ("a", "error")
    assert end.end.error is not None
    assert end.end.error.code == "deadline_exceeded"
    assert changed.operations == (End(slot=0), Keep(slot=0, count=0))


def test_a_deadline_ends_what_is_queued() -> None:
    state = schedule(batch(request_of("a", max_tokens=50), request_of("b", deadline=5.0), n_parallel=1), 1.0).state
    assert [seq.request.key.request_id for seq in state.waiting] == ["b"]
    assert expire(state, 4.9).outputs == ()
    changed = expire(state, 5.0)
    assert [end.end.error and end.end.error.code for end in ends_of(list(changed.outputs))["b"]] == [
        "deadline_exceeded"
    ]
    assert changed.operations == () and changed.state.waiting == ()
    assert set(ends_of(play(changed.state, saying("x")))) == {"a"}


def test_a_failure_ends_all_with_its_error() -> None:
    state = schedule(batch(*(request_of(name) for name in "abcdef")), 1.0).state
    changed = end_all(state, 2.0, ErrorBody(code="runner_failed", detail="gone", retryable=True))
    assert {end.key.request_id for end in changed.outputs if isinstance(end, Ended)} == set("abcdef")
    assert changed.state.is_idle


def test_a_choice_in_which_nothing_can_be_drawn_ends_its_request_alone() -> None:
    state = schedule(batch(request_of("a", n=2), request_of("b")), 1.0).state
    plan = plan_step(state, StepBudget(tokens=512, prefill_tokens=64))
    assert plan is not None
    slots = [row.slot for row in plan.rows]
    error = ErrorBody(code="invalid_request", detail="no token", retryable=False, param="grammar")
    result = StepResult(sampled=dict.fromkeys(slots[1:], (65,)), failed={slots[0]: error}, elapsed_s=0.1)
    changed = apply(state, plan, result, VOCABULARY, 2.0)
    end = ends_of(list(changed.outputs))["a"][0].end
    assert (end.reason, end.error) == ("error", error)
    assert [seq.request.key.request_id for seq in changed.state.running] == ["b"]
    assert {operation.slot for operation in changed.operations if isinstance(operation, End)} == set(slots[:2])
    outputs = play(changed.state, saying("xyz"))
    assert [one.end.reason for one in ends_of(outputs)["b"]] == ["stop"]


QUICK = Rate(decode_s=0.001, prefill_s=((0.001,),))
# Ten times as long a token behind 1,024 others.
DEEP = Rate(decode_s=0.001, prefill_s=((0.001,), (0.005,), (0.01,)))


def behind(state: BatchState, name: str, count: int) -> BatchState:
    """As if so many tokens of that prompt had been taken over from an earlier sequence."""
    running = [
        seq if seq.request.key.request_id != name else msgspec.structs.replace(seq, computed=count)
        for seq in state.running
    ]
    return msgspec.structs.replace(state, running=tuple(running))


@pytest.mark.parametrize("first", [2000, 150], ids=["must not pass", "must not join"])
def test_a_prompt_behind_a_long_prefix_takes_what_its_depth_costs(first: int) -> None:
    state = decoding(request_of("x", max_tokens=500), n_ctx=4096, kv_cells=16384)
    for name, prompt in (("a", first), ("b", 1124), ("c", 20)):
        state = add(state, request_of(name, prompt=prompt), VOCABULARY, 2.0).state
    state = behind(schedule(state, 2.0).state, "b", 1024)
    slots = {seq.request.key.request_id: seq.slot for seq in state.running}
    budget = budget_for(state, DEEP)
    assert budget.prefill_tokens * 0.001 <= STEP_CROWDED_S
    plan = plan_step(state, budget)
    assert plan is not None
    rows = {row.slot: len(row.tokens) for row in plan.rows if len(row.tokens) > 1}
    cost_s = rows.get(slots["b"], 0) * 0.01 + (rows.get(slots["a"], 0) + rows.get(slots["c"], 0)) * 0.001
    assert cost_s <= budget.prefill_tokens * 0.001 + 1e-9
    assert slots["b"] not in rows, "100 tokens of it take a second"
    assert rows[slots["a"]] >= min(first, CHUNK_UNIT)


def test_a_deep_prompt_whose_turn_it_is_goes_on() -> None:
    state = decoding(request_of("x", max_tokens=500), n_ctx=4096, kv_cells=16384)
    state = add(state, request_of("b", prompt=1124), VOCABULARY, 2.0).state
    state = behind(schedule(state, 2.0).state, "b", 1024)
    assert [len(row.tokens) for row in run_of(state, DEEP).rows] == [1, CHUNK_UNIT]


def decoding(*requests: BatchRequest, **shape: int) -> BatchState:
    """Each request after its first token, an ``x``."""
    state = batch(*requests, **shape)
    while not state.running or any(not seq.is_decoding for seq in state.running):
        budget = StepBudget(tokens=state.shape.n_batch, prefill_tokens=64)
        state, _, _ = play_step(state, saying("x", end=False), budget, 1.0)
    return state


def run_of(state: BatchState, rate: Rate = QUICK) -> StepPlan:
    plan = plan_step(state, budget_for(state, rate))
    assert plan is not None
    return plan


def test_a_run_stops_before_anything_has_to_happen() -> None:
    assert run_of(decoding(request_of("a", max_tokens=500), request_of("b", max_tokens=500))).steps == MAX_RUN
    assert run_of(decoding(request_of("a", max_tokens=500), request_of("b", max_tokens=6))).steps == 5
    assert run_of(decoding(request_of("a", max_tokens=500, stop=("zz",)))).steps == 1, "a stop string is seen in text"
    state = decoding(request_of("a", max_tokens=500))
    assert run_of(add(state, request_of("b", prompt=90), VOCABULARY, 2.0).state).steps == MAX_RUN, "it waits for a slot"
    beside = schedule(add(state, request_of("b", prompt=90), VOCABULARY, 2.0).state, 2.0).state
    assert run_of(beside).steps == 1, "a prompt goes on step by step"
    marked = msgspec.structs.replace(state.running[0], marks=(20,))
    assert run_of(msgspec.structs.replace(state, running=(marked,))).steps == 1, "its state is to be kept there"


def test_a_run_stays_within_the_cells() -> None:
    state = decoding(request_of("a", max_tokens=90), request_of("b", max_tokens=90), n_ctx=96, kv_cells=140)
    for _ in range(60):
        state, _, _ = play_step(state, saying("x", end=False), StepBudget(tokens=512, prefill_tokens=0), 2.0)
    used = sum(seq.computed for seq in state.running)
    assert run_of(state).steps == (140 - used) // 2 == 7


def test_a_run_is_folded_as_its_steps_are() -> None:
    state = decoding(request_of("a", max_tokens=9), request_of("b", max_tokens=3))
    slots = {seq.request.key.request_id: seq.slot for seq in state.running}
    plan = msgspec.structs.replace(run_of(state), steps=2)
    cut = "é".encode()
    drawn = {slots["a"]: tuple(cut), slots["b"]: (66, 67)}
    whole = apply(state, plan, StepResult(sampled=drawn, steps=2, elapsed_s=0.1), VOCABULARY, 2.0)
    told: list[Output] = []
    for at in range(2):
        budget = StepBudget(tokens=512, prefill_tokens=0)
        state, _, outputs = play_step(state, lambda _, row, at=at: drawn[row.slot][at], budget, 2.0)
        told += outputs
    assert whole.state == state
    assert [seq.computed for seq in state.running] == [5]
    for name in "ab":
        assert text_of(list(whole.outputs), name) == text_of(told, name)
    assert ends_of(list(whole.outputs)) == ends_of(told)
    assert [one.tokens for one in whole.outputs if isinstance(one, Emitted)] == [tuple(cut), (66, 67)]


def test_a_failure_within_a_run_loses_no_token_before_it() -> None:
    state = decoding(request_of("a", max_tokens=9), request_of("b", max_tokens=9))
    slots = {seq.request.key.request_id: seq.slot for seq in state.running}
    error = ErrorBody(code="invalid_request", detail="no token", retryable=False, param="grammar")
    drawn = {slots["a"]: (65, 66), slots["b"]: (67, 68, 69)}
    result = StepResult(sampled=drawn, failed={slots["a"]: error}, steps=3, elapsed_s=0.1)
    changed = apply(state, msgspec.structs.replace(run_of(state), steps=3), result, VOCABULARY, 2.0)
    outputs = list(changed.outputs)
    assert (text_of(outputs), text_of(outputs, "b")) == ("AB", "CDE")
    [end] = ends_of(outputs)["a"]
    assert (end.end.reason, end.end.usage) == ("error", Usage(prompt_tokens=3, completion_tokens=3))
    [left] = changed.state.running
    assert (left.computed, left.known) == (6, 7)


def test_a_run_beyond_an_end_is_a_defect() -> None:
    state = decoding(request_of("a", max_tokens=9))
    result = StepResult(sampled={0: (END_TOKEN, 65)}, steps=2, elapsed_s=0.1)
    with pytest.raises(AssertionError):
        apply(state, run_of(state), result, VOCABULARY, 2.0)


def test_a_plan_for_another_position_is_a_defect() -> None:
    state = schedule(batch(request_of(prompt=10)), 1.0).state
    plan = plan_step(state, StepBudget(tokens=512, prefill_tokens=5))
    assert plan is not None
    result = StepResult(sampled={}, elapsed_s=0.1)
    state = apply(state, plan, result, VOCABULARY, 1.0).state
    with pytest.raises(AssertionError):
        apply(state, plan, result, VOCABULARY, 1.0)


def test_nothing_runs_without_budget_or_sequences() -> None:
    assert plan_step(batch(), StepBudget(tokens=512, prefill_tokens=64)) is None
    assert budget_for(batch(), Rate()).prefill_tokens == 0


@given(st.binary(min_size=1, max_size=20), st.integers(0, 20), st.integers(0, 25))
def test_a_resumed_answer_reads_as_if_it_had_never_stopped(answer: bytes, cut: int, sent: int) -> None:
    """Whatever was sent before, sent and resumed text together are the whole, and the counts are the whole's."""
    request = request_of(max_tokens=30, stop=("\x07\x07",))
    whole_outputs = play(batch(request), saying(answer))
    whole = text_of(whole_outputs)
    sent = min(sent, len(whole))
    resumed = msgspec.structs.replace(request, emitted=tuple(answer[: min(cut, len(answer))]), sent_characters=sent)
    if not resumed.emitted:
        return
    changed = add(BatchState(shape=shape_of()), resumed, VOCABULARY, 0.0)
    told: list[Output] = [*changed.outputs]
    if not changed.state.is_idle:
        told += play(changed.state, saying(answer))
    assert whole[:sent] + text_of(told) == whole
    assert [end.end.usage for end in ends_of(told)["a"]] == [end.end.usage for end in ends_of(whole_outputs)["a"]]


REQUESTS = st.lists(
    st.tuples(
        st.integers(1, 90),  # prompt
        st.integers(1, 10),  # max_tokens
        st.integers(1, 3),  # n
        st.integers(0, 30),  # arrives at step
        st.one_of(st.none(), st.integers(0, 40)),  # cancelled at step
    ),
    min_size=1,
    max_size=8,
)


SLOW = Rate(decode_s=0.001, prefill_s=((0.001,),))
"""A hundred prompt tokens fit a step."""


@settings(deadline=None)
@given(REQUESTS, st.integers(1, 4), st.integers(0, 3), st.integers(1, 100))
def test_every_request_ends_once_and_no_step_is_over_its_budget(
    requests: list[tuple[int, int, int, int, int | None]], n_parallel: int, tight: int, prefill_tokens: int
) -> None:
    """Random arrivals and cancels: the budget is kept; decode first, then first come first served, or short first."""
    shape = shape_of(
        n_ctx=100, kv_cells=100 + tight * 70, n_parallel=n_parallel, n_batch=n_parallel + 100, n_ubatch=100
    )
    state = BatchState(shape=msgspec.structs.replace(shape, max_waiting=100))
    budget = StepBudget(tokens=shape.n_batch, prefill_tokens=prefill_tokens)
    outputs: list[Output] = []
    started: list[int] = []
    for step in range(2000):
        for index, (prompt, max_tokens, n, at, cancel_at) in enumerate(requests):
            request = request_of(str(index), prompt=prompt, max_tokens=max_tokens, n=n)
            if at == step:
                state = add(state, request, VOCABULARY, float(step)).state
            if cancel_at == step:
                changed = end_request(state, request.key, float(step))
                state = changed.state
                outputs.extend(changed.outputs)
        scheduled = schedule(state, float(step))
        began = [one.sequence for one in scheduled.operations if isinstance(one, Begin)]
        started.extend(seq.order for seq in began if seq.started_at == float(step))
        before = scheduled.state
        clamped = StepBudget(
            tokens=budget.tokens, prefill_tokens=min(prefill_tokens, budget_for(before, SLOW).prefill_tokens)
        )
        state, plan, told = play_step(state, saying("abcd"), clamped, float(step))
        outputs.extend(told)
        if plan is None:
            if step > 40:
                break
            continue
        assert plan.token_count <= budget.tokens
        decoding = {seq.slot for seq in before.running if seq.is_decoding}
        assert [row.slot for row in plan.rows[: len(decoding)]] == sorted(decoding), "decode first, every one"
        prefill = [row for row in plan.rows if row.slot not in decoding]
        assert sum(len(row.tokens) for row in prefill) <= prefill_tokens
        assert len({row.slot for row in plan.rows}) == len(plan.rows)
        by_slot = {seq.slot: seq for seq in before.running}
        for row in prefill[:-1]:
            assert len(row.tokens) == by_slot[row.slot].gap, "only the last prompt of a step is cut"
        orders = [by_slot[row.slot].order for row in prefill]
        oldest = min((seq for seq in before.running if not seq.is_decoding), key=lambda seq: seq.order, default=None)
        if oldest is not None and oldest.passed >= MAX_PASSED:
            assert orders[0] == oldest.order, "first come, first served in the end"
        for seq in state.running:
            assert seq.computed <= seq.known <= seq.request.cells
            assert seq.passed <= MAX_PASSED
    assert state.is_idle
    assert state.closed == ()
    assert started == sorted(started), "slots are given in the order of arrival"
    for index, (prompt, _, _, at, cancel_at) in enumerate(requests):
        ends = ends_of(outputs).get(str(index), [])
        was_cancelled_early = cancel_at is not None and cancel_at < at
        assert len(ends) == 1, f"request {index} ended {len(ends)} times"
        if cancel_at is None or was_cancelled_early:
            assert ends[0].end.reason in ("stop", "length")
        assert ends[0].end.usage is not None
        assert ends[0].end.usage.prompt_tokens == prompt


@pytest.mark.parametrize(
    ("emitted", "sent", "text", "reason"),
    [
        (b"abc##", 3, "", "stop"),
        (b"abcdef", 2, "cdef", "length"),
        (b"ab\x80\x80\x80\x80", 0, "ab\ufffd\ufffd\ufffd\ufffd", "length"),
    ],
)
def test_a_resumed_answer_that_was_complete_ends_without_a_slot(
    emitted: bytes, sent: int, text: str, reason: str
) -> None:
    request = request_of(max_tokens=6, stop=("##",), emitted=emitted, sent_characters=sent)
    changed = add(BatchState(shape=shape_of()), request, VOCABULARY, 1.0)
    assert changed.state.is_idle
    assert text_of(list(changed.outputs)) == text
    end = changed.outputs[-1]
    assert isinstance(end, Ended)
    assert end.end.reason == reason
    assert end.end.usage == Usage(prompt_tokens=3, completion_tokens=len(emitted))


def saying_each(answers: list[bytes]) -> Draw:
    """Each choice answers its own bytes, then the end token."""

    def draw(state: BatchState, row: StepRow) -> int:
        sequence = next(seq for seq in state.running if seq.slot == row.slot)
        tokens = [*answers[sequence.choice], END_TOKEN]
        return tokens[min(len(sequence.drawn), len(tokens) - 1)]

    return draw


def drawn_of(outputs: list[Output], choice: int) -> list[int]:
    return [token for one in outputs if isinstance(one, Emitted) and one.choice == choice for token in one.tokens]


@given(
    st.lists(st.tuples(st.binary(max_size=14), st.integers(0, 14), st.integers(0, 14)), min_size=1, max_size=3),
)
def test_all_choices_of_a_resumed_request_go_on(choices: list[tuple[bytes, int, int]]) -> None:
    """Each choice has its own count; those that had ended say so once more, the request ends once, with all counts."""
    answers = [answer for answer, _, _ in choices]
    request = request_of(max_tokens=10, n=len(choices))
    whole_outputs = play(batch(request), saying_each(answers))
    begun = [
        ResumedChoice(
            emitted_tokens=tuple(told[: min(cut, len(told))]),
            sent_characters=min(sent, len(text_of(whole_outputs, choice=choice))),
        )
        for choice, (_, cut, sent) in enumerate(choices)
        for told in [drawn_of(whole_outputs, choice)]
    ]
    resumed = msgspec.structs.replace(
        request,
        emitted=begun[0].emitted_tokens,
        sent_characters=begun[0].sent_characters,
        others=tuple(begun[1:]),
        lane=-1,
    )
    changed = add(BatchState(shape=shape_of()), resumed, VOCABULARY, 0.0)
    told = [*changed.outputs]
    if not changed.state.is_idle:
        told += play(changed.state, saying_each(answers))
    for choice, one in enumerate(begun):
        whole = text_of(whole_outputs, choice=choice)
        assert whole[: one.sent_characters] + text_of(told, choice=choice) == whole
        finishes = [
            out.finish_reason for out in told if isinstance(out, Emitted) and out.choice == choice and out.finish_reason
        ]
        assert len(finishes) == 1
    assert [end.end.usage for end in ends_of(told)["a"]] == [end.end.usage for end in ends_of(whole_outputs)["a"]]


def test_resumed_answers_go_first_and_batch_requests_last() -> None:
    state = batch()
    for name, lane in (("batch", 1), ("first", 0), ("lost", -1), ("second", 0), ("lost too", -1)):
        state = add(state, msgspec.structs.replace(request_of(name), lane=lane), VOCABULARY, 0.0).state
    assert [seq.request.key.request_id for seq in state.waiting] == ["lost", "lost too", "first", "second", "batch"]
    state = schedule(state, 1.0).state
    orders = [seq.order for seq in state.running]
    assert orders == sorted(orders), "the one that yields first is the newest of the last lane"
