"""A loaded GGUF model: slots, one batch a step, one sampler chain a slot. Implements `skulk.engines.protocol.Engine`.

    thread   calls
    engine   begin, run, end, close
    any      info, tokens_of, piece, is_end (the owner ends them before `close`)

    slot:    free ──begin──> open (position 0) ──run──> open (position n) ──end──> free

A slot is a sequence id of the cache. In the stream layout running slots should be the lowest ones, without holes:
llama.cpp computes the streams from the lowest to the highest in one go.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from skulk.batching.step import StepPlan, StepResult, StepRow
from skulk.engines.llama_cpp.batch import Batch
from skulk.engines.llama_cpp.chain import SamplerChain, Workbench
from skulk.engines.llama_cpp.layout import Layout, split_rows
from skulk.engines.llama_cpp.native import forget_errors, library, recent_errors
from skulk.engines.llama_cpp.prompt import Prompter
from skulk.engines.llama_cpp.sampling import settle
from skulk.engines.llama_cpp.vocabulary import Vocabulary
from skulk.engines.protocol import EngineInfo
from skulk.errors import ServiceError
from skulk.wire.generation import Prompt, Sampling

_ALL = -1


class _Slot:
    """An open slot: its chain, and the position that its next token takes."""

    def __init__(self, chain: SamplerChain) -> None:
        self.chain = chain
        self.position = 0


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
        self._memory: int = self._lib.llama_get_memory(context)
        self._layout = layout
        self._info = info
        self._vocabulary = vocabulary
        self._prompter = prompter
        self._defaults = defaults
        self._workbench = Workbench(vocabulary)
        self._batch = Batch(layout.n_batch, info.n_parallel)
        self._slots: dict[int, _Slot] = {}

    @property
    def info(self) -> EngineInfo:
        return self._info

    def tokens_of(self, prompt: Prompt) -> tuple[int, ...]:
        """See `Engine.tokens_of`; also ``context_length_exceeded`` for text that can't fit whatever its tokens are."""
        return self._prompter.tokens_of(prompt)

    def piece(self, token: int) -> bytes:
        return self._vocabulary.piece(token)

    def is_end(self, token: int) -> bool:
        return self._vocabulary.is_end(token)

    def begin(self, slot: int, sampling: Sampling, history: Sequence[int], *, choice: int = 0) -> None:
        """See `Engine.begin`.

        Raises:
            RequestError: ``invalid_request``: a sampling value is out of its range; the slot stays free.
        """
        assert 0 <= slot < self._info.n_parallel, f"slot {slot} of {self._info.n_parallel}"
        assert slot not in self._slots, f"slot {slot} is taken"
        settled = settle(
            sampling,
            self._defaults,
            vocabulary_size=self._vocabulary.size,
            window=self._info.n_ctx,
            choice=choice,
        )
        self._slots[slot] = _Slot(SamplerChain(settled, history, self._workbench))

    def run(self, plan: StepPlan) -> StepResult:
        """See `Engine.run`. A step of more than ``n_batch`` tokens takes several native calls."""
        started = time.perf_counter()
        self._check(plan)
        sampled: dict[int, int] = {}
        for rows in split_rows(plan.rows, self._layout.n_batch):
            outputs = self._batch.fill(sorted(rows, key=lambda row: row.slot))
            self._decode()
            ends = {row.slot: row.start + len(row.tokens) for row in rows}
            for slot, index in outputs.items():
                sampled[slot] = self._slots[slot].chain.sample(self._handle(), index, ends[slot])
        for row in plan.rows:
            self._slots[row.slot].position = row.start + len(row.tokens)
        return StepResult(sampled=sampled, elapsed_s=time.perf_counter() - started)

    def _check(self, plan: StepPlan) -> None:
        """The planner's promises; native code would compute nonsense, or abort, on broken ones."""
        assert plan.rows, "an empty step"
        assert len({row.slot for row in plan.rows}) == len(plan.rows), "a slot twice in one step"
        for row in plan.rows:
            self._check_row(row)

    def _check_row(self, row: StepRow) -> None:
        slot = self._slots.get(row.slot)
        assert slot is not None, f"slot {row.slot} was not begun"
        assert row.tokens, f"slot {row.slot} has a row without tokens"
        assert row.start == slot.position, f"slot {row.slot} is at {slot.position}, not at {row.start}"
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

    def end(self, slot: int) -> None:
        """See `Engine.end`."""
        del self._slots[slot]
        was_removed = self._lib.llama_memory_seq_rm(self._memory, slot, _ALL, _ALL)
        assert was_removed, f"llama.cpp kept the cells of slot {slot}"

    def warm_up(self) -> None:
        """Computes one full chunk and one decode step, and forgets them: a ready engine has worked once.

        Raises:
            ServiceError: ``runner_failed``: it can't.
        """
        token = self._vocabulary.bos if self._vocabulary.bos is not None else 0
        chunk = max(1, min(self._layout.n_ubatch, self._info.n_ctx - 1))
        self.begin(0, Sampling(temperature=0.0), ())
        try:
            drawn = self.run(StepPlan(rows=(StepRow(slot=0, tokens=(token,) * chunk, start=0, sample=True),)))
            if chunk < self._info.n_ctx:
                row = StepRow(slot=0, tokens=(drawn.sampled[0],), start=chunk, sample=True)
                self.run(StepPlan(rows=(row,)))
        finally:
            self.end(0)
        self._lib.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        """See `Engine.close`; a second call does nothing."""
        self._slots.clear()
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
