"""OpenAI's own client against the gateway: what it parses, and what it raises where something is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from skulk.bus.streams import StreamWriter
from skulk.errors import RequestError, UnavailableError
from skulk.wire.base import ErrorBody
from skulk.wire.generation import StreamEnd
from tests.support.http import MODEL, FakeRunner, Gateway, running_gateway

USER: Any = {"role": "user", "content": "Hi"}


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    async with running_gateway(tmp_path) as running:
        yield running


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_chat_whole_and_streamed(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    await gateway.serve_model()
    whole = await client.chat.completions.create(model=MODEL, messages=[USER], n=2, seed=1, stop=["x"], user="me")
    assert [choice.message.content for choice in whole.choices] == ["Hello world", "Hello world"]
    assert whole.usage is not None and whole.usage.prompt_tokens_details is not None
    assert (whole.usage.total_tokens, whole.usage.prompt_tokens_details.cached_tokens) == (7, 1)
    stream = await client.chat.completions.create(
        model=MODEL, messages=[USER], n=2, stream=True, stream_options={"include_usage": True}
    )
    texts, finishes, usage = ["", ""], [0, 0], None
    async for chunk in stream:
        assert (chunk.object, chunk.model) == ("chat.completion.chunk", MODEL)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] += choice.finish_reason is not None
        usage = chunk.usage or usage
    assert (texts, finishes) == (["Hello world"] * 2, [1, 1])
    assert usage is not None and usage.completion_tokens == 2


async def test_the_client_s_own_collector_of_streams(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    await gateway.serve_model()
    async with client.chat.completions.stream(model=MODEL, messages=[USER]) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert kinds.count("content.done") == 1
    assert (final.choices[0].message.content, final.choices[0].finish_reason) == ("Hello world", "stop")


async def test_completions_embeddings_and_models(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    runner = await gateway.serve_model()
    text = await client.completions.create(model=MODEL, prompt="Once", echo=True, max_tokens=3, logit_bias={"5": -1})
    assert text.choices[0].text == "OnceHello world"
    assert runner.asked[0].sampling.logit_bias == {5: -1.0}
    pieces = [
        part.choices[0].text async for part in await client.completions.create(model=MODEL, prompt=[1, 2], stream=True)
    ]
    assert pieces[:2] == ["Hello", " world"]
    models = await client.models.list()
    assert MODEL in [model.id async for model in models]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.BadRequestError, match="gives no embeddings"):
        await client.embeddings.create(model=MODEL, input="a")


async def test_raw_answers_and_the_synchronous_client(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    await gateway.serve_model()
    raw = await client.chat.completions.with_raw_response.create(
        model=MODEL, messages=[USER], metadata={"a": "b"}, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["X-Request-Id"] == "mine-1"
    assert raw.headers["X-Skulk-Inert"] == "metadata"
    assert raw.parse().choices[0].message.content == "Hello world"

    def ask() -> str | None:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as plain:
            return plain.chat.completions.create(model=MODEL, messages=[USER]).choices[0].message.content

    assert await asyncio.to_thread(ask) == "Hello world"


async def test_a_grammar_goes_to_the_runner_and_its_refusal_comes_back_before_any_event(
    gateway: Gateway, client: openai.AsyncOpenAI
) -> None:
    runner = await gateway.serve_model()
    extra = {"grammar": 'root ::= "Hello world"'}
    answer = await client.chat.completions.create(model=MODEL, messages=[USER], extra_body=extra)
    assert answer.choices[0].message.content == "Hello world"
    assert runner.asked[0].sampling.grammar == extra["grammar"]
    runner.refusal = RequestError("invalid_request", "grammar: line 1, column 1: no", param="grammar")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="line 1, column 1") as caught:
            await client.chat.completions.create(model=MODEL, messages=[USER], stream=stream, extra_body=extra)
        assert (caught.value.param, caught.value.code) == ("grammar", "invalid_request")


LACKED: list[tuple[str, dict[str, Any]]] = [
    ("tools", {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}),
    ("tool_choice", {"tool_choice": "required"}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("logprobs", {"logprobs": True}),
    ("top_logprobs", {"top_logprobs": 3}),
    ("modalities", {"modalities": ["text", "audio"]}),
    ("web_search_options", {"web_search_options": {}}),
]


@pytest.mark.parametrize(("param", "fields"), LACKED, ids=[param for param, _ in LACKED])
async def test_what_this_version_lacks_is_a_bad_request_with_its_field(
    gateway: Gateway, client: openai.AsyncOpenAI, param: str, fields: dict[str, Any]
) -> None:
    runner = await gateway.serve_model()
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model=MODEL, messages=[USER], **fields)
    assert (caught.value.param, caught.value.code) == (param, "unsupported_field")
    assert "this version lacks" in caught.value.message
    assert runner.asked == []


async def test_an_image_is_a_bad_request_with_its_place(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    await gateway.serve_model()
    part: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError, match="this version lacks") as caught:
        await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": [part]}])
    assert (caught.value.param or "").startswith("messages[0]")


async def test_errors_are_the_client_s_own_by_their_status(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    runner = await gateway.serve_model()
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="no/such", messages=[USER])
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unknown:
        await client.chat.completions.create(model=MODEL, messages=[USER], extra_body={"surprise": 1})
    assert unknown.value.param == "surprise"
    runner.refusal = UnavailableError("overloaded", "no slot", retry_after_s=2)
    with pytest.raises(openai.RateLimitError) as full:
        await client.chat.completions.create(model=MODEL, messages=[USER], stream=True)
    assert full.value.response.headers["Retry-After"] == "2"


async def test_an_error_within_a_stream_is_raised_by_the_client(gateway: Gateway, client: openai.AsyncOpenAI) -> None:
    runner = await gateway.serve_model()

    async def fail(_runner: FakeRunner, writer: StreamWriter) -> None:
        writer.send(0, "Hello", (1,))
        writer.end(StreamEnd(reason="error", error=ErrorBody(code="runner_failed", detail="out of memory")))

    runner.script = fail
    text = ""
    with pytest.raises(openai.APIError, match="out of memory"):
        async for chunk in await client.chat.completions.create(model=MODEL, messages=[USER], stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text == "Hello"
