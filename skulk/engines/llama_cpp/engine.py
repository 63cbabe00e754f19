"""A loaded GGUF model: slots, one batch a step, one sampler chain a slot. Implements `skulk.engines.protocol.Engine`.

    thread   calls
    engine   begin, run, end, keep, share, move, park, restore, forget, embed, set_threads, close
    any      info, check, tokens_of, border_of, piece, is_end (the owner ends them before `close`)

    cells     `skulk.engines.llama_cpp.memory`: how many tokens of each slot are computed, and their copies
    samplers  begin ──> in a slot ──end──> freed, or set aside under a parked id ──begin──> in a slot again

A slot is a sequence id of the cache. In the stream layout running slots should be neighbours: llama.cpp computes the
streams from the lowest to the highest in one go.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np

from skulk.batching.step import StepPlan, StepResult, StepRow
from skulk.engines.canary import TIMED_STEPS, Recital
from skulk.engines.grammar.constraint import Follower, Grammars
from skulk.engines.llama_cpp.batch import Batch
from skulk.engines.llama_cpp.chain import SamplerChain, Workbench
from skulk.engines.llama_cpp.layout import Layout, calls_of, idle_cell_s
from skulk.engines.llama_cpp.memory import SequenceMemory
from skulk.engines.llama_cpp.native import forget_errors, library, recent_errors
from skulk.engines.llama_cpp.prompt import Prompter
from skulk.engines.llama_cpp.sampling import settle
from skulk.engines.llama_cpp.threads import waited_s
from skulk.engines.llama_cpp.vocabulary import Vocabulary
from skulk.engines.protocol import EngineInfo, GoOn, always
from skulk.errors import RequestError, ServiceError
from skulk.wire.base import ErrorBody
from skulk.wire.embedding import EmbedInput
from skulk.wire.generation import Prompt, Sampling, TextPrompt

_TIMED_STEPS: Final = 5


class LlamaCppEngine:
    """The engine; `skulk.engines.llama_cpp.loader.load` makes it. It owns the handles that it is given."""

    def __init__(
        self,
        *,
        model: int,
        context: int,
        layout: Layout,
        info: EngineInfo,
        vocabulary: Vocabulary,
        prompter: Prompter,
        defaults: Sampling,
    ) -> None:
        self._lib: Any = library()
        self._model: int | None = model
        self._context: int | None = context
        forgets = 0 < self._lib.llama_model_n_swa(model) < info.n_ctx
        self._memory = SequenceMemory(context, n_parallel=info.n_parallel, is_unified=layout.unified, forgets=forgets)
        # A call of several passes loses cells of the window that its first pass needs: llama_kv_cache::prepare tries
        # them all beforehand, and doesn't bring back what the later ones have purged.
        self._layout = msgspec.structs.replace(layout, n_batch=layout.n_ubatch) if forgets else layout
        self._info = info
        self._vocabulary = vocabulary
        self._prompter = prompter
        self._defaults = defaults
        self._workbench = Workbench(vocabulary)
        self._grammars = Grammars(vocabulary.for_grammars)
        self._batch = Batch(layout.n_batch, info.n_parallel)
        self._chains: dict[int, SamplerChain] = {}
        self._aside: dict[int, SamplerChain] = {}

    @property
    def info(self) -> EngineInfo:
        return self._info

    def check(self, sampling: Sampling) -> None:
        """See `Engine.check`."""
        if sampling.grammar is not None:
            self._grammars.get(sampling.grammar)

    def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        """See `Engine.tokens_of`; also ``context_length_exceeded`` for text that can't fit whatever its tokens are."""
        return self._prompter.tokens_of(prompt)

    def piece(self, token: int) -> bytes:
        return self._vocabulary.piece(token)

    def is_end(self, token: int) -> bool:
        return self._vocabulary.is_end(token)

    def border_of(self, prompt: Prompt, tokens: Sequence[int]) -> int:
        """See `Engine.border_of`; costs another rendering of the template."""
        return self._prompter.border_of(prompt, tuple(tokens))

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
        """See `Engine.begin`.

        Raises:
            RequestError: ``invalid_request``: a sampling value is out of its range, the grammar can't be read, or what
                was drawn isn't of it; nothing was begun.
        """
        assert 0 <= slot < self._info.n_parallel, f"slot {slot} of {self._info.n_parallel}"
        assert slot not in self._chains, f"slot {slot} is taken"
        aside = self._aside.pop(parked, None)
        if aside is not None:
            self._chains[slot] = aside
            return
        settled = settle(
            sampling,
            self._defaults,
            vocabulary_size=self._vocabulary.size,
            window=self._info.n_ctx,
            choice=choice,
        )
        follower: Follower | None = None
        if sampling.grammar is not None:
            follower = Follower(self._grammars.get(sampling.grammar), history[len(history) - drawn :])
        self._chains[slot] = SamplerChain(settled, history, self._workbench, follower)

    def end(self, slot: int, *, parked: int = 0) -> None:
        """See `Engine.end`."""
        chain = self._chains.pop(slot)
        if parked:
            assert parked not in self._aside, f"a sampler was set aside at {parked} before"
            self._aside[parked] = chain

    def keep(self, slot: int, count: int) -> None:
        """See `Engine.keep`."""
        self._memory.keep(slot, count)

    def share(self, source: int, slot: int, count: int) -> None:
        """See `Engine.share`."""
        self._memory.share(source, slot, count)

    def move(self, source: int, slot: int) -> None:
        """See `Engine.move`."""
        self._memory.move(source, slot)
        if source in self._chains:
            self._chains[slot] = self._chains.pop(source)

    def park(self, slot: int, parked: int) -> None:
        """See `Engine.park`."""
        self._memory.park(slot, parked)

    def restore(self, parked: int, slot: int, count: int) -> None:
        """See `Engine.restore`."""
        self._memory.restore(parked, slot, count)

    def forget(self, parked: int) -> None:
        """See `Engine.forget`."""
        self._memory.forget(parked)
        self._aside.pop(parked, None)

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Engine.embed`: this loader loads models that generate, and they are refused."""
        raise RequestError(
            "invalid_request",
            f"{len(inputs)} inputs for embeddings came to a model that generates text ({self._info.architecture}); "
            "ask an embedding model.",
            param="model",
        )

    def input_tokens(self, one: EmbedInput) -> tuple[int, ...]:
        """See `Engine.input_tokens`; always refused, as `embed`."""
        raise RequestError(
            "invalid_request",
            f"{type(one).__name__} came to a model that generates text ({self._info.architecture}); ask an embedding "
            "model.",
            param="model",
        )

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> tuple[int, ...]:
        """See `Engine.tokenize`."""
        return self._vocabulary.tokenise(text, parse_special=parse_special, add_special=add_special)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """See `Engine.detokenize`."""
        return self._vocabulary.detokenise(tokens)

    def set_threads(self, count: int) -> None:
        """See `Engine.set_threads`."""
        assert count > 0
        self._lib.llama_set_n_threads(self._handle(), count, count)

    def run(self, plan: StepPlan, go_on: GoOn = always) -> StepResult:
        """See `Engine.run`. A step takes one native call or several, a run one a step; see `calls_of`."""
        started = time.perf_counter()
        self._check(plan)
        drawn: dict[int, list[int]] = {}
        failed: dict[int, ErrorBody] = {}
        steps = 1
        calls = calls_of(plan.rows, self._layout)
        for rows in calls:
            outputs = self._batch.fill(rows)
            self._decode()
            self._sample(outputs, {row.slot: row.start + len(row.tokens) for row in rows}, drawn, failed)
        if plan.steps > 1 and len(calls) == 1:
            steps += self._run_on(calls[0], plan.steps - 1, go_on, drawn, failed)
        result = StepResult(
            sampled={slot: tuple(tokens) for slot, tokens in drawn.items()},
            failed=failed,
            steps=steps,
            elapsed_s=time.perf_counter() - started,
        )
        for row in plan.rows:
            self._memory.computed(row.slot, result.computed(row))
        return result

    def _run_on(
        self,
        rows: Sequence[StepRow],
        most: int,
        go_on: GoOn,
        drawn: dict[int, list[int]],
        failed: dict[int, ErrorBody],
    ) -> int:
        """Further steps of single rows, on what the last one drew; gives their number."""
        outputs = {row.slot: at for at, row in enumerate(rows)}
        ends = {row.slot: row.start + 1 for row in rows}
        for steps in range(most):
            if failed or not go_on():
                return steps
            tokens = [drawn[slot][-1] for slot in outputs]
            if not self._vocabulary.ends.isdisjoint(tokens):
                return steps
            self._batch.go_on(tokens)
            self._decode()
            for slot in ends:
                ends[slot] += 1
            self._sample(outputs, ends, drawn, failed)
        return most

    def _sample(
        self,
        outputs: dict[int, int],
        ends: dict[int, int],
        drawn: dict[int, list[int]],
        failed: dict[int, ErrorBody],
    ) -> None:
        """Draws for each slot of ``outputs`` from its row of the last call."""
        for slot, index in outputs.items():
            try:
                token = self._chains[slot].sample(self._handle(), index, ends[slot])
            except RequestError as error:
                failed[slot] = ErrorBody.of(error)
            else:
                drawn.setdefault(slot, []).append(token)

    def _check(self, plan: StepPlan) -> None:
        """The planner's promises; native code would compute nonsense, or abort, on broken ones."""
        assert plan.rows, "an empty step"
        assert len({row.slot for row in plan.rows}) == len(plan.rows), "a slot twice in one step"
        for row in plan.rows:
            self._check_row(row)

    def _check_row(self, row: StepRow) -> None:
        assert row.slot in self._chains, f"slot {row.slot} was not begun"
        position = self._memory.position(row.slot)
        assert row.tokens, f"slot {row.slot} has a row without tokens"
        assert row.start == position, f"slot {row.slot} is at {position}, not at {row.start}"
        assert row.start + len(row.tokens) <= self._info.n_ctx, (
            f"slot {row.slot} leaves its window of {self._info.n_ctx}"
        )
        assert all(0 <= token < self._vocabulary.size for token in row.tokens), f"no token of this model in {row.slot}"

    def _decode(self) -> None:
        forget_errors()
        status: int = self._lib.llama_decode(self._handle(), self._batch.native)
        if status == 0:
            return
        reason = "; ".join(recent_errors()) or "no reason given"
        if status == 1:
            reason = f"no room for {self._batch.native.n_tokens} tokens in a cache of {self._layout.n_ctx} cells"
        raise ServiceError(
            "runner_failed", f"llama.cpp could not compute a step (llama_decode gave {status}): {reason}."
        )

    def warm_up(self) -> None:
        """Computes one full chunk and some decode steps, tries what can be reused of them, and forgets all.

        A ready engine has worked once, and `info` tells what was found out.

        Raises:
            ServiceError: ``runner_failed``: it can't.
        """
        chunk = max(1, min(self._layout.n_ubatch, self._info.n_ctx - 1))
        self.begin(0, Sampling(temperature=0.0), ())
        try:
            drawn = self._first_chunk(chunk)
            size = self._memory.size(0)
            deep_s = self._timed_steps(drawn)
            beside_s = self._timed_beside(chunk)
            count = self._memory.position(0)
            token_bytes = -(-(self._memory.size(0) - size) // max(1, count - chunk))
            reuse = self._memory.tried()
            self._memory.clear()
            cell_s = 0.0
            if beside_s > 0.0:
                alone_s = self._timed_steps(self._first_chunk(1))
                cell_s = idle_cell_s(chunk, own_s=deep_s - alone_s, beside_s=beside_s - alone_s)
        finally:
            self.end(0)
            self._memory.clear()
        self._info = msgspec.structs.replace(
            self._info,
            is_unified=self._layout.unified,
            reuse=reuse,
            shares_cells=self._memory.shares_cells,
            state_bytes=size if count == chunk else max(0, size - token_bytes * chunk),
            token_bytes=token_bytes,
            cell_s=cell_s,
        )

    def _first_chunk(self, count: int, slot: int = 0) -> int:
        """Computes so many tokens in the empty slot; gives the token drawn after them."""
        token = self._vocabulary.bos if self._vocabulary.bos is not None else 0
        row = StepRow(slot=slot, tokens=(token,) * count, start=0, sample=True)
        return self.run(StepPlan(rows=(row,))).sampled[slot][-1]

    def _timed_steps(self, token: int, slot: int = 0) -> float:
        """Decodes on in the slot while its window lasts; the least time of a step, 0 where it has no room for one.

        The least, for what other programs do to a step is more than what is to be measured.
        """
        start = self._memory.position(slot)
        times: list[float] = []
        for position in range(start, min(start + _TIMED_STEPS, self._info.n_ctx)):
            drawn = self.run(StepPlan(rows=(StepRow(slot=slot, tokens=(token,), start=position, sample=True),)))
            token = drawn.sampled[slot][-1]
            times.append(drawn.elapsed_s)
        return min(times, default=0.0)

    def _timed_beside(self, chunk: int) -> float:
        """As `_timed_steps`, of a short sequence beside slot 0; 0 where no other sequence shares cells with it."""
        taken = chunk + 2 * _TIMED_STEPS + 1
        if not self._layout.unified or self._info.n_parallel < 2 or taken > self._layout.n_ctx:
            return 0.0
        self.begin(1, Sampling(temperature=0.0), ())
        try:
            return self._timed_steps(self._first_chunk(1, slot=1), slot=1)
        finally:
            self.end(1)

    def recite(self, text: str, count: int, follow: Sequence[int] = ()) -> Recital:
        """See `Engine.recite`."""
        prompt = tuple(self.tokens_of(TextPrompt(text=text)))
        room = min(count, self._info.n_ctx - len(prompt))
        tokens: list[int] = []
        margins: list[float] = []
        times: list[float] = []
        row = StepRow(slot=0, tokens=prompt, start=0, sample=True)
        waited = 0.0
        self.begin(0, Sampling(temperature=0.0), ())
        try:
            while len(tokens) < room:
                result = self.run(StepPlan(rows=(row,)))
                if tokens:
                    times.append(result.elapsed_s)
                else:
                    waited = waited_s()
                margins.append(self._margin())
                token = result.sampled[0][-1]
                at = len(tokens)
                if self.is_end(token) and at >= len(follow):
                    break
                tokens.append(token)
                row = StepRow(
                    slot=0,
                    tokens=(follow[at] if at < len(follow) else token,),
                    start=row.start + len(row.tokens),
                    sample=True,
                )
        finally:
            self.end(0)
            self._memory.clear()
        if len(times) < TIMED_STEPS:
            return Recital(tokens=tuple(tokens), margins=tuple(margins))
        return Recital(
            tokens=tuple(tokens),
            margins=tuple(margins),
            step_s=statistics.median(times),
            waited_s=(waited_s() - waited) / len(times),
        )

    def _margin(self) -> float:
        """How far the two greatest scores of the last row are apart."""
        second, first = np.partition(self._workbench.row(self._handle(), -1), -2)[-2:]
        return float(first - second)

    def close(self) -> None:
        """See `Engine.close`; a second call does nothing."""
        self._chains.clear()
        self._aside.clear()
        self._prompter.close()
        if self._context:
            self._lib.llama_free(self._context)
            self._context = None
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None

    def _handle(self) -> int:
        assert self._context, "the engine was closed"
        return self._context
