"""OpenAI requests: the table of fields, what is refused and where, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.errors import RequestError
from skulk.gateway.bodies import json_object, read_as
from skulk.gateway.openai.embeddings import (
    DETOKENIZE_FIELDS,
    EMBEDDING_FIELDS,
    RERANK_FIELDS,
    TOKENIZE_FIELDS,
    DetokenizeRequest,
    EmbeddingRequest,
    RerankRequest,
    TokenizeRequest,
)
from skulk.gateway.openai.fields import CHAT_FIELDS, COMPLETION_FIELDS, Field
from skulk.gateway.openai.requests import ChatRequest, CompletionRequest, read_chat, read_completion
from skulk.wire.generation import ChatMessage, ChatPrompt, FunctionCall, InfillPrompt, TextPrompt, TokenPrompt, ToolCall
from tests.support.states import card

CARD = card()
THINKER = msgspec.structs.replace(CARD, capabilities=("text", "thinking"))
USER = {"role": "user", "content": "Hi"}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "org/model", "messages": [USER], **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "org/model", "prompt": "Once", **fields}


def refused(body: dict[str, Any]) -> tuple[str, str | None]:
    with pytest.raises(RequestError) as caught:
        read_chat(body, CARD)
    assert caught.value.http_status == 400
    return caught.value.code, caught.value.param


@pytest.mark.parametrize(
    ("table", "record"),
    [
        (CHAT_FIELDS, ChatRequest),
        (COMPLETION_FIELDS, CompletionRequest),
        (EMBEDDING_FIELDS, EmbeddingRequest),
        (RERANK_FIELDS, RerankRequest),
        (TOKENIZE_FIELDS, TokenizeRequest),
        (DETOKENIZE_FIELDS, DetokenizeRequest),
    ],
)
def test_the_table_honours_exactly_what_the_struct_reads(table: dict[str, Field], record: Any) -> None:
    honoured = {name for name, field in table.items() if field.treatment == "honoured"}
    assert honoured == set(record.__struct_fields__)


# From OpenAI's reference of the two calls.
DOCUMENTED_CHAT = [
    "messages",
    "model",
    "audio",
    "frequency_penalty",
    "function_call",
    "functions",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_tokens",
    "metadata",
    "modalities",
    "n",
    "parallel_tool_calls",
    "prediction",
    "presence_penalty",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "response_format",
    "safety_identifier",
    "seed",
    "service_tier",
    "stop",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "tool_choice",
    "tools",
    "top_logprobs",
    "top_p",
    "user",
    "verbosity",
    "web_search_options",
]
DOCUMENTED_COMPLETION = [
    "model",
    "prompt",
    "best_of",
    "echo",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "n",
    "presence_penalty",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "suffix",
    "temperature",
    "top_p",
    "user",
]


def test_every_documented_field_stands_in_the_table() -> None:
    assert set(DOCUMENTED_CHAT) <= set(CHAT_FIELDS)
    assert set(DOCUMENTED_COMPLETION) <= set(COMPLETION_FIELDS)


def test_a_refused_field_says_what_it_would_need() -> None:
    for table in (CHAT_FIELDS, COMPLETION_FIELDS):
        assert all(field.needs for field in table.values() if field.treatment == "refused")


@pytest.mark.parametrize("name", [name for name, field in CHAT_FIELDS.items() if field.treatment == "refused"])
def test_refused_fields_name_themselves_and_null_is_not_sent(name: str) -> None:
    with pytest.raises(RequestError, match="this version lacks") as caught:
        read_chat(chat(**{name: {"anything": 1}}), CARD)
    assert (caught.value.code, caught.value.param) == ("unsupported_field", name)
    assert read_chat(chat(**{name: None}), CARD).inert == ()


@pytest.mark.parametrize(
    "harmless",
    [
        {"tools": []},
        {"tool_choice": "none"},
        {"response_format": {"type": "text"}},
        {"logprobs": False},
        {"top_logprobs": 0},
        {"modalities": ["text"]},
    ],
)
def test_values_that_ask_for_nothing_are_accepted(harmless: dict[str, Any]) -> None:
    assert read_chat(chat(**harmless), CARD).generations[0].n == 1


def test_zero_is_not_false() -> None:
    assert refused(chat(logprobs=0)) == ("unsupported_field", "logprobs")
    assert refused(chat(top_logprobs=False)) == ("unsupported_field", "top_logprobs")


def test_inert_fields_are_named_in_the_order_sent() -> None:
    asked = read_chat(chat(user="me", metadata={"a": "b"}, enable_thinking=False, reasoning_effort="low"), CARD)
    assert asked.inert == ("user", "metadata", "enable_thinking", "reasoning_effort")
    assert asked.generations[0].prompt == ChatPrompt(messages=(ChatMessage(role="user", content="Hi"),))


def test_a_model_that_thinks_heeds_the_toggle() -> None:
    asked = read_chat(chat(enable_thinking=False), THINKER)
    assert asked.inert == ()
    assert isinstance(asked.generations[0].prompt, ChatPrompt)
    assert asked.generations[0].prompt.variables == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": 5}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**40}, "seed"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"top_n_sigma": -2}, "top_n_sigma"),
        ({"xtc_probability": 1.1}, "xtc_probability"),
        ({"xtc_threshold": -0.1}, "xtc_threshold"),
        ({"mirostat": 3}, "mirostat"),
        ({"mirostat": 1.5}, "mirostat"),
        ({"mirostat_tau": -1}, "mirostat_tau"),
        ({"mirostat_eta": 2}, "mirostat_eta"),
        ({"dry_multiplier": -1}, "dry_multiplier"),
        ({"dry_base": 0.9}, "dry_base"),
        ({"dry_allowed_length": -1}, "dry_allowed_length"),
        ({"dry_penalty_last_n": -2}, "dry_penalty_last_n"),
        ({"dry_sequence_breakers": []}, "dry_sequence_breakers"),
        ({"dry_sequence_breakers": [""]}, "dry_sequence_breakers[0]"),
        ({"dry_sequence_breakers": ["x" * 41]}, "dry_sequence_breakers[0]"),
        ({"dry_sequence_breakers": "\n"}, "dry_sequence_breakers"),
        ({"grammar": "#" * 65_537}, "grammar"),
        ({"grammar": {"root": "yes"}}, "grammar"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
        ({"logit_bias": []}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include": 1}}, "stream_options.include"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "wizard", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "function", "content": "Hi"}]}, "messages[0].role"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "smell", "text": "x"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        (
            {"messages": [{**USER, "tool_calls": [{"id": "c", "function": {"name": "f"}}]}]},
            "messages[0].tool_calls",
        ),
    ],
)
def test_wrong_values_are_refused_at_their_place(fields: dict[str, Any], param: str) -> None:
    assert refused(chat(**fields)) == ("invalid_request", param)


def test_an_empty_grammar_asks_for_nothing() -> None:
    assert read_chat(chat(grammar=""), CARD).generations[0].sampling.grammar is None


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video_url"])
def test_other_parts_than_text_are_what_this_version_lacks(kind: str) -> None:
    parts = [{"type": "text", "text": "What is this?"}, {"type": kind, kind: {"url": "data:"}}]
    with pytest.raises(RequestError, match="this version lacks") as caught:
        read_chat(chat(messages=[{"role": "user", "content": parts}]), CARD)
    assert (caught.value.code, caught.value.param) == ("unsupported_field", "messages[0].content[1]")


def test_follow_up_turns_with_the_extras_that_clients_send() -> None:
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}", "extra": 1}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "audio": None},
        {"role": "tool", "tool_call_id": "c1", "name": "now", "content": "noon"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "reasoning_content": "hm"},
    ]
    prompt = read_chat(chat(messages=messages), CARD).generations[0].prompt
    assert prompt == ChatPrompt(
        messages=(
            ChatMessage(role="developer", content="Be brief."),
            ChatMessage(role="user", content="a\nb"),
            ChatMessage(
                role="assistant",
                tool_calls=(ToolCall(id="c1", function=FunctionCall(name="now", arguments="{}")),),
            ),
            ChatMessage(role="tool", content="noon", name="now", tool_call_id="c1"),
            ChatMessage(role="assistant", content="no", reasoning_content="hm"),
        )
    )


def test_what_is_honoured_arrives() -> None:
    asked = read_chat(
        chat(
            temperature=1,
            top_p=0.5,
            top_k=7,
            min_p=0.1,
            typical_p=0.9,
            top_n_sigma=1.5,
            xtc_probability=0.5,
            xtc_threshold=0.2,
            mirostat=2,
            mirostat_tau=4,
            mirostat_eta=0.2,
            dry_multiplier=0.8,
            dry_base=2,
            dry_allowed_length=3,
            dry_penalty_last_n=-1,
            dry_sequence_breakers=["\n", "."],
            repeat_penalty=1.1,
            repeat_last_n=-1,
            presence_penalty=1,
            frequency_penalty=-1,
            logit_bias={"42": -100},
            seed=-1,
            grammar='root ::= "a"',
            stop=["a", "b"],
            max_completion_tokens=9,
            ignore_eos=True,
            n=8,
            stream=True,
            stream_options={"include_usage": True},
        ),
        CARD,
    )
    sampling, limits = asked.generations[0].sampling, asked.generations[0].limits
    assert msgspec.structs.asdict(sampling) == {
        "temperature": 1.0,
        "top_k": 7,
        "top_p": 0.5,
        "min_p": 0.1,
        "typical_p": 0.9,
        "top_n_sigma": 1.5,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.2,
        "mirostat": 2,
        "mirostat_tau": 4.0,
        "mirostat_eta": 0.2,
        "dry_multiplier": 0.8,
        "dry_base": 2.0,
        "dry_allowed_length": 3,
        "dry_penalty_last_n": -1,
        "dry_sequence_breakers": ("\n", "."),
        "repeat_penalty": 1.1,
        "repeat_last_n": -1,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "logit_bias": {42: -100.0},
        "seed": -1,
        "grammar": 'root ::= "a"',
    }
    assert (limits.max_tokens, limits.stop, limits.ignore_eos) == (9, ("a", "b"), True)
    assert (asked.generations[0].n, asked.stream, asked.include_usage) == (8, True, True)
    assert read_chat(chat(max_tokens=5, max_completion_tokens=5), CARD).generations[0].limits.max_tokens == 5
    assert read_chat(chat(stop="x"), CARD).generations[0].limits.stop == ("x",)
    assert read_chat(chat(), CARD).generations[0].limits.max_tokens is None


def test_the_prompts_of_completions() -> None:
    def prompt_of(sent: Any) -> Any:
        return read_completion(completion(prompt=sent), CARD).generations[0].prompt

    assert prompt_of("a") == prompt_of(["a"]) == TextPrompt(text="a")
    assert prompt_of([1, 2]) == prompt_of([[1, 2]]) == TokenPrompt(tokens=(1, 2))
    for sent, code in (
        ([], "invalid_request"),
        (["a", []], "invalid_request"),
        (["a", {}], "invalid_request"),
        ([[1], [2, "b"]], "invalid_request"),
        (["a"] * 129, "invalid_request"),
        ([1, "a"], "invalid_request"),
        ([-1], "invalid_request"),
        ([True], "invalid_request"),
        ([2**40], "invalid_request"),
        ({}, "invalid_request"),
        ([[]], "invalid_request"),
    ):
        with pytest.raises(RequestError) as caught:
            prompt_of(sent)
        assert (caught.value.code, caught.value.param) == (code, "prompt"), sent


def test_several_prompts_are_one_generation_each() -> None:
    asked = read_completion(completion(prompt=["a", [1, 2], ""], n=2, seed=7, max_tokens=3), CARD)
    assert [one.prompt for one in asked.generations] == [
        TextPrompt(text="a"),
        TokenPrompt(tokens=(1, 2)),
        TextPrompt(text=""),
    ]
    assert {(one.n, one.sampling.seed, one.limits.max_tokens) for one in asked.generations} == {(2, 7, 3)}
    assert asked.echo == ()
    asked = read_completion(completion(prompt=["a", "b"], suffix="z", echo=True), CARD)
    assert [one.prompt for one in asked.generations] == [
        InfillPrompt(prefix="a", suffix="z"),
        InfillPrompt(prefix="b", suffix="z"),
    ]
    assert asked.echo == (TextPrompt(text="a"), TextPrompt(text="b"))
    with pytest.raises(RequestError) as caught:
        read_completion(completion(prompt=["a", [1]], suffix="z"), CARD)
    assert caught.value.param == "suffix"
    assert len(read_completion(completion(prompt=["a"] * 128), CARD).generations) == 128


def test_completions_default_to_sixteen_tokens() -> None:
    assert read_completion(completion(), CARD).generations[0].limits.max_tokens == 16
    for name, value in (("best_of", 2), ("logprobs", 0)):
        with pytest.raises(RequestError) as caught:
            read_completion(completion(**{name: value}), CARD)
        assert (caught.value.code, caught.value.param) == ("unsupported_field", name)


def test_a_suffix_makes_a_gap_to_fill() -> None:
    gap = read_completion(completion(suffix=" ends."), CARD).generations[0].prompt
    assert gap == InfillPrompt(prefix="Once", suffix=" ends.")
    assert read_completion(completion(suffix=""), CARD).generations[0].prompt == TextPrompt(text="Once")
    with pytest.raises(RequestError) as caught:
        read_completion(completion(prompt=[1, 2], suffix="x"), CARD)
    assert caught.value.param == "suffix"


def test_a_model_that_gives_vectors_is_not_asked_for_text() -> None:
    embedder = msgspec.structs.replace(CARD, tasks=("TextEmbedding",))
    for read, body in ((read_chat, chat()), (read_completion, completion())):
        with pytest.raises(RequestError, match="/v1/embeddings"):
            read(body, embedder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


def outcome_of(read: Callable[[], Any]) -> Any:
    """What a reader gave, or its refusal; any other exception fails the test."""
    try:
        return read()
    except RequestError as error:
        return error


@given(st.dictionaries(st.sampled_from(sorted(CHAT_FIELDS)) | st.text(max_size=8), JSON, max_size=6))
def test_no_json_object_is_more_than_a_refusal(fields: dict[str, Any]) -> None:
    for read in (lambda: read_chat(chat(**fields), CARD), lambda: read_completion(completion(**fields), CARD)):
        outcome = outcome_of(read)
        if isinstance(outcome, RequestError):
            assert outcome.code in ("invalid_request", "unsupported_field")
            assert outcome.detail
        else:
            assert 1 <= outcome.generations[0].n <= 8


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode) | JSON.map(msgspec.json.encode))
def test_no_bytes_are_more_than_a_refusal(body: bytes) -> None:
    outcome = outcome_of(lambda: json_object(body))
    assert isinstance(outcome, dict) or outcome.code == "invalid_request"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b'{"a":1} x', "no JSON"),
        (b'{"a":NaN}', "no JSON"),
        (b'{"a":"\xff"}', "no JSON"),
        (b"[1]", "not an array"),
        (b"null", "not null"),
        (b"true", "not a boolean"),
        (b'"x"', "not a string"),
        (b"5", "not a number"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":1e999}', "out of range"),
        (b'{"a":' + b"9" * 5000 + b"}", "out of range"),
    ],
)
def test_bodies_that_are_no_object(body: bytes, text: str) -> None:
    with pytest.raises(RequestError, match=text) as caught:
        json_object(body)
    assert caught.value.code == "invalid_request"


class Inner(msgspec.Struct):
    name: str


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    inner: Inner


def test_a_missing_field_inside_is_named_with_its_path() -> None:
    for fields, param in (({"inner": {}}, "inner.name"), ({}, "inner"), ({"inner": {"name": "x"}, "more": 1}, "more")):
        with pytest.raises(RequestError) as caught:
            read_as(fields, Outer)
        assert caught.value.param == param
