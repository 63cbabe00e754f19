"""A node as a user runs it, with an embedding model, a ranker and a code model, each placed when first asked for."""

from __future__ import annotations

import base64
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.embedders import SENTENCES, minilm, write_ranker
from tests.support.gguf import with_metadata
from tests.support.real_models import short_copy
from tests.support.whole_node import WholeNode, whole_node

EMBEDDER = "all-MiniLM-L6-v2-F16"
RANKER = "ranker"
CODE = "code"


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[WholeNode]:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / minilm().name).symlink_to(minilm())
    write_ranker(folder / f"{RANKER}.gguf")
    marks = {f"tokenizer.ggml.fim_{name}_token_id": number for name, number in (("pre", 5), ("suf", 6), ("mid", 7))}
    with_metadata(short_copy(), folder / f"{CODE}.gguf", marks)
    async with whole_node(tmp_path / "home", SKULK_MODELS_PATH=str(folder)) as running:
        yield running


async def test_vectors_scores_tokens_and_infill_over_http(node: WholeNode) -> None:
    _, models = await node.call("GET", "/v1/models")
    known = {model["id"]: model for model in models["data"]}
    assert known[EMBEDDER]["tasks"] == ["TextEmbedding"]

    vectors = await embeddings(node)
    await refusals(node, vectors)
    await scores(node)
    await tokens(node)
    await infill(node)
    await official_client(node, vectors)


async def embeddings(node: WholeNode) -> list[list[float]]:
    """By texts, by token ids, as numbers and as base64; the same vectors every way."""
    status, answer = await node.call("POST", "/v1/embeddings", {"model": EMBEDDER, "input": list(SENTENCES)})
    assert status == 200, answer
    assert (answer["object"], answer["model"]) == ("list", EMBEDDER)
    assert [entry["index"] for entry in answer["data"]] == list(range(len(SENTENCES)))
    vectors = [entry["embedding"] for entry in answer["data"]]
    assert [len(vector) for vector in vectors] == [384] * len(SENTENCES)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > len(SENTENCES)

    body = {"model": EMBEDDER, "input": SENTENCES[0], "encoding_format": "base64", "user": "somebody"}
    status, answer = await node.call("POST", "/v1/embeddings", body)
    assert status == 200, answer
    packed = base64.b64decode(answer["data"][0]["embedding"])
    assert struct.unpack("<384f", packed) == pytest.approx(vectors[0], abs=1e-3)

    asked = {"model": EMBEDDER, "content": SENTENCES[0], "add_special": True}
    status, told = await node.call("POST", "/tokenize", asked)
    assert status == 200, told
    for given in (told["tokens"], [told["tokens"]]):
        status, answer = await node.call("POST", "/v1/embeddings", {"model": EMBEDDER, "input": given})
        assert status == 200, answer
        assert answer["data"][0]["embedding"] == pytest.approx(vectors[0], abs=1e-3)
    return vectors


async def refusals(node: WholeNode, vectors: list[list[float]]) -> None:
    """Each with its status, its code and the field; and the runner goes on."""
    for body, code, param in (
        ({"input": "a"}, "invalid_request", "model"),
        ({"model": EMBEDDER}, "invalid_request", "input"),
        ({"model": EMBEDDER, "input": []}, "invalid_request", "input"),
        ({"model": EMBEDDER, "input": ["a", 3]}, "invalid_request", "input"),
        ({"model": EMBEDDER, "input": "a", "dimensions": 8}, "unsupported_field", "dimensions"),
        ({"model": EMBEDDER, "input": "a", "encoding_format": "int8"}, "invalid_request", "encoding_format"),
        ({"model": EMBEDDER, "input": "word " * 600}, "context_length_exceeded", "input"),
        ({"model": EMBEDDER, "input": "a", "surprise": 1}, "invalid_request", "surprise"),
        ({"model": CODE, "input": "a"}, "invalid_request", "model"),
    ):
        status, answer = await node.call("POST", "/v1/embeddings", body)
        assert (status, answer["error"]["code"], answer["error"]["param"]) == (400, code, param), answer
    chat = {"model": EMBEDDER, "messages": [{"role": "user", "content": "hi"}]}
    status, answer = await node.call("POST", "/v1/chat/completions", chat)
    assert (status, answer["error"]["param"]) == (400, "model") and "/v1/embeddings" in answer["error"]["message"]
    status, answer = await node.call("POST", "/v1/embeddings", {"model": EMBEDDER, "input": SENTENCES[0]})
    assert (status, answer["data"][0]["embedding"]) == (200, pytest.approx(vectors[0], abs=1e-3))


async def scores(node: WholeNode) -> None:
    """Sorted, cut to ``top_n``, with their documents where asked for."""
    body: dict[str, Any] = {"model": RANKER, "query": "cats", "documents": [*SENTENCES[:3], {"text": SENTENCES[3]}]}
    status, answer = await node.call("POST", "/v1/rerank", body)
    assert status == 200, answer
    ranked = [(result["relevance_score"], result["index"]) for result in answer["results"]]
    assert ranked == sorted(ranked, reverse=True)
    assert sorted(index for _, index in ranked) == [0, 1, 2, 3]
    status, best = await node.call("POST", "/v1/rerank", {**body, "top_n": 1, "return_documents": True})
    assert status == 200 and len(best["results"]) == 1
    assert best["results"][0]["document"]["text"] == SENTENCES[ranked[0][1]]
    status, answer = await node.call("POST", "/v1/rerank", {**body, "model": EMBEDDER})
    assert (status, answer["error"]["param"]) == (400, "model")


async def tokens(node: WholeNode) -> None:
    """With what each stands for, and back."""
    asked = {"model": EMBEDDER, "content": "hello world", "with_pieces": True}
    status, told = await node.call("POST", "/tokenize", asked)
    assert status == 200 and [one["piece"].strip() for one in told["tokens"]] == ["hello", "world"]
    ids = [one["id"] for one in told["tokens"]]
    status, told = await node.call("POST", "/detokenize", {"model": EMBEDDER, "tokens": ids})
    assert (status, told["content"].strip()) == (200, "hello world")
    status, told = await node.call("POST", "/tokenize", {"content": "which one?"})
    assert (status, told["error"]["param"]) == (400, "model")


async def infill(node: WholeNode) -> None:
    """A model that declares the marks fills; what it says is its own affair."""
    body = {"model": CODE, "prompt": "def f(", "suffix": ") -> int:", "max_tokens": 4, "temperature": 0}
    status, answer = await node.call("POST", "/v1/completions", body)
    assert status == 200 and answer["choices"][0]["finish_reason"] in ("length", "stop"), answer
    status, plain = await node.call("POST", "/v1/completions", {**body, "suffix": None})
    assert status == 200
    # the suffix and the three marks, or more where the tokenizer cuts otherwise
    assert answer["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"] + 3
    status, answer = await node.call("POST", "/v1/completions", {**body, "prompt": [1, 2, 3]})
    assert (status, answer["error"]["param"]) == (400, "suffix")


async def official_client(node: WholeNode, vectors: list[list[float]]) -> None:
    """OpenAI's own client asks the same node: vectors (as base64, its default), text, streams, choices, errors."""
    user: Any = {"role": "user", "content": "Say something."}
    greedy: dict[str, Any] = {"model": CODE, "messages": [user], "temperature": 0, "max_tokens": 8}
    too_long: dict[str, Any] = {**greedy, "max_tokens": 10_000_000}
    async with openai.AsyncOpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0) as client:
        found = await client.embeddings.create(model=EMBEDDER, input=list(SENTENCES))
        assert found.data[0].embedding == pytest.approx(vectors[0], abs=1e-3)
        whole = await client.chat.completions.create(**greedy, n=2)
        first, second = (choice.message.content for choice in whole.choices)
        assert first and first == second
        assert whole.usage is not None and whole.usage.completion_tokens == 16
        streamed = await client.chat.completions.create(**greedy, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in streamed]) == first
        asked = await client.completions.with_raw_response.create(
            model=CODE, prompt=[5, 6, 7], echo=True, max_tokens=2, seed=3, user="me"
        )
        _, told = await node.call("POST", "/detokenize", {"model": CODE, "tokens": [5, 6, 7]})
        assert asked.headers["X-Skulk-Inert"] == "user"
        assert asked.parse().choices[0].text.startswith(told["content"])
        with pytest.raises(openai.BadRequestError) as long:
            await client.chat.completions.create(**too_long)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("no/such-model")
