"""Who is refused at the door, with which code, and naming which field."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from skulk.batching.admission import BatchShape, admit, check_fields, check_room, with_defaults
from skulk.batching.requests import BatchRequest
from skulk.errors import RequestError, UnavailableError
from skulk.wire.generation import (
    ChatMessage,
    ChatPrompt,
    Generate,
    Limits,
    Resume,
    ResumedChoice,
    Sampling,
    TextPrompt,
    TokenPrompt,
)
from skulk.wire.model import SamplingDefaults
from tests.support.batches import shape_of

GENERATE = Generate(
    request_id="r",
    gateway_id="g",
    gateway_incarnation="1",
    model_id="m",
    prompt=TextPrompt(text="hi"),
)
SHAPE = shape_of(n_ctx=100)


def admitted(generate: Generate, count: int, shape: BatchShape = SHAPE) -> BatchRequest:
    return admit(generate, tuple(range(count)), shape, arrived_at=5.0, default_timeout_s=60.0)


def limited(**limits: object) -> Generate:
    return msgspec.structs.replace(GENERATE, limits=msgspec.convert(limits, Limits))


def sampled(**fields: Any) -> Generate:
    return msgspec.structs.replace(GENERATE, sampling=Sampling(**fields))


@pytest.mark.parametrize(
    ("generate", "param"),
    [
        (limited(max_tokens=0), "max_tokens"),
        (limited(max_tokens=-3), "max_tokens"),
        (limited(stop=[""]), "stop"),
        (limited(stop=["x"] * 17), "stop"),
        (limited(stop=["x" * 5000]), "stop"),
        (msgspec.structs.replace(GENERATE, n=0), "n"),
        (msgspec.structs.replace(GENERATE, n=13), "n"),
        (msgspec.structs.replace(GENERATE, attempt=0), "attempt"),
        (msgspec.structs.replace(GENERATE, timeout_s=0.0), "timeout_s"),
        (msgspec.structs.replace(GENERATE, timeout_s=math.nan), "timeout_s"),
        (msgspec.structs.replace(GENERATE, sampling=Sampling(temperature=-0.1)), "temperature"),
        (msgspec.structs.replace(GENERATE, sampling=Sampling(temperature=math.nan)), "temperature"),
        (msgspec.structs.replace(GENERATE, sampling=Sampling(top_p=1.5)), "top_p"),
        (msgspec.structs.replace(GENERATE, sampling=Sampling(top_k=-2)), "top_k"),
        (msgspec.structs.replace(GENERATE, sampling=Sampling(repeat_penalty=0.0)), "repeat_penalty"),
        (sampled(mirostat=3), "mirostat"),
        (sampled(xtc_probability=math.inf), "xtc_probability"),
        (sampled(dry_base=0.99), "dry_base"),
        (sampled(dry_sequence_breakers=()), "dry_sequence_breakers"),
        (sampled(dry_sequence_breakers=("é" * 21,)), "dry_sequence_breakers"),
        (sampled(dry_sequence_breakers=("x",) * 17), "dry_sequence_breakers"),
        (sampled(grammar="#" * 65_537), "grammar"),
        (msgspec.structs.replace(GENERATE, sampling=Sampling(logit_bias={257: 1.0})), "logit_bias"),
        (sampled(logit_bias={4: 1e10}), "logit_bias"),
        (sampled(logit_bias=dict.fromkeys(range(4097), 0.0)), "logit_bias"),
        (msgspec.structs.replace(GENERATE, sampling=Sampling(logit_bias={-1: 1.0})), "logit_bias"),
        (msgspec.structs.replace(GENERATE, prompt=TokenPrompt(tokens=(3, 257))), "prompt"),
        (
            msgspec.structs.replace(
                GENERATE, resume=Resume(prompt_tokens=(1,), emitted_tokens=(-5,), sent_characters=0)
            ),
            "resume",
        ),
        (
            msgspec.structs.replace(GENERATE, resume=Resume(prompt_tokens=(1,), emitted_tokens=(), sent_characters=-1)),
            "resume",
        ),
        (msgspec.structs.replace(GENERATE, sampling=Sampling(logit_bias={4: math.nan})), "logit_bias"),
        (msgspec.structs.replace(GENERATE, prompt=ChatPrompt(messages=())), "messages"),
        (msgspec.structs.replace(GENERATE, prompt=TextPrompt(text="")), "prompt"),
        (msgspec.structs.replace(GENERATE, prompt=TokenPrompt(tokens=())), "prompt"),
        (
            msgspec.structs.replace(
                GENERATE, n=2, resume=Resume(prompt_tokens=(1,), emitted_tokens=(), sent_characters=0)
            ),
            "resume",
        ),
        (
            msgspec.structs.replace(
                GENERATE,
                n=2,
                resume=Resume(
                    prompt_tokens=(1,),
                    emitted_tokens=(),
                    sent_characters=0,
                    others=(ResumedChoice(emitted_tokens=(999,)),),
                ),
            ),
            "resume",
        ),
    ],
)
def test_wrong_fields_are_refused_by_name(generate: Generate, param: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_fields(generate, SHAPE)
    assert (refused.value.code, refused.value.param) == ("invalid_request", param)


def test_usual_fields_pass() -> None:
    check_fields(limited(max_tokens=5, stop=["\n"]), SHAPE)
    check_fields(
        msgspec.structs.replace(
            GENERATE,
            sampling=Sampling(
                temperature=0.0, top_p=0.0, top_k=0, repeat_last_n=-1, presence_penalty=-2.0, logit_bias={256: -100.0}
            ),
        ),
        SHAPE,
    )


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RequestError, match="empty") as refused:
        admitted(GENERATE, 0)
    assert refused.value.code == "invalid_request"


@pytest.mark.parametrize("count", [100, 101, 5000])
def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_with_both_numbers(count: int) -> None:
    with pytest.raises(RequestError, match=rf"{count} tokens.* 100 tokens") as refused:
        admitted(GENERATE, count)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
    chat = msgspec.structs.replace(GENERATE, prompt=ChatPrompt(messages=(ChatMessage(role="user", content="x"),)))
    with pytest.raises(RequestError) as refused:
        admitted(chat, count)
    assert refused.value.param == "messages"


def test_an_explicit_limit_that_cannot_fit_is_refused() -> None:
    assert admitted(limited(max_tokens=40), 60).max_tokens == 40
    with pytest.raises(RequestError, match="60 tokens and max_tokens 41") as refused:
        admitted(limited(max_tokens=41), 60)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "max_tokens")


def test_an_omitted_limit_is_what_the_window_holds() -> None:
    assert admitted(GENERATE, 99).max_tokens == 1
    assert admitted(GENERATE, 60).max_tokens == 40


def test_the_deadline_is_the_request_s_own_or_the_default() -> None:
    assert admitted(GENERATE, 1).deadline == 65.0
    assert admitted(msgspec.structs.replace(GENERATE, timeout_s=2.0), 1).deadline == 7.0


def test_a_resumed_answer_must_fit_too() -> None:
    resume = Resume(prompt_tokens=(1,) * 90, emitted_tokens=(2,) * 11, sent_characters=0)
    with pytest.raises(RequestError) as refused:
        admit(
            msgspec.structs.replace(GENERATE, resume=resume),
            resume.prompt_tokens,
            SHAPE,
            arrived_at=0.0,
            default_timeout_s=1.0,
        )
    assert refused.value.code == "context_length_exceeded"


def test_room_ends_with_the_queue_and_says_when_to_come_back() -> None:
    check_room(SHAPE, open_sequences=11, n=1, request_s=0.0)
    with pytest.raises(UnavailableError) as refused:
        check_room(SHAPE, open_sequences=12, n=1, request_s=10.0)
    assert (refused.value.code, refused.value.retry_after_s) == ("overloaded", 12.0)
    with pytest.raises(UnavailableError) as refused:
        check_room(SHAPE, open_sequences=11, n=2, request_s=0.0)
    assert refused.value.retry_after_s == 1.0
    with pytest.raises(UnavailableError) as refused:
        check_room(SHAPE, open_sequences=12, n=1, request_s=1e6)
    assert refused.value.retry_after_s == 60.0


def test_a_shape_that_could_not_decode_beside_prefill_is_a_defect() -> None:
    with pytest.raises(AssertionError):
        shape_of(n_parallel=16, n_batch=16, n_ubatch=16)
    with pytest.raises(AssertionError):
        shape_of(n_ctx=100, kv_cells=99)


def test_the_card_s_sampling_fills_what_a_request_leaves_open() -> None:
    card = SamplingDefaults(temperature=0.6, top_k=20)
    asked = msgspec.structs.replace(GENERATE, sampling=Sampling(top_k=1, seed=7, logit_bias={3: 1.0}))
    filled = with_defaults(asked, card).sampling
    assert filled == Sampling(temperature=0.6, top_k=1, seed=7, logit_bias={3: 1.0})
    assert with_defaults(asked, SamplingDefaults()) is asked
    assert (
        with_defaults(msgspec.structs.replace(GENERATE, sampling=Sampling(temperature=0.0)), card).sampling.temperature
        == 0.0
    )
