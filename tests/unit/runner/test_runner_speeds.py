"""A runner's own figures: what an ended request teaches, and what is told of prompts whose beginnings are there."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from skulk.placement.prefixes import held_by, prefix_of
from skulk.runner.speeds import MIN_DRAWN, MIN_PREFILL, speeds_after
from skulk.wire.generation import StreamEnd, TextPrompt, Timings, Usage
from tests.support.runners import generate_of, runner_world
from tests.support.states import assignment, status

STATUS = status(assignment())
TIMINGS = Timings(queue_s=9.0, prefill_s=2.0, decode_s=4.0, prefill_tps=500.0, decode_tps=60.0)
END = StreamEnd(reason="stop", usage=Usage(prompt_tokens=1000, completion_tokens=240), timings=TIMINGS)


def test_the_first_request_sets_the_figures_and_later_ones_move_them() -> None:
    first = speeds_after(STATUS, END, 2)
    assert first == {"request_s": 6.0, "prefill_tps": 500.0, "decode_tps": 30.0}, "of one sequence"
    known = msgspec.structs.replace(STATUS, **first)
    slower = msgspec.structs.replace(END, timings=msgspec.structs.replace(TIMINGS, prefill_tps=100.0))
    assert speeds_after(known, slower, 2)["prefill_tps"] == 420.0


def test_a_prompt_that_was_there_and_a_short_answer_tell_no_speed() -> None:
    cached = Usage(prompt_tokens=1000, completion_tokens=MIN_DRAWN - 1, cached_tokens=1001 - MIN_PREFILL)
    assert set(speeds_after(STATUS, msgspec.structs.replace(END, usage=cached), 1)) == {"request_s"}


@pytest.mark.parametrize("changes", [{"reason": "cancelled"}, {"reason": "error"}, {"usage": None}, {"timings": None}])
def test_only_a_request_that_came_to_its_own_end_counts(changes: dict[str, object]) -> None:
    assert speeds_after(STATUS, msgspec.structs.replace(END, **changes), 1) == {}


async def test_the_status_tells_what_can_be_taken_over_and_how_long_a_request_took(tmp_path: Path) -> None:
    prompt = TextPrompt(text="A long beginning that is worth telling. " * 15)
    async with runner_world(tmp_path) as world:
        await (await world.generate(generate_of("r1", prompt=prompt))).finish()
        told = await world.statuses.until(lambda status: bool(status.prefixes) and status.request_s > 0.0)
        prefix = prefix_of(prompt)
        assert prefix.marks
        assert held_by(told.prefixes).share_of(prefix) == prefix.marks[-1].size_bytes / (prefix.tokens * 4)
        other = prefix_of(TextPrompt(text="Another beginning, of nobody's. " * 20))
        assert held_by(told.prefixes).share_of(other) == 0.0
