"""Sampling on the real library: our filters against llama.cpp's own samplers, and answers of the real model."""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from skulk.engines.llama_cpp import filters
from skulk.engines.llama_cpp.chain import SamplerChain
from skulk.engines.llama_cpp.draw import uniform
from skulk.engines.llama_cpp.engine import LlamaCppEngine
from skulk.engines.llama_cpp.filters import Candidates, Logits
from skulk.engines.llama_cpp.mirostat import Mirostat
from skulk.engines.llama_cpp.native import library
from skulk.engines.llama_cpp.penalties import Dry, Penalties
from skulk.engines.llama_cpp.sampling import settle
from skulk.errors import RequestError, ServiceError
from skulk.wire.generation import ChatMessage, ChatPrompt, Sampling, TextPrompt
from tests.support.engines import GREEDY, Stepper, generate, load_small

ROWS = 12
ENTRY = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaCppEngine]:
    """Neighbours don't change a bit of the logits here."""
    made = load_small(n_parallel=4, kv_cells=4 * 256, flash_attention="off")
    yield made
    made.close()


@pytest.fixture(scope="module")
def prompt(engine: LlamaCppEngine) -> tuple[int, ...]:
    return engine.tokens_of(ChatPrompt(messages=(ChatMessage(role="user", content="Tell me a story."),)))


@pytest.fixture(scope="module")
def rows(engine: LlamaCppEngine, prompt: tuple[int, ...]) -> list[Logits]:
    """Logits of the model along a greedy answer."""
    stepper = Stepper(engine)
    stepper.begin(0, prompt)
    found: list[Logits] = []
    for _ in range(ROWS):
        stepper.step()
        index = len(prompt) - 1 if not found else 0
        found.append(engine._workbench.row(engine._handle(), index).copy())
    stepper.end(0)
    return found


class Native:
    """Some of llama.cpp's samplers, one after the other on arrays of candidates."""

    def __init__(self, *links: int) -> None:
        self._lib: Any = library()
        self._links = links

    def apply(self, logits: Logits) -> tuple[NDArray[np.void], int]:
        """What is left, an array of ``id`` and ``logit``, and the id that was chosen (-1: none)."""
        lib = self._lib
        entries = np.zeros(logits.size, dtype=ENTRY)
        entries["id"], entries["logit"] = np.arange(logits.size), logits
        pointer_to = cast("Any", ctypes.POINTER)(lib.llama_token_data)
        array = lib.llama_token_data_array(
            data=ctypes.cast(entries.ctypes.data, pointer_to), size=logits.size, selected=-1, sorted=False
        )
        for link in self._links:
            lib.llama_sampler_apply(link, ctypes.byref(array))
        # XTC moves the pointer.
        start = (ctypes.addressof(array.data.contents) - entries.ctypes.data) // ENTRY.itemsize
        left = entries[start : start + array.size]
        chosen = int(left["id"][array.selected]) if array.selected >= 0 else -1
        return left[left["logit"] > -np.inf], chosen

    def accept(self, token: int) -> None:
        for link in self._links:
            self._lib.llama_sampler_accept(link, token)

    def close(self) -> None:
        for link in self._links:
            self._lib.llama_sampler_free(link)


def row_of(logits: Logits) -> Candidates:
    return Candidates(logits, float(logits.max()))


def ids_of(candidates: Candidates) -> set[int]:
    if candidates.ids is not None:
        return set(candidates.ids.tolist())
    return set(np.flatnonzero(candidates.logits > -np.inf).tolist())


class TestFilters:
    """On real rows each keeps what llama.cpp's keeps."""

    @pytest.mark.parametrize(
        ("native", "ours", "slack"),
        [
            (lambda lib: [lib.llama_sampler_init_top_k(40)], lambda row: filters.keep_top_k(row, 40), 0),
            (lambda lib: [lib.llama_sampler_init_min_p(0.01, 1)], lambda row: filters.keep_min_p(row, 0.01), 0),
            (lambda lib: [lib.llama_sampler_init_top_p(0.9, 1)], lambda row: filters.keep_top_p(row, 0.9), 1),
            (lambda lib: [lib.llama_sampler_init_typical(0.5, 1)], lambda row: filters.keep_typical(row, 0.5), 1),
            (
                lambda lib: [lib.llama_sampler_init_top_n_sigma(1.5)],
                lambda row: filters.keep_top_n_sigma(row, 1.5),
                1,
            ),
            (lambda lib: [lib.llama_sampler_init_xtc(1.0, 0.05, 1, 1)], lambda row: filters.cut_xtc(row, 0.05), 0),
            (
                lambda lib: [
                    lib.llama_sampler_init_top_k(50),
                    lib.llama_sampler_init_typical(0.95, 1),
                    lib.llama_sampler_init_top_p(0.9, 1),
                    lib.llama_sampler_init_min_p(0.05, 1),
                    lib.llama_sampler_init_xtc(1.0, 0.1, 1, 1),
                ],
                lambda row: filters.cut_xtc(
                    filters.keep_min_p(
                        filters.keep_top_p(filters.keep_typical(filters.keep_top_k(row, 50), 0.95), 0.9), 0.05
                    ),
                    0.1,
                ),
                0,
            ),
        ],
        ids=["top_k", "min_p", "top_p", "typical", "top_n_sigma", "xtc", "all"],
    )
    def test_what_is_kept(
        self,
        rows: list[Logits],
        native: Callable[[Any], list[int]],
        ours: Callable[[Candidates], Candidates],
        slack: int,
    ) -> None:
        """``slack``: tokens at the cut that the rounding of a sum in float32 may move, in a hundred of those kept."""
        sampler = Native(*native(library()))
        for logits in rows:
            expected = set(sampler.apply(logits)[0]["id"].tolist())
            kept = ids_of(ours(row_of(logits)))
            assert len(kept ^ expected) <= slack * (1 + len(expected) // 100), (len(kept), len(expected))
        sampler.close()


class TestPenalties:
    def test_penalties_are_the_native_ones(self, rows: list[Logits], prompt: tuple[int, ...]) -> None:
        size = rows[0].size
        native = Native(library().llama_sampler_init_penalties(size, 20, 1.3, 0.2, 0.4))
        ours = Penalties(prompt, look_back=20, repeat=1.3, frequency=0.2, presence=0.4)
        for token in prompt:
            native.accept(token)
        for token, logits in zip((*prompt[5:9], 17, 300), rows, strict=False):
            self._same(native, ours, logits)
            native.accept(token)
            ours.accept(token)
        native.close()

    @pytest.mark.parametrize("breakers", [("\n", ":", '"', "*"), ("the", "é", ". "), (" fox",)])
    def test_dry_is_the_native_one(self, engine: LlamaCppEngine, rows: list[Logits], breakers: tuple[str, ...]) -> None:
        lib: Any = library()
        texts = [text.encode() for text in breakers]
        native = Native(
            lib.llama_sampler_init_dry(
                engine._vocabulary._vocab, 0.7, 1.5, 2, 48, (ctypes.c_char_p * len(texts))(*texts), len(texts)
            )
        )
        history = engine.tokens_of(
            TextPrompt(text="the fox: the red fox ran. the fox: the red fox ran\nthe café the café the fox " * 3)
        )
        ours = Dry(
            history[:30],
            look_back=48,
            multiplier=0.7,
            base=1.5,
            allowed=2,
            breakers=engine._workbench.breakers_of(breakers),
        )
        for token in history[:30]:
            native.accept(token)
        changed = 0
        for place, token in enumerate(history[30:]):
            changed += self._same(native, ours, rows[place % len(rows)])
            native.accept(token)
            ours.accept(token)
        assert changed >= 5
        native.close()

    @staticmethod
    def _same(native: Native, ours: Penalties | Dry, logits: Logits) -> bool:
        """Both make the same of a row; whether that is a change."""
        expected = native.apply(logits)[0]["logit"]
        row = logits.copy()
        ours.apply(row)
        np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-5)
        return not np.array_equal(row, logits)


class TestMirostat:
    """Its own dice can't be taken from the native one, so the two are compared by how often they draw what."""

    SIZE = 300
    DRAWS = 3000

    @pytest.mark.parametrize("version", [1, 2])
    def test_two_draws_are_distributed_as_the_native_ones(self, version: int) -> None:
        first, second = np.random.default_rng(4).normal(0, 2, (2, self.SIZE)).astype(np.float32)
        best = int(first.argmax())
        drawn, ours = Counter[int](), Counter[int]()
        after, ours_after = Counter[int](), Counter[int]()
        for seed in range(self.DRAWS):
            native = Native(self._native(version, seed))
            token = native.apply(first)[1]
            drawn[token] += 1
            if token == best:
                after[native.apply(second)[1]] += 1
            native.close()
            mirostat = Mirostat(version, 4.0, 0.5)
            token = mirostat.draw(row_of(first), uniform(seed, 0))
            ours[token] += 1
            if token == best:
                ours_after[mirostat.draw(row_of(second), uniform(seed, 1))] += 1
        self._alike(drawn, ours)
        self._alike(after, ours_after)

    def _native(self, version: int, seed: int) -> int:
        lib: Any = library()
        if version == 1:
            return lib.llama_sampler_init_mirostat(self.SIZE, seed, 4.0, 0.5, 100)
        return lib.llama_sampler_init_mirostat_v2(seed, 4.0, 0.5)

    @staticmethod
    def _alike(left: Counter[int], right: Counter[int]) -> None:
        """The chi-square test of two samples, on tokens that came often enough; the seeds never change."""
        tokens = [token for token in left | right if left[token] + right[token] >= 10]
        assert len(tokens) > 5
        scale = math.sqrt(right.total() / left.total())
        statistic = sum(
            (left[token] * scale - right[token] / scale) ** 2 / (left[token] + right[token]) for token in tokens
        )
        freedom = len(tokens) - 1
        assert statistic < freedom + 4 * math.sqrt(2 * freedom), (statistic, freedom)

    def test_mu_moves_towards_the_target(self) -> None:
        """A dull row leaves no surprise, so more and more is allowed."""
        dull = np.array([50.0, 0.0, 0.0], dtype=np.float32)
        mirostat = Mirostat(2, 5.0, 0.1)
        for turn in range(3):
            assert mirostat.draw(row_of(dull), uniform(1, turn)) == 0
        assert mirostat.mu == pytest.approx(10 + 3 * 0.5)


def chain_of(engine: LlamaCppEngine, sampling: Sampling, history: Sequence[int], choice: int = 0) -> SamplerChain:
    settled = settle(sampling, Sampling(), vocabulary_size=engine.info.vocabulary_size, window=256, choice=choice)
    return SamplerChain(settled, history, engine._workbench)


HOT = Sampling(
    temperature=1.3,
    top_p=0.98,
    xtc_probability=0.5,
    repeat_penalty=1.1,
    presence_penalty=0.3,
    dry_multiplier=0.8,
    seed=77,
)


class TestChains:
    def test_a_resumed_sequence_draws_what_the_first_would_have(
        self, engine: LlamaCppEngine, rows: list[Logits], prompt: tuple[int, ...]
    ) -> None:
        whole = chain_of(engine, HOT, prompt)
        drawn = [whole.sample_row(logits, len(prompt) + place) for place, logits in enumerate(rows)]
        assert len(set(drawn)) > 4
        for cut in (1, 5, ROWS - 1):
            resumed = chain_of(engine, HOT, (*prompt, *drawn[:cut]))
            rest = [resumed.sample_row(rows[place], len(prompt) + place) for place in range(cut, ROWS)]
            assert rest == drawn[cut:], cut

    @pytest.mark.parametrize("fields", [{}, {"top_k": 40}, {"top_p": 0.9}, {"mirostat": 2}])
    def test_seed_choice_and_position_decide(
        self, engine: LlamaCppEngine, rows: list[Logits], prompt: tuple[int, ...], fields: dict[str, Any]
    ) -> None:
        def drawn(seed: int, choice: int, start: int) -> list[int]:
            chain = chain_of(engine, Sampling(temperature=1.5, seed=seed, **fields), prompt, choice)
            return [chain.sample_row(logits, start + place) for place, logits in enumerate(rows)]

        first = drawn(1, 0, 50)
        assert drawn(1, 0, 50) == first
        assert first not in (drawn(2, 0, 50), drawn(1, 1, 50), drawn(1, 0, 51))

    @pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0), Sampling(top_k=5), HOT])
    @pytest.mark.parametrize("broken", [math.nan, math.inf])
    def test_scores_that_are_no_numbers_are_the_engines_failure(
        self, engine: LlamaCppEngine, rows: list[Logits], sampling: Sampling, broken: float
    ) -> None:
        row = rows[0].copy()
        row[4711] = broken
        with pytest.raises(ServiceError, match="are no numbers") as caught:
            chain_of(engine, sampling, (1, 2)).sample_row(row, 2)
        assert caught.value.code == "runner_failed"

    def test_nothing_that_could_be_drawn_is_a_failure_too(self, engine: LlamaCppEngine, rows: list[Logits]) -> None:
        with pytest.raises(ServiceError, match="are no numbers"):
            chain_of(engine, GREEDY, ()).sample_row(np.full_like(rows[0], -np.inf), 2)

    def test_of_equal_scores_greedy_takes_the_first(self, engine: LlamaCppEngine, rows: list[Logits]) -> None:
        row = rows[0].copy()
        row[[9, 4000, 30_000]] = row.max() + 1
        assert chain_of(engine, GREEDY, ()).sample_row(row, 2) == 9


PLAIN: dict[str, Any] = {"temperature": 0.8, "seed": 3}


@pytest.fixture(scope="module")
def looping(engine: LlamaCppEngine) -> tuple[int, ...]:
    return engine.tokens_of(TextPrompt(text="Count: one two three one two three one two"))


@pytest.fixture(scope="module")
def plain(engine: LlamaCppEngine, looping: tuple[int, ...]) -> list[int]:
    return generate(engine, looping, 10, Sampling(**PLAIN))


class TestAnswers:
    def test_a_seed_gives_the_same_alone_and_beside_others(
        self, engine: LlamaCppEngine, prompt: tuple[int, ...]
    ) -> None:
        alone = generate(engine, prompt, 12, HOT)
        stepper = Stepper(engine)
        other = engine.tokens_of(TextPrompt(text="Once upon a time in a quiet valley"))
        stepper.begin(0, other, Sampling(temperature=1.0))
        stepper.step()
        stepper.begin(2, prompt, HOT)
        stepper.begin(1, other, Sampling(temperature=1.0, top_k=9, seed=77))
        stepper.begin(3, prompt, HOT, choice=1)
        while len(stepper.tokens[2]) < len(alone):
            stepper.step()
        for slot in range(4):
            stepper.end(slot)
        assert stepper.tokens[2] == alone
        assert stepper.tokens[3] != alone

    @pytest.mark.parametrize(
        "changed",
        [
            {"dry_multiplier": 5.0, "dry_allowed_length": 0},
            {"xtc_probability": 1.0, "xtc_threshold": 0.05},
            {"mirostat": 1, "mirostat_tau": 1.0},
            {"mirostat": 2, "mirostat_tau": 9.0},
            {"typical_p": 0.2},
            {"top_n_sigma": 0.3},
            {"frequency_penalty": 1.5},
        ],
        ids=lambda changed: next(iter(changed)) + str(next(iter(changed.values()))),
    )
    def test_each_changes_the_answer(
        self, engine: LlamaCppEngine, looping: tuple[int, ...], plain: list[int], changed: dict[str, Any]
    ) -> None:
        assert generate(engine, looping, 10, Sampling(**PLAIN, **changed)) != plain

    def test_dry_breaks_a_loop(self, engine: LlamaCppEngine) -> None:
        loop = engine.tokens_of(
            TextPrompt(text="red green blue red green blue red green blue red green blue red green")
        )
        [blue] = generate(engine, loop, 1)
        assert engine.piece(blue) == b" blue"
        assert generate(engine, loop, 1, Sampling(temperature=0.0, dry_multiplier=5.0)) != [blue]
        with_breaker = Sampling(temperature=0.0, dry_multiplier=5.0, dry_sequence_breakers=(" green",))
        assert generate(engine, loop, 1, with_breaker) == [blue]

    @pytest.mark.parametrize(
        "hostile",
        [
            {"temperature": math.nan},
            {"top_k": -(2**31)},
            {"dry_base": math.inf},
            {"dry_penalty_last_n": 2**40},
            {"dry_sequence_breakers": ("x" * 1000,)},
            {"mirostat": 7},
            {"mirostat_tau": math.nan},
            {"xtc_threshold": -1e300},
            {"typical_p": math.nan},
            {"top_n_sigma": math.inf},
        ],
        ids=lambda hostile: next(iter(hostile)),
    )
    def test_hostile_numbers_are_refused(
        self, engine: LlamaCppEngine, prompt: tuple[int, ...], hostile: dict[str, Any]
    ) -> None:
        with pytest.raises(RequestError) as caught:
            engine.begin(0, Sampling(**hostile), prompt)
        assert (caught.value.code, caught.value.param) == ("invalid_request", next(iter(hostile)))

    @pytest.mark.parametrize(
        "extreme",
        [
            {"temperature": 100.0, "top_n_sigma": 100.0},
            {"temperature": 1e-6},
            {"temperature": 0.01, "min_p": 5e-324},
            {"temperature": 1.0, "mirostat": 1, "mirostat_tau": 0.0, "mirostat_eta": 1.0},
            {"temperature": 1.0, "mirostat": 1, "mirostat_tau": 100.0, "mirostat_eta": 1.0},
            {"temperature": 100.0, "mirostat": 2, "mirostat_tau": 0.0, "mirostat_eta": 1.0},
            {"temperature": 1.0, "mirostat": 2, "mirostat_tau": 100.0},
            {"dry_multiplier": 100.0, "dry_base": 100.0, "dry_allowed_length": 0, "dry_penalty_last_n": -1},
            {"dry_multiplier": 0.1, "dry_base": 1.0, "dry_allowed_length": 2**31 - 1},
            {"xtc_probability": 1.0, "xtc_threshold": 0.0},
            {"typical_p": 0.0, "top_p": 0.0, "min_p": 1.0, "top_k": 2**31 - 1},
            {"repeat_penalty": 0.01, "presence_penalty": -100.0, "frequency_penalty": -100.0},
            {"logit_bias": {5: 1e9, 6: -1e9}},
        ],
        ids="-".join,
    )
    def test_the_ends_of_the_ranges_work(
        self, engine: LlamaCppEngine, looping: tuple[int, ...], extreme: dict[str, Any]
    ) -> None:
        tokens = generate(engine, looping, 3, Sampling(seed=1, **extreme))
        assert tokens and all(0 <= token < engine.info.vocabulary_size for token in tokens)
