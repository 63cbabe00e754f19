"""Grammars on the real library: what llama.cpp's own grammar allows, and answers of the real model."""

from __future__ import annotations

import ctypes
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import msgspec
import numpy as np
import pytest
from llama_cpp import llama_grammar
from numpy.typing import NDArray

from skulk.batching.requests import BatchRequest, Emitted, Ended
from skulk.batching.slots import add
from skulk.batching.state import BatchState
from skulk.batching.step import StepPlan, StepRow
from skulk.engines.grammar.constraint import Follower
from skulk.engines.llama_cpp.chain import SamplerChain
from skulk.engines.llama_cpp.engine import LlamaCppEngine
from skulk.engines.llama_cpp.native import library
from skulk.engines.llama_cpp.sampling import settle
from skulk.errors import RequestError
from skulk.wire.generation import ChatMessage, ChatPrompt, Sampling
from tests.support.batches import play_engine, request_of, shape_of
from tests.support.engines import GREEDY, Stepper, load_small
from tests.support.real_models import exact_copy

ENTRY = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])
YES_OR_NO = 'root ::= ("yes" | "no") "\\n"?'
JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null")
object ::= "{" ( string ": " value ("," " "? string ": " value){0,3} )? "}"
array  ::= "[" ( value ("," " "? value){0,3} )? "]"
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) ){0,12} "\""
number ::= "-"? ([0-9] | [1-9] [0-9]{0,3}) ("." [0-9]{1,2})?
"""
TEXT = 'root ::= [^"\\n]* ("東" | [ö-ü] | .)\n'
MANY = 'root ::= ("a" | "ab" | "b")* ("cd"{2,3} | [0-9]+ ("." [0-9]+)?) (" " root)?'
# No text before the token that is to be another one: there llama.cpp allows tokens that it then can't accept.
TOKENS = "root ::= <|im_start|> !<[5]> [a-z]+"


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaCppEngine]:
    """Few layers with exact weights: what is computed again is the same to the last bit."""
    made = load_small(exact_copy(layers=3), n_parallel=2, kv_cells=2 * 256, flash_attention="off")
    yield made
    made.close()


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaCppEngine]:
    made = load_small(n_parallel=2, kv_cells=2 * 256)
    yield made
    made.close()


class NativeGrammar:
    """llama.cpp's own. It aborts the process when it is told to accept what it refuses."""

    def __init__(self, engine: LlamaCppEngine, text: str) -> None:
        self._lib: Any = library()
        self._size = engine.info.vocabulary_size
        self._sampler = self._lib.llama_sampler_init_grammar(engine._vocabulary._vocab, text.encode(), b"root")
        assert self._sampler

    def allowed(self) -> NDArray[np.bool_]:
        lib = self._lib
        entries = np.zeros(self._size, dtype=ENTRY)
        entries["id"] = np.arange(self._size)
        pointer_to = cast("Any", ctypes.POINTER)(lib.llama_token_data)
        array = lib.llama_token_data_array(
            data=ctypes.cast(entries.ctypes.data, pointer_to), size=self._size, selected=-1, sorted=False
        )
        lib.llama_sampler_apply(self._sampler, ctypes.byref(array))
        return entries["logit"] > -np.inf

    def accept(self, token: int) -> None:
        self._lib.llama_sampler_accept(self._sampler, token)

    def close(self) -> None:
        self._lib.llama_sampler_free(self._sampler)


def is_whole(piece: bytes) -> bool:
    return piece.decode("utf-8", "ignore").encode() == piece


def comparable(engine: LlamaCppEngine, *, only_whole: bool) -> NDArray[np.bool_]:
    """Tokens but for those whose names llama.cpp reads as text, and bytes that are of no character.

    ``only_whole``: nor parts of characters, which it doesn't count as any token but one.
    """
    tokens = engine._vocabulary.for_grammars()
    wrong = re.compile(rb"[\xc0\xc1\xf5-\xff\0]|\xed[\xa0-\xbf]|\xe0[\x80-\x9f]|\xf0[\x80-\x8f]|\xf4[\x90-\xbf]")
    kept = [
        token in tokens.ends or (bool(piece) and not wrong.search(piece) and (is_whole(piece) or not only_whole))
        for token, piece in enumerate(tokens.pieces)
    ]
    return np.array(kept)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 40},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 5},
        "when": {"anyOf": [{"type": "null"}, {"type": "string", "format": "date"}]},
    },
    "required": ["name", "tags"],
}
SHIPPED = [
    *(llama_grammar.ARITHMETIC_GBNF, llama_grammar.C_GBNF, llama_grammar.CHESS_GBNF, llama_grammar.JAPANESE_GBNF),
    *(llama_grammar.JSON_GBNF, llama_grammar.JSON_ARR_GBNF, llama_grammar.json_schema_to_gbnf(json.dumps(SCHEMA))),
]


@pytest.mark.parametrize("grammar", [YES_OR_NO, JSON, TEXT, MANY, TOKENS, *SHIPPED], ids=range(12))
def test_it_allows_what_llama_cpp_allows(engine: LlamaCppEngine, grammar: str) -> None:
    chance = np.random.default_rng(len(grammar))
    kept = comparable(engine, only_whole=grammar == TOKENS)
    ours, native = Follower(engine._grammars.get(grammar)), NativeGrammar(engine, grammar)
    accepted: list[int] = []
    try:
        for _ in range(12):
            allowed = ours.allowed()
            differ = np.flatnonzero((allowed != native.allowed()) & kept)
            assert differ.size == 0, (accepted, [engine.piece(token) for token in differ[:5]])
            going_on = [
                token
                for token in np.flatnonzero(allowed).tolist()
                # After these bytes llama.cpp takes some that make no character.
                if not engine.is_end(token)
                and (kept[token] or not accepted)
                and engine.piece(token)[-1:] not in (b"\xe0", b"\xed", b"\xf0", b"\xf4")
            ]
            if not going_on:
                break
            # Of each first byte one, or most would be words.
            token = int(chance.choice(list({engine.piece(token)[:1]: token for token in going_on}.values())))
            accepted.append(token)
            native.accept(token)
            assert ours.accepts(token)
    finally:
        native.close()


def prompt_of(engine: LlamaCppEngine, question: str) -> tuple[int, ...]:
    return engine.tokens_of(ChatPrompt(messages=(ChatMessage(role="user", content=question),)))


def answers(engine: LlamaCppEngine, *requests: BatchRequest) -> tuple[dict[tuple[str, int], str], list[Ended]]:
    """The texts by request and choice, and how the requests ended."""
    for slot in range(2):
        engine.keep(slot, 0)
    state = BatchState(shape=shape_of(n_ctx=256, n_parallel=2, n_batch=256, n_ubatch=128, reuse=engine.info.reuse))
    for request in requests:
        state = add(state, request, engine, 0.0).state
    texts: dict[tuple[str, int], str] = {}
    ends: list[Ended] = []
    for one in play_engine(state, engine):
        match one:
            case Emitted(key=key, choice=choice, text=text):
                texts[key.request_id, choice] = texts.get((key.request_id, choice), "") + text
            case Ended():
                ends.append(one)
            case _:
                pass
    return texts, ends


def asked(
    engine: LlamaCppEngine, name: str, question: str, *, n: int = 1, count: int = 60, **sampling: Any
) -> BatchRequest:
    request = request_of(name, prompt_ids=prompt_of(engine, question), max_tokens=count, n=n)

    return msgspec.structs.replace(request, sampling=Sampling(**sampling))


class TestAnswers:
    def test_they_are_of_their_grammars_each(self, model: LlamaCppEngine) -> None:
        """Several at once, two choices of each, cells taken over from one to the next."""
        fields: list[dict[str, Any]] = [
            {"temperature": 1.0, "seed": 1},
            {"temperature": 0.0},
            {"temperature": 1.5, "seed": 2, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
            {"temperature": 1.0, "seed": 3, "mirostat": 2},
            {"temperature": 1.0, "seed": 4, "logit_bias": {42: 90.0}, "repeat_penalty": 1.2, "typical_p": 0.9},
        ]
        requests = [
            asked(model, f"{name} {at}", "Is the sky blue?", n=2, grammar=grammar, **one)
            for at, one in enumerate(fields)
            for name, grammar in (("yes", YES_OR_NO), ("json", JSON))
        ]
        for begin in range(0, len(requests), 2):
            texts, ends = answers(model, *requests[begin : begin + 2])
            reasons = {end.key.request_id: end.end.reason for end in ends}
            assert len(texts) == 4 and set(reasons.values()) <= {"stop", "length"}
            for (name, _), text in texts.items():
                if name.startswith("yes"):
                    assert re.fullmatch(r"(yes|no)\n?", text), (name, text)
                elif reasons[name] == "stop":
                    assert isinstance(json.loads(text), dict), (name, text)
                else:
                    assert text.startswith("{")

    def test_end_tokens_that_are_ignored_and_stop_strings(self, model: LlamaCppEngine) -> None:

        request = asked(model, "a", "Is the sky blue?", count=8, grammar='root ::= "yes"', temperature=1.0)
        texts, ends = answers(model, msgspec.structs.replace(request, ignore_eos=True))
        assert (texts["a", 0], ends[0].end.reason) == ("yes", "length")
        texts, ends = answers(model, msgspec.structs.replace(request, stop=("es",)))
        assert (texts["a", 0], ends[0].end.reason) == ("y", "stop")

    @pytest.mark.parametrize(
        ("grammar", "words"),
        [
            # The model's vocabulary has no token with the byte 4.
            ('root ::= "a\\x04b"', "no token of this model"),
            ('root ::= "a" ("b"? "a"?){0,12000}', "too many ways"),
        ],
    )
    def test_what_no_token_can_follow_ends_its_request_alone(
        self, model: LlamaCppEngine, grammar: str, words: str
    ) -> None:
        texts, ends = answers(
            model,
            asked(model, "stuck", "Hi", grammar=grammar, temperature=0.0),
            asked(model, "fine", "Is the sky blue?", grammar=YES_OR_NO, temperature=0.0),
        )
        told = {end.key.request_id: end.end for end in ends}
        error = told["stuck"].error
        assert error is not None and (error.code, error.param) == ("invalid_request", "grammar")
        assert words in error.detail
        assert told["fine"].reason == "stop" and texts["fine", 0].strip() in ("yes", "no")


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=1.0, seed=5), Sampling(temperature=1.2, top_k=9, seed=6)]
)
def test_another_runner_goes_on_as_the_first_would_have(engine: LlamaCppEngine, sampling: Sampling) -> None:

    prompt = prompt_of(engine, "Name three rivers.")
    held = msgspec.structs.replace(sampling, grammar=JSON)
    stepper = Stepper(engine)
    stepper.begin(0, prompt, held)
    for _ in range(24):
        stepper.step()
    whole = stepper.tokens[0]
    stepper.end(0)
    Follower(engine._grammars.get(JSON), whole)
    for cut in (1, 7, 16):
        known = (*prompt, *whole[:cut])
        engine.begin(1, held, known, drawn=cut)
        resumed = [engine.run(StepPlan(rows=(StepRow(slot=1, tokens=known, start=0, sample=True),))).sampled[1][0]]
        while len(resumed) < len(whole) - cut:
            row = StepRow(slot=1, tokens=(resumed[-1],), start=len(known) + len(resumed) - 1, sample=True)
            resumed.append(engine.run(StepPlan(rows=(row,))).sampled[1][0])
        engine.end(1)
        engine.keep(1, 0)
        assert resumed == whole[cut:], cut


def test_a_sampler_that_was_set_aside_goes_on(engine: LlamaCppEngine) -> None:
    held = Sampling(temperature=0.0, grammar='root ::= "abc" [0-9]{9}')
    prompt = prompt_of(engine, "Hi")
    engine.begin(0, held, prompt)
    first = engine.run(StepPlan(rows=(StepRow(slot=0, tokens=prompt, start=0, sample=True),))).sampled[0][0]
    chain = engine._chains[0]
    engine.end(0, parked=7)
    engine.begin(0, held, (*prompt, first), drawn=1, parked=7)
    assert engine._chains[0] is chain
    row = StepRow(slot=0, tokens=(first,), start=len(prompt), sample=True)
    second = engine.run(StepPlan(rows=(row,))).sampled[0][0]
    assert re.match(rb"a(b(c\d*)?)?$", engine.piece(first) + engine.piece(second))
    engine.end(0)
    engine.keep(0, 0)


def test_what_is_wrong_is_refused_and_the_slot_stays_free(engine: LlamaCppEngine) -> None:
    with pytest.raises(RequestError, match="line 1, column 10") as caught:
        engine.check(Sampling(grammar="root ::= ]"))
    assert caught.value.param == "grammar"
    wrong = (*engine.tokenize("maybe", add_special=False, parse_special=False),)
    for sampling, drawn in ((Sampling(grammar="root ::= ]"), 0), (Sampling(grammar=YES_OR_NO), len(wrong))):
        with pytest.raises(RequestError):
            engine.begin(0, sampling, wrong, drawn=drawn)
    engine.begin(0, GREEDY, ())
    engine.end(0)


@pytest.mark.parametrize("fields", [{}, {"top_k": 3}, {"logit_bias": {1000: 1.0}}])
def test_what_is_drawn_after_a_refusal_has_the_right_odds(engine: LlamaCppEngine, fields: dict[str, Any]) -> None:
    """Of three tokens one is refused; the other two keep their odds of 3 to 1."""
    a, b, c = (engine.tokenize(text, add_special=False, parse_special=False)[0] for text in "abc")
    row = np.full(engine.info.vocabulary_size, -60.0, dtype=np.float32)
    row[[a, b, c]] = np.log([0.5, 0.15, 0.05], dtype=np.float32)
    grammar = engine._grammars.get("root ::= [bc]+")
    count: Counter[int] = Counter()
    for seed in range(1500):
        sampling = Sampling(temperature=1.0, seed=seed, **fields)
        settled = settle(sampling, Sampling(), vocabulary_size=row.size, window=256, choice=0)
        count[SamplerChain(settled, (), engine._workbench, Follower(grammar)).sample_row(row, 9)] += 1
    assert set(count) == {b, c}
    # 4.5 deviations on either side; with the dice of the refused draw one of them would come out far too often.
    assert abs(count[b] - 1125) < 75, count
