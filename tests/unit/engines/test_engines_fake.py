"""The fake engine: deterministic, stoppable, and honest about the protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from skulk.batching.step import StepPlan, StepRow
from skulk.engines.fake import END, START, FakeEngine, FakeLoader, FakeOptions, answer_of, next_token
from skulk.engines.protocol import Engine, LoadCancelled, Loader, LoadSpec
from skulk.engines.registry import loader_for
from skulk.errors import RequestError, ServiceError, StartError
from skulk.wire.generation import ChatMessage, ChatPrompt, Sampling, TextPrompt, TokenPrompt

GREEDY = Sampling(temperature=0.0)


def write(tmp_path: Path, **options: Any) -> str:
    path = tmp_path / "fake.json"
    path.write_bytes(msgspec.json.encode(FakeOptions(**options)))
    return str(path)


def spec(path: str) -> LoadSpec:
    return LoadSpec(path=path, backend="fake-cpu", context_length=500, n_parallel=3, kv_cells=1500)


def engine(tmp_path: Path, slept: list[float] | None = None, **options: Any) -> FakeEngine:
    sleep = slept.append if slept is not None else lambda _: None
    return FakeLoader(sleep)(spec(write(tmp_path, **options)), lambda _: True)


def answer(one: Engine, prompt: tuple[int, ...], sampling: Sampling = GREEDY, slot: int = 0, choice: int = 0) -> bytes:
    one.begin(slot, sampling, prompt, choice=choice)
    tokens, start, text = prompt, 0, b""
    while True:
        result = one.run(StepPlan(rows=(StepRow(slot=slot, tokens=tokens, start=start, sample=True),)))
        start += len(tokens)
        [token] = result.sampled[slot]
        if one.is_end(token):
            one.end(slot)
            one.keep(slot, 0)
            return text
        text += one.piece(token)
        tokens = (token,)


def test_the_registry_gives_it_for_its_tag(tmp_path: Path) -> None:
    loader: Loader = loader_for("fake-cpu")
    one = loader(spec(write(tmp_path)), lambda _: True)
    assert one.info.engine == "fake" and one.info.n_ctx == 500
    one.close()


@pytest.mark.parametrize("backend", ["", "mlx-metal", "vllm-cuda", "Llama_cpp-cpu"])
def test_an_unknown_backend_is_refused(backend: str) -> None:
    with pytest.raises(StartError, match="llama_cpp") as caught:
        loader_for(backend)
    assert caught.value.code == "engine_missing"


def test_the_same_prompt_gives_the_same_answer_in_any_slot(tmp_path: Path) -> None:
    one = engine(tmp_path, answer_tokens=20)
    prompt = one.tokens_of(ChatPrompt(messages=(ChatMessage(role="user", content="hi"),)))
    first = answer(one, prompt)
    assert len(first) == 20 and first.decode()
    assert answer(one, prompt, slot=2) == first
    assert answer(engine(tmp_path, answer_tokens=20), prompt) == first
    assert answer(one, one.tokens_of(TextPrompt(text="other"))) != first


def test_seeds_and_choices_change_the_answer_unless_greedy(tmp_path: Path) -> None:
    one = engine(tmp_path)
    prompt = one.tokens_of(TextPrompt(text="p"))
    seeded = Sampling(seed=1)
    assert answer(one, prompt, seeded) == answer(one, prompt, seeded)
    assert len({answer(one, prompt, s, choice=c) for s in (seeded, Sampling(seed=2)) for c in (0, 1)}) == 4
    assert answer(one, prompt, GREEDY, choice=1) == answer(one, prompt, GREEDY)


def test_a_resumed_answer_goes_on_as_it_would_have(tmp_path: Path) -> None:
    one = engine(tmp_path, answer_tokens=30)
    prompt = one.tokens_of(TextPrompt(text="p"))
    full = answer(one, prompt)
    for cut in (1, 13, 29):
        resumed = one.tokens_of(TokenPrompt(tokens=(*prompt, *full[:cut])))
        assert full[:cut] + answer(one, resumed) == full


def test_answers_hold_characters_of_several_bytes() -> None:
    texts = [answer_of((n, START), "", 60) for n in range(30)]
    assert all(text.decode() and len(text) == 60 for text in texts)
    assert any(len(text.decode()) < 60 for text in texts)


def test_next_token_ends() -> None:
    assert next_token((1, 2, START), "", 0) == END
    assert next_token((1, 2), "", 2) == END


def test_chunks_do_not_change_the_answer(tmp_path: Path) -> None:
    one = engine(tmp_path)
    prompt = one.tokens_of(TextPrompt(text="a longer prompt"))
    one.begin(0, GREEDY, prompt)
    one.run(StepPlan(rows=(StepRow(slot=0, tokens=prompt[:5], start=0, sample=False),)))
    result = one.run(StepPlan(rows=(StepRow(slot=0, tokens=prompt[5:], start=5, sample=True),)))
    assert one.piece(result.sampled[0][0]) == answer(one, prompt, slot=1)[:1]


def test_a_run_gives_what_its_steps_give(tmp_path: Path) -> None:
    one = engine(tmp_path, answer_tokens=6)
    prompt = one.tokens_of(TextPrompt(text="run"))
    expected = answer(one, prompt)
    one.begin(0, GREEDY, prompt)
    [first] = one.run(StepPlan(rows=(StepRow(slot=0, tokens=prompt, start=0, sample=True),))).sampled[0]
    row = StepRow(slot=0, tokens=(first,), start=len(prompt), sample=True)
    two = one.run(StepPlan(rows=(row,), steps=2))
    assert (two.steps, bytes((first, *two.sampled[0]))) == (2, expected[:3])
    last = StepRow(slot=0, tokens=(two.sampled[0][-1],), start=len(prompt) + 2, sample=True)
    asked: list[int] = []
    alone = one.run(StepPlan(rows=(last,), steps=9), lambda: bool(asked.append(1)))
    assert (alone.steps, len(asked)) == (1, 1)
    row = StepRow(slot=0, tokens=alone.sampled[0], start=len(prompt) + 3, sample=True)
    rest = one.run(StepPlan(rows=(row,), steps=9))
    assert (rest.steps, rest.sampled[0]) == (3, (*expected[4:], END)), "the end token ends the run"


def test_time_is_the_callers(tmp_path: Path) -> None:
    slept: list[float] = []
    one = engine(tmp_path, slept, step_s=0.5, token_s=0.25, load_s=10.0)
    assert slept == [1.0] * 10
    one.begin(0, GREEDY, ())
    one.run(StepPlan(rows=(StepRow(slot=0, tokens=(1, 2), start=0, sample=False),)))
    assert slept[-1] == 1.0


def test_fails_at_its_step_and_only_there(tmp_path: Path) -> None:
    one = engine(tmp_path, fail_at_step=2)
    one.begin(0, GREEDY, ())
    row = StepRow(slot=0, tokens=(1,), start=0, sample=False)
    one.run(StepPlan(rows=(row,)))
    with pytest.raises(ServiceError, match="step 2"):
        one.run(StepPlan(rows=(msgspec.structs.replace(row, start=1),)))
    one.run(StepPlan(rows=(msgspec.structs.replace(row, start=1),)))


def test_what_comes_before_a_step_that_fails_is_told(tmp_path: Path) -> None:
    one = engine(tmp_path, fail_at_step=4)
    one.begin(0, GREEDY, ())
    first = one.run(StepPlan(rows=(StepRow(slot=0, tokens=(1,), start=0, sample=True),)))
    row = StepRow(slot=0, tokens=first.sampled[0], start=1, sample=True)
    assert one.run(StepPlan(rows=(row,), steps=8)).steps == 2


def test_misbehaves_once_where_it_was_told_so(tmp_path: Path) -> None:
    marker = str(tmp_path / "once")
    row = StepRow(slot=0, tokens=(1,), start=0, sample=False)
    for fails in (True, False):
        one = engine(tmp_path, fail_at_step=1, once_marker=marker)
        one.begin(0, GREEDY, ())
        if fails:
            with pytest.raises(ServiceError):
                one.run(StepPlan(rows=(row,)))
        else:
            one.run(StepPlan(rows=(row,)))


def test_hangs_at_its_step(tmp_path: Path) -> None:
    slept: list[float] = []
    one = engine(tmp_path, slept, hang_at_step=1)
    one.begin(0, GREEDY, ())
    one.run(StepPlan(rows=(StepRow(slot=0, tokens=(1,), start=0, sample=False),)))
    assert slept[0] > 3600


def test_a_load_can_be_stopped_and_fail(tmp_path: Path) -> None:
    told: list[float] = []
    with pytest.raises(LoadCancelled):
        FakeLoader(lambda _: None)(spec(write(tmp_path, load_s=1.0)), lambda done: not told.append(done) and done < 0.5)
    assert told == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    with pytest.raises(RequestError, match="as it was told"):
        engine(tmp_path, load_error="as it was told")


@pytest.mark.parametrize("body", [b"", b"GGUF", b'{"crash": 1}'])
def test_a_file_that_is_no_options(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(body)
    with pytest.raises(RequestError, match="options"):
        FakeLoader()(spec(str(path)), lambda _: True)
    with pytest.raises(RequestError, match="can't be read"):
        FakeLoader()(spec(str(tmp_path / "none")), lambda _: True)


@pytest.mark.parametrize(
    "row",
    [
        StepRow(slot=0, tokens=(1,), start=1, sample=True),
        StepRow(slot=0, tokens=(), start=0, sample=True),
        StepRow(slot=0, tokens=(1,) * 501, start=0, sample=True),
    ],
)
def test_broken_plans_are_broken_invariants(tmp_path: Path, row: StepRow) -> None:
    one = engine(tmp_path)
    one.begin(0, GREEDY, ())
    with pytest.raises(AssertionError):
        one.run(StepPlan(rows=(row,)))
    with pytest.raises(AssertionError):
        one.begin(0, GREEDY, ())
