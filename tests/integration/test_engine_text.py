"""The engine on the real model: what it generates is the model's, alone and beside others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from skulk.batching.step import StepPlan, StepRow
from skulk.engines.llama_cpp.engine import LlamaCppEngine
from skulk.errors import RequestError, ServiceError
from skulk.wire.generation import ChatMessage, ChatPrompt, Sampling, TextPrompt, TokenPrompt
from tests.support.engines import GREEDY, Stepper, generate, load_small, text_of
from tests.support.gguf import embedded_model

QUESTIONS = ("Name three rivers.", "What is a fox?", "Write one sentence about the sea in German: Grüße!")


def chat(text: str) -> ChatPrompt:
    return ChatPrompt(messages=(ChatMessage(role="user", content=text),))


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaCppEngine]:
    """Settings as in production but for `n_ubatch`, which makes the warm-up long and holds each prompt here anyway."""
    made = load_small(context_length=512, n_parallel=3, kv_cells=3 * 512)
    yield made
    made.close()


@pytest.fixture(scope="module")
def exact() -> Iterator[LlamaCppEngine]:
    """Without flash attention and with a stream a sequence, neighbours don't change a bit of the logits."""
    made = load_small(n_parallel=3, kv_cells=3 * 256, flash_attention="off")
    yield made
    made.close()


def test_what_was_loaded_is_told(engine: LlamaCppEngine) -> None:
    info = engine.info
    assert (info.engine, info.architecture, info.backend) == ("llama_cpp", "llama", "llama_cpp-cpu")
    assert (info.n_ctx, info.n_parallel, info.kv_cells, info.vocabulary_size) == (512, 3, 1536, 49152)
    assert info.has_template and "llama.cpp" in info.version


def test_greedy_answers_are_those_of_llama_cpp_python(engine: LlamaCppEngine) -> None:
    import llama_cpp

    options: dict[str, Any] = {"flash_attn": True, "n_batch": 512, "n_ctx": 512, "n_threads": 1, "n_threads_batch": 1}
    reference = llama_cpp.Llama(str(embedded_model()), verbose=False, **options)
    try:
        for question in QUESTIONS:
            prompt = engine.tokens_of(chat(question))
            reference.reset()
            expected: list[int] = []
            for token in reference.generate(list(prompt), temp=0.0, repeat_penalty=1.0, reset=True):
                expected.append(int(token))
                if len(expected) == 128 or engine.is_end(expected[-1]):
                    break
            assert generate(engine, prompt, 128) == expected, question
            assert text_of(engine, expected[:-1]).encode() == reference.detokenize(expected[:-1])
    finally:
        reference.close()


def test_the_template_gives_the_ids_of_llama_cpp_pythons_own_rendering(engine: LlamaCppEngine) -> None:
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    from skulk.engines.llama_cpp.loader import metadata
    from skulk.engines.llama_cpp.native import library

    assert engine._model is not None
    template = metadata(library(), engine._model, "tokenizer.chat_template")
    assert template is not None
    formatter = Jinja2ChatFormatter(template=template, eos_token="<|im_end|>", bos_token="<|im_start|>")
    rendered = formatter(messages=[{"role": "user", "content": QUESTIONS[2]}]).prompt
    expected = engine._vocabulary.tokenise(rendered, parse_special=True)
    assert engine.tokens_of(chat(QUESTIONS[2])) == expected


def test_slots_in_one_batch_answer_as_alone(exact: LlamaCppEngine) -> None:
    prompts = [exact.tokens_of(chat(question)) for question in QUESTIONS]
    alone = [generate(exact, prompt, 24) for prompt in prompts]
    stepper = Stepper(exact)
    for slot, prompt in enumerate(prompts):
        stepper.begin(slot, prompt)
        stepper.step()
    for _ in range(24):
        stepper.step()
    for slot in range(3):
        stepper.end(slot)
    assert [stepper.tokens[slot][: len(tokens)] for slot, tokens in enumerate(alone)] == alone


def test_a_run_draws_what_its_steps_draw(exact: LlamaCppEngine) -> None:
    """Three slots with samplings of their own, up to 60 tokens or the first end."""
    samplings = (GREEDY, Sampling(temperature=1.0, top_k=40, seed=3), Sampling(temperature=0.8, seed=4))
    prompts = [exact.tokens_of(chat(question)) for question in QUESTIONS]
    stepper = Stepper(exact)
    runner = Stepper(exact)
    for one in (stepper, runner):
        for slot, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            one.begin(slot, prompt, sampling)
        one.step()
        while (left := 60 - len(one.tokens[0])) and not any(exact.is_end(tokens[-1]) for tokens in one.tokens.values()):
            one.step(min(7, left) if one is runner else 1)
        for slot in range(3):
            one.end(slot)
    assert runner.tokens == stepper.tokens
    assert len(runner.tokens[0]) > 8


def test_a_slot_that_ended_is_empty(exact: LlamaCppEngine) -> None:
    """What was in a slot before leaves no trace; its neighbours stay."""
    first, second, third = (exact.tokens_of(chat(question)) for question in QUESTIONS)
    expected = generate(exact, third, 16)
    stepper = Stepper(exact)
    stepper.begin(0, first)
    stepper.begin(1, second)
    for _ in range(8):
        stepper.step()
    stepper.end(0)
    stepper.begin(0, third)
    for _ in range(16):
        stepper.step()
    stepper.end(0)
    stepper.end(1)
    assert stepper.tokens[0] == expected


def test_chunks_of_a_prompt_give_the_same_beginning(exact: LlamaCppEngine) -> None:
    prompt = exact.tokens_of(chat(QUESTIONS[0]))
    expected = generate(exact, prompt, 8)
    exact.begin(0, GREEDY, prompt)
    for start in range(0, len(prompt) - 5, 16):
        chunk = prompt[start : min(start + 16, len(prompt) - 5)]
        assert exact.run(StepPlan(rows=(StepRow(slot=0, tokens=chunk, start=start, sample=False),))).sampled == {}
    result = exact.run(StepPlan(rows=(StepRow(slot=0, tokens=prompt[-5:], start=len(prompt) - 5, sample=True),)))
    exact.end(0)
    exact.keep(0, 0)
    assert result.sampled[0] == (expected[0],)


def test_a_step_of_more_than_a_batch_takes_several_calls() -> None:
    engine = load_small(n_batch=16, n_ubatch=16)
    try:
        prompts = [engine.tokens_of(chat(question)) for question in QUESTIONS[:2]]
        assert min(len(prompt) for prompt in prompts) > 16
        stepper = Stepper(engine)
        stepper.begin(0, prompts[0])
        stepper.begin(1, prompts[1])
        for _ in range(6):
            stepper.step()
        both = [stepper.tokens[slot] for slot in (0, 1)]
        stepper.end(0)
        stepper.end(1)
        assert [generate(engine, prompt, 6) for prompt in prompts] == both
    finally:
        engine.close()


def test_a_unified_cache_is_shared_and_its_end_is_an_error() -> None:
    engine = load_small(n_parallel=2, context_length=256, kv_cells=256)
    try:
        assert (engine.info.kv_cells, engine.info.n_ctx) == (256, 256)
        prompt = engine.tokens_of(TextPrompt(text="fox " * 150))
        assert 128 < len(prompt) < 256
        engine.begin(0, GREEDY, prompt)
        engine.begin(1, GREEDY, prompt)
        engine.run(StepPlan(rows=(StepRow(slot=0, tokens=prompt, start=0, sample=True),)))
        with pytest.raises(ServiceError, match=r"no room for .* in a cache of 256 cells") as caught:
            engine.run(StepPlan(rows=(StepRow(slot=1, tokens=prompt, start=0, sample=True),)))
        assert caught.value.code == "runner_failed"
        engine.end(0)
        engine.keep(0, 0)
        engine.run(StepPlan(rows=(StepRow(slot=1, tokens=prompt, start=0, sample=True),)))
        engine.end(1)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def prompt(engine: LlamaCppEngine) -> tuple[int, ...]:
    return engine.tokens_of(chat("Tell me a story."))


class TestSampling:
    def test_a_seed_repeats_and_another_differs(self, engine: LlamaCppEngine, prompt: tuple[int, ...]) -> None:
        hot = Sampling(temperature=1.0, seed=1)
        first = generate(engine, prompt, 12, hot)
        assert generate(engine, prompt, 12, hot) == first
        assert generate(engine, prompt, 12, Sampling(temperature=1.0, seed=2)) != first

    def test_no_seed_is_a_new_one_each_time(self, engine: LlamaCppEngine, prompt: tuple[int, ...]) -> None:
        drawn = {tuple(generate(engine, prompt, 16, Sampling(temperature=1.5))) for _ in range(3)}
        assert len(drawn) > 1

    def test_choices_of_one_seed_differ(self, engine: LlamaCppEngine, prompt: tuple[int, ...]) -> None:
        hot = Sampling(temperature=1.2, seed=5)
        drawn = {tuple(generate(engine, prompt, 16, hot, choice=choice)) for choice in range(3)}
        assert len(drawn) == 3

    @pytest.mark.parametrize(
        "sampling", [Sampling(top_k=1), Sampling(top_p=0.0), Sampling(min_p=1.0), Sampling(temperature=0.0, seed=9)]
    )
    def test_the_narrowest_choice_is_greedy(
        self, engine: LlamaCppEngine, prompt: tuple[int, ...], sampling: Sampling
    ) -> None:
        assert generate(engine, prompt, 8, sampling) == generate(engine, prompt, 8)

    def test_a_bias_decides_even_greedily(self, engine: LlamaCppEngine, prompt: tuple[int, ...]) -> None:
        [fox] = engine.tokens_of(TextPrompt(text=" fox"))
        assert generate(engine, prompt, 3, Sampling(temperature=0.0, logit_bias={fox: 100.0})) == [fox] * 3
        [best] = generate(engine, prompt, 1)
        banned = Sampling(temperature=0.0, logit_bias={best: -100.0})
        assert generate(engine, prompt, 1, banned) != [best]

    def test_penalties_look_back_on_history_and_answer(self, engine: LlamaCppEngine, prompt: tuple[int, ...]) -> None:
        [fox] = engine.tokens_of(TextPrompt(text=" fox"))
        bias = {fox: 40.0}
        loud = Sampling(temperature=0.0, logit_bias=bias, presence_penalty=100.0)
        assert generate(engine, prompt, 2, loud)[0] == fox
        assert generate(engine, prompt, 2, loud)[1] != fox, "the answer counts"
        assert generate(engine, (*prompt, fox), 1, loud) != [fox], "the history counts"
        short = msgspec.structs.replace(loud, repeat_last_n=0)
        assert generate(engine, (*prompt, fox), 1, short) == [fox], "unless nothing is looked back on"

    def test_a_bad_value_leaves_the_slot_free(self, engine: LlamaCppEngine, prompt: tuple[int, ...]) -> None:
        with pytest.raises(RequestError, match="logit_bias names the token 49152"):
            engine.begin(0, Sampling(logit_bias={49152: 1.0}), prompt)
        assert len(generate(engine, prompt, 1)) == 1


class TestPieces:
    def test_characters_come_in_bytes(self, engine: LlamaCppEngine) -> None:
        text = "🦊 東京 Grüße\n\ttab"
        tokens = engine.tokens_of(TextPrompt(text=text))
        pieces = [engine.piece(token) for token in tokens]
        assert b"".join(pieces).decode() == text
        assert any(not _is_text(piece) for piece in pieces), "some tokens cut a character"

    def test_control_tokens_have_no_text(self, engine: LlamaCppEngine) -> None:
        ends = [token for token in range(engine.info.vocabulary_size) if engine.is_end(token)]
        assert 2 in ends
        assert all(engine.piece(token) == b"" for token in range(17))


def _is_text(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


class TestPromises:
    """A broken plan is a broken invariant: it must not reach native code."""

    @pytest.mark.parametrize(
        "rows",
        [
            (),
            (StepRow(slot=0, tokens=(), start=0, sample=True),),
            (StepRow(slot=0, tokens=(5,), start=1, sample=True),),
            (StepRow(slot=1, tokens=(5,), start=0, sample=True),),
            (StepRow(slot=0, tokens=(5,) * 513, start=0, sample=True),),
            (StepRow(slot=0, tokens=(49152,), start=0, sample=True),),
            (StepRow(slot=0, tokens=(-1,), start=0, sample=True),),
            (StepRow(slot=0, tokens=(5,), start=0, sample=False), StepRow(slot=0, tokens=(5,), start=1, sample=True)),
        ],
    )
    def test_broken_plans(self, engine: LlamaCppEngine, rows: tuple[StepRow, ...]) -> None:
        engine.begin(0, GREEDY, ())
        try:
            with pytest.raises(AssertionError):
                engine.run(StepPlan(rows=rows))
        finally:
            engine.end(0)

    def test_slots_begin_once(self, engine: LlamaCppEngine) -> None:
        engine.begin(2, GREEDY, ())
        for slot in (2, 3, -1):
            with pytest.raises(AssertionError):
                engine.begin(slot, GREEDY, ())
        engine.end(2)

    def test_token_prompts_are_checked(self, engine: LlamaCppEngine) -> None:
        assert engine.tokens_of(TokenPrompt(tokens=(1, 2, 49151))) == (1, 2, 49151)
        for wrong in ((1, 49152), (-1,)):
            with pytest.raises(RequestError, match="0 to 49151"):
                engine.tokens_of(TokenPrompt(tokens=wrong))
