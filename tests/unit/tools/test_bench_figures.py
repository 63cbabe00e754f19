"""What the benchmarks make of their measurements."""

from __future__ import annotations

import math
from typing import Any

import bench_engine
import bench_load
import bench_sides
import msgspec
import pytest
from bench_engine import Line, Outcome, Row, rows_of
from bench_figures import number, pair_ratios, percentile, spread, table
from bench_load import Sample, arrivals, error_of, figures, has_text, intrusion, jobs, usage_of
from bench_sides import BenchError, Case, Decoded, Mark, Measured, decoded
from hypothesis import given
from hypothesis import strategies as st

from skulk.engines.llama_cpp.layout import layout_of


def sample(*times: float, sent: float = 0.0, ended: float | None = None, **fields: Any) -> Sample:
    end = ended if ended is not None else (times[-1] if times else sent)
    plain: dict[str, Any] = {"sent_s": sent, "ended_s": end, "arrivals_s": times, "completion_tokens": len(times)}
    return Sample(name="s", **(plain | fields))


def test_percentiles_lie_between_their_neighbours() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert [percentile(values, share) for share in (0.0, 0.5, 1.0)] == [1.0, 2.5, 4.0]
    assert percentile([7.0], 0.99) == 7.0
    assert math.isnan(percentile([], 0.5))


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_a_percentile_is_never_outside(values: list[float], share: float) -> None:
    assert min(values) <= percentile(values, share) <= max(values)
    assert percentile(values, 0.0) == min(values) and percentile(values, 1.0) == max(values)


def test_ratios_are_those_of_partners_not_of_medians() -> None:
    ratios = pair_ratios([10.0, 20.0, 90.0], [10.0, 10.0, 100.0])
    assert ratios == [1.0, 2.0, 0.9]
    assert spread(ratios) == (1.0, 0.9, 2.0)
    assert math.isnan(pair_ratios([1.0], [0.0])[0])
    assert math.isnan(spread([math.nan]).median)
    with pytest.raises(ValueError):
        pair_ratios([1.0], [])


def test_a_table_lines_up() -> None:
    assert table(["phase", "n"], [["decode", "1"], ["x", "1000"]]) == (
        "| phase  |    n |\n|--------|-----:|\n| decode |    1 |\n| x      | 1000 |"
    )
    assert number(math.nan) == "-" and number(1.234) == "1.23"


def test_decode_counts_only_while_all_decode() -> None:
    marks = [
        Mark(1.0, ("a",)),
        Mark(2.0, ("a", "b")),  # from here on both
        Mark(3.0, ("a", "b")),
        Mark(4.0, ("a", "b"), ("a",)),  # up to here
        Mark(9.0, ("b",), ("b",)),
    ]
    assert decoded(marks, ["a", "b"], 2) == Decoded(speed=4 / 2.0, drawn_before=1.5)
    assert decoded(marks, ["a", "b"], 1) == Decoded(speed=2 / 1.0, drawn_before=1.5)


@pytest.mark.parametrize(
    ("marks", "told"),
    [
        ([Mark(1.0, ("a",), ("a",))], "no token came of b"),
        ([Mark(1.0, ("a",), ("a",)), Mark(2.0, ("b",)), Mark(3.0, ("b",))], "generate more tokens"),
        ([Mark(1.0, ("a",)), Mark(2.0, ("b",)), Mark(3.0, ("a", "b"), ("a",)), Mark(4.0, ("b",))], "generate more"),
        ([Mark(1.0, ("a", "b")), Mark(2.0, ("a", "b"))], "generate more tokens"),
    ],
)
def test_a_decode_figure_that_would_mean_nothing_is_refused(marks: list[Mark], told: str) -> None:
    with pytest.raises(BenchError, match=told):
        decoded(marks, ["a", "b"], 1 if "no token" in told else 2)


@pytest.mark.parametrize("sequences", [1, 4, 16])
@pytest.mark.parametrize("layout", ["streams", "unified"])
def test_both_sides_get_the_same_cells_in_the_same_layout(sequences: int, layout: Any) -> None:
    case = Case(model="m.gguf", sequences=sequences, prompt=128, generated=64, layout=layout, threads=2)
    ours = layout_of(bench_sides.load_spec(case))
    theirs = bench_sides.their_command("bench", case)
    assert theirs[theirs.index("-c") + 1] == str(ours.n_ctx) == str(case.cells)
    assert ("-kvu" in theirs) == (layout == "unified")
    assert ours.unified == (layout == "unified" or sequences == 1)
    assert ours.window >= case.prompt + case.generated + case.lead
    assert theirs[theirs.index("-npl") + 1] == str(sequences)


def test_theirs_computes_the_phase_that_ours_does() -> None:
    case = Case(model="m", phase="prefill", sequences=4, prompt=128, generated=64)
    command = bench_sides.their_command("bench", case, depth=140)
    assert (command[command.index("-npp") + 1], command[command.index("-ntg") + 1]) == ("128", "1")
    command = bench_sides.their_command("bench", msgspec.structs.replace(case, phase="decode"), depth=140)
    assert (command[command.index("-npp") + 1], command[command.index("-ntg") + 1]) == ("140", "64")


def test_a_gpu_is_a_gpu_on_both_sides() -> None:
    case = Case(model="m", backend="llama_cpp-vulkan", sequences=1, prompt=8, generated=8)
    command = bench_sides.their_command("bench", case)
    assert command[command.index("-ngl") + 1] == "999"


def test_the_other_side_is_read_from_its_json() -> None:
    line = '{"n_kv_max": 512, "pp": 128, "tg": 64, "pl": 1, "speed_pp": 311.74, "speed_tg": 111.78}'
    assert bench_sides.parse_theirs(f"\nnoise\n{line}\n", "prefill") == Measured(speed=311.74, depth=128)
    assert bench_sides.parse_theirs(f"\nnoise\n{line}\n", "decode") == Measured(speed=111.78, depth=128)
    for broken in ("", "{}", "{nonsense", f"{line}\n{line}"):
        with pytest.raises(BenchError):
            bench_sides.parse_theirs(broken, "decode")


def test_the_engines_report_names_versions_layout_and_what_is_missing() -> None:
    case = Case(model="dir/m.gguf", sequences=1, prompt=128, generated=64, threads=2)
    row = Row(4, "decode", "top_k")
    line = Line(row=row, ours=(97.0, 100.0, 99.0), theirs=(100.0, 100.0, 100.0), others=(0.0, 0.25))
    told = bench_engine.report(Outcome(case=case, lines=(line,), ours_version="v-ours", theirs_version="v-theirs"))
    assert "v-ours" in told and "v-theirs" in told and told.count("one stream a sequence") == 2
    cells = [[cell.strip() for cell in line.split("|")] for line in told.splitlines()]
    assert ["", "decode", "top_k", "4", "99.0", "100.0", "0.990", "0.97 to 1.00", "met", "25 %", ""] in cells
    alone = Line(row=row, ours=(97.0,))
    told = bench_engine.report(Outcome(case=case, lines=(alone,), ours_version="v-ours", theirs_version=""))
    assert "not measured: llama-batched-bench is not here" in told and "missed" not in told
    slow = Line(row=row, ours=(96.0,), theirs=(100.0,))
    assert "missed" in bench_engine.report(Outcome(case=case, lines=(slow,), ours_version="", theirs_version="v"))


def test_sampling_is_measured_only_where_it_happens() -> None:
    rows = rows_of((1, 4), ("prefill", "decode"), ("greedy", "top_k"))
    assert rows == (
        *(Row(1, "prefill"), Row(4, "prefill")),
        *(Row(1, "decode", "greedy"), Row(1, "decode", "top_k"), Row(4, "decode", "greedy"), Row(4, "decode", "top_k")),
    )
    assert rows_of((1,), ("prefill",), ("top_k",)) == (Row(1, "prefill"),)


def test_pairs_turn_their_order_and_decode_at_our_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def ours(case: Case) -> Measured:
        told.append("ours")
        return Measured(speed=99.0, depth=130 + len(told), version="v")

    def theirs(binary: str, case: Case, depth: int) -> Measured:
        told.append(depth)
        return Measured(speed=100.0)

    monkeypatch.setattr(bench_engine, "ours_apart", ours)
    monkeypatch.setattr(bench_engine, "measure_theirs", theirs)
    monkeypatch.setattr(bench_engine, "their_version", lambda _: "v")
    case = Case(model="m", sequences=1, prompt=128, generated=8)
    outcome = bench_engine.run(case, [Row(16, "decode")], 4, "bench")
    assert told == ["ours", 131, 131, "ours", "ours", 135, 135, "ours"]
    assert outcome.lines[0].ours == (99.0,) * 4 and outcome.lines[0].theirs == (100.0,) * 4


def test_what_others_use_is_what_is_not_ours() -> None:
    before = bench_engine.Cpu(total=100.0, busy=50.0, own=10.0)
    assert bench_engine.others_share(before, bench_engine.Cpu(120.0, 68.0, 26.0)) == pytest.approx(0.1)
    assert bench_engine.others_share(before, before) == 0.0


def test_prompts_are_distinct_and_the_same_again() -> None:
    first, again = (jobs(count=4, words=20, max_tokens=8, seed="7") for _ in range(2))
    assert first == again
    assert len({job.prompt for job in first}) == 4 and all(len(job.prompt.split()) == 20 for job in first)
    assert not set(jobs(count=4, words=20, max_tokens=8, seed="8")) & set(first)


def test_a_shared_prefix_is_shared_and_only_that() -> None:
    shared = jobs(count=3, words=10, max_tokens=8, seed="7", shared_words=50)
    words = [job.prompt.split() for job in shared]
    assert words[0][:50] == words[1][:50] == words[2][:50]
    assert len({tuple(one[50:]) for one in words}) == 3 and {len(one) for one in words} == {60}


@given(st.integers(1, 50), st.floats(0.01, 100), st.text(max_size=5))
def test_arrivals_begin_at_once_and_never_go_back(count: int, rate: float, seed: str) -> None:
    times = arrivals(count, rate, seed)
    assert len(times) == count and times[0] == 0.0
    assert list(times) == sorted(times) and times == arrivals(count, rate, seed)


def test_arrivals_keep_their_rate() -> None:
    assert arrivals(2001, 4.0, "a")[-1] == pytest.approx(500.0, rel=0.1)


def test_figures_of_a_round() -> None:
    good = [
        sample(1.0, 1.5, 2.0, prompt_tokens=5, cached_tokens=2),
        sample(2.0, 2.25, 2.5, sent=1.0, ended=4.0, prompt_tokens=5),
    ]
    found = figures([*good, sample(0.1, sent=-50.0, error="refused")])
    assert found.tokens_per_s == 6 / 4.0  # from the first sent to the last end of those that were answered
    assert (found.ttft_p50_s, found.gap_p50_s, found.longest_gap_s) == (1.0, 0.375, 0.5)
    assert (found.completed, found.failed, found.errors) == (2, 1, ("refused",))
    assert (found.prompt_tokens, found.completion_tokens, found.cached_tokens) == (10, 6, 2)


def test_figures_of_nothing_are_no_numbers() -> None:
    found = figures([sample(error="gone")])
    assert math.isnan(found.tokens_per_s) and math.isnan(found.ttft_p50_s) and math.isnan(found.longest_gap_s)
    assert found.failed == 1


def test_a_long_prompts_gaps_are_those_that_touch_its_prefill() -> None:
    stream = sample(0.0, 3.0, 10.0, 12.0, 17.0)  # the gap of 7 s was half over when the long prompt came
    found = intrusion([stream], sample(15.0, sent=9.0))
    assert (found.longest_gap_s, found.ttft_p50_s) == (7.0, 6.0)
    assert found.completion_tokens == 2 and found.failed == 0
    before = intrusion([sample(0.0, 8.0, 9.5, 10.0, 11.0)], sample(10.5, sent=9.0))
    assert before.longest_gap_s == 1.5, "the gap of 8 s was over when the long prompt came"


def test_streams_that_end_too_early_and_prompts_that_fail_are_told() -> None:
    early = intrusion([sample(0.0, 1.0)], sample(15.0, sent=0.5))
    assert early.failed == 1 and "give it more tokens" in early.errors[0]
    failed = intrusion([sample(0.0, 1.0)], sample(sent=0.5, error="status 503"))
    assert failed.failed == 1 and failed.errors == ("status 503",) and failed.longest_gap_s == 1.0
    mute = intrusion([sample(0.0, 1.0)], sample(sent=0.5))
    assert mute.errors == ("the long prompt gave no token",)


def test_events_of_a_stream_are_understood() -> None:
    assert has_text({"choices": [{"delta": {"content": "x"}}]})
    assert has_text({"choices": [{"delta": {"content": None, "reasoning_content": "x"}}]})
    assert has_text({"choices": [{"text": "x"}]})
    for silent in ({"choices": [{"delta": {"role": "assistant", "content": ""}}]}, {"choices": []}, {"usage": {}}):
        assert not has_text(silent)
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}
    assert usage_of({"usage": usage}) == (5, 2, 3)
    assert usage_of({"usage": {**usage, "prompt_tokens_details": None}}) == (5, 2, 0)
    assert usage_of({"usage": None}) is None and usage_of({}) is None
    assert error_of({"error": {"message": "no room", "code": "overloaded"}}) == "no room"
    assert (error_of({"error": "plain"}), error_of({}), error_of("text")) == ("plain", "", "text")


def test_the_word_list_has_no_word_twice() -> None:
    assert len(set(bench_load.WORDS)) == len(bench_load.WORDS) > 90
