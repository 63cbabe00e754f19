"""Vectors and scores of the real engine, held against llama-cpp-python's own; and infill on a file that declares it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skulk.engines.llama_cpp.embedder import LlamaCppEmbedder
from skulk.engines.llama_cpp.engine import LlamaCppEngine
from skulk.engines.llama_cpp.loader import load
from skulk.engines.protocol import LoadSpec
from skulk.errors import RequestError
from skulk.wire.embedding import RankPair
from skulk.wire.generation import InfillPrompt, TextPrompt, TokenPrompt
from tests.support.embedders import SENTENCES, minilm, write_ranker
from tests.support.gguf import with_metadata
from tests.support.real_models import short_copy

CLS, SEP = 101, 102


def loaded(path: Path, **changes: Any) -> LlamaCppEmbedder:
    fields: dict[str, Any] = {"context_length": 512, "n_parallel": 8, "kv_cells": 512, "n_threads": 1, "embeds": True}
    engine = load(LoadSpec(path=str(path), backend="llama_cpp-cpu", **(fields | changes)), lambda _: True)
    assert isinstance(engine, LlamaCppEmbedder)
    return engine


@pytest.fixture(scope="module")
def embedder() -> Iterator[LlamaCppEmbedder]:
    engine = loaded(minilm())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCppEmbedder]:
    engine = loaded(write_ranker(tmp_path_factory.mktemp("ranker") / "r.gguf"), context_length=128, kv_cells=256)
    yield engine
    engine.close()


def vectors(engine: LlamaCppEmbedder, *texts: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(engine.embed([engine.input_tokens(TextPrompt(text=text)) for text in texts]))


def theirs(path: Path, texts: tuple[str, ...]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What the package's own class gives for the same file."""
    module: Any = importlib.import_module("llama_cpp")
    model = module.Llama(str(path), embedding=True, n_ctx=512, n_threads=1, verbose=False)
    try:
        return np.array(model.embed(list(texts), normalize=True))
    finally:
        model.close()


def test_minilm_gives_384_numbers_equal_to_llama_cpp_pythons(embedder: LlamaCppEmbedder) -> None:
    ours = vectors(embedder, *SENTENCES)
    assert ours.shape == (len(SENTENCES), 384)
    assert np.allclose(np.linalg.norm(ours, axis=1), 1.0, atol=1e-5)
    cosines = (ours * theirs(minilm(), SENTENCES)).sum(axis=1)
    assert cosines.min() >= 0.999


def test_a_text_alone_and_among_others_is_one_vector(embedder: LlamaCppEmbedder) -> None:
    alone = np.concatenate([vectors(embedder, text) for text in SENTENCES])
    assert (alone * vectors(embedder, *SENTENCES)).sum(axis=1).min() >= 0.9999


def test_like_texts_are_near(embedder: LlamaCppEmbedder) -> None:
    cat, kitten, stocks, _ = vectors(embedder, *SENTENCES)
    assert cat @ kitten > 0.5 > cat @ stocks


def test_people_can_not_write_special_tokens(embedder: LlamaCppEmbedder) -> None:
    tokens = embedder.input_tokens(TextPrompt(text="left [SEP] right"))
    assert tokens[0] == CLS and tokens[-1] == SEP and tokens.count(SEP) == 1
    assert embedder.tokenize("[SEP]", add_special=False, parse_special=True) == (SEP,)
    with pytest.raises(RequestError, match="token 99999"):
        embedder.input_tokens(TokenPrompt(tokens=(CLS, 99999)))


def test_a_text_as_long_as_the_window_is_taken(embedder: LlamaCppEmbedder) -> None:
    assert len(embedder.embed([(CLS, *[2000] * 510, SEP)])[0]) == 384


def test_a_ranker_scores_pairs_by_both_texts(ranker: LlamaCppEmbedder) -> None:
    assert (ranker.info.pooling, ranker.info.embedding_size) == ("rank", 1)
    pairs = [RankPair(query="rivers", document=text) for text in SENTENCES]
    tokens = [ranker.input_tokens(pair) for pair in pairs]
    query = ranker.tokenize("rivers", add_special=False, parse_special=False)
    assert tokens[0][: len(query) + 2] == (CLS, *query, SEP)
    assert tokens[0][-1] == SEP and tokens[0].count(SEP) == 2
    scores = [score for (score,) in ranker.embed(tokens)]
    assert len(set(scores)) == len(scores)
    assert ranker.embed(tokens[1:2]) == [pytest.approx([scores[1]], abs=1e-4)]
    other = ranker.embed([ranker.input_tokens(RankPair(query="money", document=SENTENCES[0]))])[0][0]
    assert other != pytest.approx(scores[0], abs=1e-5)


def test_the_files_own_template_puts_pairs_together(tmp_path: Path) -> None:
    path = write_ranker(
        tmp_path / "r.gguf", tokenizer__chat_template__rerank="[CLS]query: {query}[SEP]text: {document}[SEP]"
    )
    engine = loaded(path, context_length=128, kv_cells=256)
    tokens = engine.input_tokens(RankPair(query="a [SEP] b", document="c {query}"))
    assert tokens.count(SEP) == 2 and tokens[0] == CLS
    assert "query : a [ sep ] b" in engine.detokenize(tokens)
    engine.close()


def test_each_kind_refuses_the_others_inputs(embedder: LlamaCppEmbedder, ranker: LlamaCppEmbedder) -> None:
    with pytest.raises(RequestError, match="/v1/embeddings"):
        embedder.input_tokens(RankPair(query="a", document="b"))
    with pytest.raises(RequestError, match="/v1/rerank"):
        ranker.input_tokens(TextPrompt(text="a"))


def generator(path: Path) -> LlamaCppEngine:
    spec = LoadSpec(
        path=str(path), backend="llama_cpp-cpu", context_length=256, n_parallel=1, kv_cells=256, n_threads=1
    )
    engine = load(spec, lambda _: True)
    assert isinstance(engine, LlamaCppEngine)
    return engine


@pytest.fixture(scope="module")
def infill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCppEngine]:
    marks = {
        f"tokenizer.ggml.fim_{name}_token_id": number for number, name in enumerate(("pre", "suf", "mid"), start=5)
    }
    path = with_metadata(short_copy(), tmp_path_factory.mktemp("infill") / "code.gguf", marks)
    spec = LoadSpec(
        path=str(path), backend="llama_cpp-cpu", context_length=512, n_parallel=1, kv_cells=512, n_threads=1
    )
    engine = load(spec, lambda _: True)
    assert isinstance(engine, LlamaCppEngine)
    yield engine
    engine.close()


def test_infill_puts_prefix_and_suffix_behind_their_marks(infill: LlamaCppEngine) -> None:
    tokens = infill.tokens_of(InfillPrompt(prefix="def f(", suffix=") -> int:"))
    before = infill.tokenize("def f(", add_special=False, parse_special=False)
    after = infill.tokenize(") -> int:", add_special=False, parse_special=False)
    assert tokens == (5, *before, 6, *after, 7)


def test_a_model_that_generates_gives_no_vectors(infill: LlamaCppEngine) -> None:
    with pytest.raises(RequestError, match="generates text"):
        infill.embed([(1, 2)])
    with pytest.raises(RequestError, match="generates text"):
        infill.input_tokens(TextPrompt(text="a"))


def test_infill_without_marks_is_refused_by_its_field() -> None:
    engine = generator(short_copy())
    with pytest.raises(RequestError) as caught:
        engine.tokens_of(InfillPrompt(prefix="a", suffix="b"))
    assert (caught.value.code, caught.value.param) == ("unsupported_field", "suffix")
    engine.close()
