"""An engine without native code, for tests of everything around an engine. Same input, same output, everywhere.

Its weights file is a small JSON file of `FakeOptions`, so that a real runner process can load it (backend
``fake-cpu``); no prompt can reach its crash hooks. A token is a byte of UTF-8, so characters come in pieces.
The answer is a function of the history alone: words chosen by a hash of everything up to the last START token,
cut after ``answer_tokens``; a resumed request therefore goes on as the first one would have.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, assert_never

import msgspec

from skulk.batching.step import StepPlan, StepResult, StepRow
from skulk.engines.canary import Recital
from skulk.engines.protocol import EngineInfo, GoOn, LoadCancelled, LoadSpec, Progress, always
from skulk.errors import RequestError, ServiceError
from skulk.wire.embedding import EmbedInput, RankPair
from skulk.wire.generation import ChatPrompt, InfillPrompt, Prompt, Sampling, TextPrompt, TokenPrompt

END: Final = 256
START: Final = 257
VOCABULARY_SIZE: Final = 258
BYTES_PER_TOKEN: Final = 8
EMBEDDING_SIZE: Final = 8
_HANG_S: Final = 24 * 3600.0
_TEXT: Final = "the river runs past Köln and 東京 to a quiet sea where 🦊 foxes sleep under old trees"
_WORDS: Final = tuple(_TEXT.split())

Sleep = Callable[[float], None]


class FakeOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the fake behaves. Steps count from 1 over the engine's life; one that misbehaves begins a run of its own.

    Attributes:
        answer_tokens: length of each answer; then END.
        step_s: what every step takes, and ``token_s`` for each of its tokens.
        load_s: what loading takes, in ten parts, each of which can be cancelled.
        load_error: load fails with ``model_file_invalid`` and this text.
        fail_at_step: this step raises ``runner_failed``.
        abort_at_step: this step ends the process like a crash in native code.
        hang_at_step: this step doesn't come back.
        pooling: the engine gives vectors of 8 numbers instead of text, ``rank``: scores.
        once_marker: a path; crash, failure and hang happen only while no such file exists, and make it.
    """

    answer_tokens: int = 48
    step_s: float = 0.0
    token_s: float = 0.0
    load_s: float = 0.0
    load_error: str = ""
    fail_at_step: int | None = None
    abort_at_step: int | None = None
    hang_at_step: int | None = None
    pooling: str = ""
    once_marker: str | None = None


class FakeEngine:
    """See the module. Implements `skulk.engines.protocol.Engine`."""

    def __init__(self, options: FakeOptions, info: EngineInfo, sleep: Sleep) -> None:
        self._options = options
        self._info = info
        self._sleep = sleep
        self._steps = 0
        self._tokens: dict[int, list[int]] = {}
        self._salts: dict[int, str] = {}
        self._parked: dict[int, list[int]] = {}

    @property
    def info(self) -> EngineInfo:
        return self._info

    def check(self, sampling: Sampling) -> None:
        if sampling.grammar is not None:
            raise RequestError("unsupported_field", "grammar: the fake engine has none; leave it out", param="grammar")

    def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        match prompt:
            case ChatPrompt(messages=messages):
                if not messages:
                    raise RequestError("invalid_request", "messages is empty; send at least one.", param="messages")
                text = "".join(f"{message.role}: {message.content}\n" for message in messages)
            case TextPrompt(text=text):
                pass
            case TokenPrompt(tokens=tokens):
                return tokens
            case InfillPrompt(prefix=prefix, suffix=suffix):
                text = f"{prefix}\0{suffix}"
            case _:
                assert_never(prompt)
        return (*text.encode("utf-8", "replace"), START)

    def border_of(self, prompt: Prompt, tokens: Sequence[int]) -> int:
        if not isinstance(prompt, ChatPrompt) or len(prompt.messages) < 2:
            return 0
        return len(self.tokens_of(ChatPrompt(messages=prompt.messages[:-1]))) - 1

    def begin(
        self,
        slot: int,
        sampling: Sampling,
        history: Sequence[int],
        *,
        drawn: int = 0,
        choice: int = 0,
        parked: int = 0,
    ) -> None:
        assert 0 <= slot < self._info.n_parallel and slot not in self._salts, f"slot {slot} can't begin"
        assert all(0 <= token < VOCABULARY_SIZE for token in history), "a history of another engine"
        is_greedy = sampling.temperature == 0
        self._salts[slot] = "" if is_greedy else f"{sampling.seed if sampling.seed is not None else ''} {choice}"

    def run(self, plan: StepPlan, go_on: GoOn = always) -> StepResult:
        started = time.perf_counter()
        sampled = self._step(plan)
        drawn = {slot: (token,) for slot, token in sampled.items()}
        steps = 1
        while steps < plan.steps and END not in sampled.values() and not self._misbehaves_next and go_on():
            plan = following(plan, sampled)
            sampled = self._step(plan)
            drawn = {slot: (*drawn[slot], token) for slot, token in sampled.items()}
            steps += 1
        return StepResult(sampled=drawn, steps=steps, elapsed_s=time.perf_counter() - started)

    def _step(self, plan: StepPlan) -> dict[int, int]:
        self._steps += 1
        self._misbehave()
        pause = self._options.step_s + self._options.token_s * plan.token_count
        if pause > 0:
            self._sleep(pause)
        sampled: dict[int, int] = {}
        for row in plan.rows:
            assert row.slot in self._salts, f"slot {row.slot} was not begun"
            tokens = self._tokens.setdefault(row.slot, [])
            assert row.tokens and row.start == len(tokens), f"slot {row.slot} is at {len(tokens)}, not at {row.start}"
            assert len(tokens) + len(row.tokens) <= self._info.n_ctx, f"slot {row.slot} leaves its window"
            tokens.extend(row.tokens)
            if row.sample:
                sampled[row.slot] = next_token(tokens, self._salts[row.slot], self._options.answer_tokens)
        return sampled

    @property
    def _misbehaves_next(self) -> bool:
        return self._is_due(self._steps + 1)

    def _is_due(self, step: int) -> bool:
        return step in (self._options.fail_at_step, self._options.abort_at_step, self._options.hang_at_step)

    def _misbehave(self) -> None:
        options = self._options
        if not self._is_due(self._steps):
            return
        if options.once_marker is not None:
            marker = Path(options.once_marker)
            if marker.exists():
                return
            marker.touch()
        if self._steps == options.fail_at_step:
            raise ServiceError("runner_failed", f"the fake engine fails at step {self._steps}, as it was told.")
        if self._steps == options.abort_at_step:
            os.abort()
        self._sleep(_HANG_S)

    def end(self, slot: int, *, parked: int = 0) -> None:
        del self._salts[slot]

    def keep(self, slot: int, count: int) -> None:
        tokens = self._tokens.get(slot, [])
        assert 0 <= count <= len(tokens), f"slot {slot} has {len(tokens)} tokens, not {count}"
        self._put(slot, tokens[:count])

    def share(self, source: int, slot: int, count: int) -> None:
        assert source != slot and 0 < count <= len(self._tokens[source]) and not self._tokens.get(slot)
        self._put(slot, self._tokens[source][:count])

    def move(self, source: int, slot: int) -> None:
        assert not self._tokens.get(slot), f"slot {slot} is not empty"
        self._put(slot, self._tokens.pop(source, []))
        if source in self._salts:
            self._salts[slot] = self._salts.pop(source)

    def park(self, slot: int, parked: int) -> None:
        assert parked not in self._parked, f"{parked} was used before"
        self._parked[parked] = list(self._tokens[slot])

    def restore(self, parked: int, slot: int, count: int) -> None:
        assert 0 < count <= len(self._parked[parked]) and not self._tokens.get(slot)
        self._put(slot, self._parked[parked][:count])

    def forget(self, parked: int) -> None:
        self._parked.pop(parked, None)

    def input_tokens(self, one: EmbedInput) -> tuple[int, ...]:
        match one:
            case RankPair(query=query, document=document):
                return tuple(f"{query}\0{document}".encode())
            case TextPrompt(text=text):
                return tuple(text.encode("utf-8", "replace"))
            case TokenPrompt(tokens=tokens):
                return tokens

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
        """Vectors, or scores, that are a function of the ids alone."""
        if not self._options.pooling:
            raise RequestError("invalid_request", "the fake engine was told to generate text.", param="model")
        self._steps += 1
        self._misbehave()
        if self._options.step_s > 0:
            self._sleep(self._options.step_s)
        return [self._vector(tokens) for tokens in inputs]

    def _vector(self, tokens: Sequence[int]) -> list[float]:
        digest = hashlib.blake2b(msgspec.json.encode(list(tokens)), digest_size=EMBEDDING_SIZE).digest()
        if self._options.pooling == "rank":
            return [digest[0] / 255]
        length = math.sqrt(sum(byte * byte for byte in digest)) or 1.0
        return [byte / length for byte in digest]

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> tuple[int, ...]:
        del parse_special
        return (*text.encode("utf-8", "replace"), *((START,) if add_special else ()))

    def detokenize(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < END).decode("utf-8", "replace")

    def set_threads(self, count: int) -> None:
        assert count > 0

    def recite(self, text: str, count: int, follow: Sequence[int] = ()) -> Recital:
        del follow
        tokens = tuple(answer_of(text.encode(), "", count))
        return Recital(tokens=tokens, margins=(1.0,) * len(tokens))

    def _put(self, slot: int, tokens: list[int]) -> None:
        self._tokens[slot] = tokens

    def piece(self, token: int) -> bytes:
        return bytes((token,)) if token < END else b""

    def is_end(self, token: int) -> bool:
        return token == END

    def close(self) -> None:
        self._tokens.clear()
        self._salts.clear()
        self._parked.clear()


def following(plan: StepPlan, sampled: Mapping[int, int]) -> StepPlan:
    """The next step of a run: each row's drawn token."""
    rows = tuple(
        StepRow(slot=row.slot, tokens=(sampled[row.slot],), start=row.start + len(row.tokens), sample=True)
        for row in plan.rows
    )
    return StepPlan(rows=rows, steps=plan.steps)


def answer_of(prompt: Sequence[int], salt: str, length: int) -> bytes:
    """The answer to a prompt: ``length`` bytes of words, whole characters, padded with dots."""
    answer = bytearray()
    count = 0
    while len(answer) < length:
        key = b" ".join((salt.encode(), str(count).encode(), msgspec.json.encode(list(prompt))))
        word = _WORDS[int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") % len(_WORDS)]
        answer += (" " if count else "").encode() + word.encode()
        count += 1
    cut = bytes(answer[:length]).decode("utf-8", "ignore").encode()
    return cut + b"." * (length - len(cut))


def next_token(tokens: Sequence[int], salt: str, answer_tokens: int) -> int:
    """What follows these tokens: a pure function."""
    after_start = next((index for index in range(len(tokens), 0, -1) if tokens[index - 1] == START), 0)
    emitted = len(tokens) - after_start
    if emitted >= answer_tokens:
        return END
    return answer_of(tokens[:after_start], salt, answer_tokens)[emitted]


class FakeLoader:
    """A `Loader` whose time is the caller's. ``sleep`` takes seconds."""

    def __init__(self, sleep: Sleep = time.sleep) -> None:
        self._sleep = sleep

    def __call__(self, spec: LoadSpec, progress: Progress) -> FakeEngine:
        """See `skulk.engines.protocol.Loader`; ``spec.path``: a JSON file of `FakeOptions`."""
        options = _options_of(spec.path)
        for part in range(11):
            if not progress(part / 10):
                raise LoadCancelled
            if options.load_s > 0 and part < 10:
                self._sleep(options.load_s / 10)
        if options.load_error:
            raise RequestError("model_file_invalid", options.load_error)
        info = EngineInfo(
            engine="fake",
            version="1",
            build="fake",
            backend=spec.backend,
            architecture="fake",
            n_ctx=spec.context_length,
            n_parallel=spec.n_parallel,
            n_batch=spec.n_batch,
            vocabulary_size=VOCABULARY_SIZE,
            has_template=True,
            kv_cells=spec.kv_cells,
            is_unified=spec.kv_cells < spec.n_parallel * spec.context_length,
            reuse="cut",
            token_bytes=BYTES_PER_TOKEN,
            pooling=options.pooling,
            embedding_size=0 if not options.pooling else 1 if options.pooling == "rank" else EMBEDDING_SIZE,
        )
        return FakeEngine(options, info, self._sleep)


def _options_of(path: str) -> FakeOptions:
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=FakeOptions)
    except OSError as error:
        raise RequestError("model_file_invalid", f"{path} can't be read: {error.strerror}; check the path.") from error
    except msgspec.DecodeError as error:
        raise RequestError("model_file_invalid", f"{path} holds no options of the fake engine: {error}.") from error


def load(spec: LoadSpec, progress: Progress) -> FakeEngine:
    """The fake's `Loader` on the machine's own time."""
    return FakeLoader()(spec, progress)
