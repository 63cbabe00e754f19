"""What a runner asks of an engine, step by step: the runner plans, the engine computes, the runner folds the result.

load(spec, progress) -> Engine
engine.check(sampling), tokens_of(prompt)     any thread
engine.begin(slot, sampling, ...)             engine thread, as are all below
engine.run(plan, go_on) -> result             the only call that takes long
engine.end(slot)                              nothing is drawn there any more; its cells stay
engine.keep, share, move, park, restore       cells, between steps (`skulk.batching.operations`)
engine.close()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import msgspec

from skulk.batching.admission import Reuse
from skulk.batching.step import StepPlan, StepResult
from skulk.engines.canary import Recital
from skulk.wire.embedding import EmbedInput
from skulk.wire.generation import Prompt, Sampling

FlashAttention = Literal["auto", "on", "off"]


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to load and how. Lengths in tokens.

    Attributes:
        path: the (first part of the) weights file.
        sha256: what the file must hash to; None where nothing pins it.
        backend: resolved tag, ``llama_cpp-cpu``, ``llama_cpp-vulkan``, …
        context_length: window of one request that was admitted; never 0, never the trained maximum by default.
        n_parallel: sequences served side by side.
        kv_cells: cells allocated for all sequences together.
        n_threads: 0: physical cores.
        gpu_layers: -1: all where the backend is a GPU; ignored on CPU.
        park_bytes: host memory for states that are set aside, for whoever can go on from them.
        embeds: the model gives vectors or scores, no text.
    """

    path: str
    sha256: str | None = None
    backend: str
    context_length: int
    n_parallel: int = 1
    kv_cells: int
    n_batch: int = 2048
    n_ubatch: int = 512
    n_threads: int = 0
    gpu_layers: int = -1
    flash_attention: FlashAttention = "auto"
    kv_type: str = "f16"
    park_bytes: int = 0
    embeds: bool = False


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was really loaded.

    Attributes:
        n_ctx: window of one request, tokens; at most what was admitted.
        kv_cells: cells really allocated for all sequences together.
        n_batch: the most tokens of one step.
        has_template: False: the plain template is used, with a warning.
        is_unified: one cache that all sequences share; else one stream each.
        reuse: what can be taken over of a sequence's computed tokens, as tried at load.
        shares_cells: sequences of a unified cache can hold the same cells; else `share` fills as many again.
        state_bytes: what a parked state takes, and ``token_bytes`` more for each of its tokens.
        n_threads: of the processor that it computes with; 0: it computes elsewhere.
        pooling: how tokens become one vector, ``rank``: one score; empty: the model generates text.
        embedding_size: numbers of a vector.
        device_bytes: what the load took of a device that tells it of no process (CUDA, ROCm); 0: nothing, or see there.
        build: names the installed build of the library.
        cell_s: seconds that a cell of another sequence adds to each row of a decode step in a unified cache; 0:
            unknown.
    """

    engine: str
    version: str
    backend: str
    architecture: str
    n_ctx: int
    n_parallel: int
    n_batch: int
    vocabulary_size: int
    has_template: bool
    kv_cells: int = 0
    is_unified: bool = False
    reuse: Reuse = "none"
    shares_cells: bool = True
    state_bytes: int = 0
    token_bytes: int = 0
    n_threads: int = 0
    device_bytes: int = 0
    build: str = ""
    cell_s: float = 0.0
    pooling: str = ""
    embedding_size: int = 0


GoOn = Callable[[], bool]
"""Whether another step of a run may follow at once."""


def always() -> bool:
    """A `GoOn` for runs that nothing cuts short."""
    return True


class Engine(Protocol):
    """A loaded model."""

    @property
    def info(self) -> EngineInfo: ...

    def check(self, sampling: Sampling) -> None:
        """Refuses what only the engine can tell is wrong with a request's sampling. Any thread.

        Raises:
            RequestError: ``invalid_request``: an unreadable grammar; ``unsupported_field``: this engine has none.
        """
        ...

    def tokens_of(self, prompt: Prompt) -> Sequence[int]:
        """The ids of a prompt: template, tokenizer, special tokens. Users' text never becomes special tokens.

        Raises:
            RequestError: ``template_failed`` (the template refused, took too long or grew too large),
                ``invalid_request``, ``context_length_exceeded`` (so much text that it can't fit, whatever its tokens).
        """
        ...

    def border_of(self, prompt: Prompt, tokens: Sequence[int]) -> int:
        """How many of a prompt's ``tokens`` come before its last turn; 0: there is no such border. Any thread."""
        ...

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
        """Draws in this slot from now on.

        Args:
            slot: one in which nothing is drawn; its cells are what they are.
            sampling: how.
            history: ids that penalties look back on.
            drawn: how many of them, the last ones, are the answer's own: those that a grammar has read.
            choice: of several of one prompt.
            parked: where `end` has set the sequence's own sampler aside; 0: it is new.

        Raises:
            RequestError: ``invalid_request``: a sampling value is out of its range, or the drawn tokens aren't of the
                grammar; the slot stays free.
        """
        ...

    def run(self, plan: StepPlan, go_on: GoOn = always) -> StepResult:
        """Computes one step, or a run of them. A slot in which nothing can be drawn is told in the result.

        Args:
            plan: ``plan.steps`` steps at most; an engine may always make fewer.
            go_on: asked between two steps whether another one may follow.

        Raises:
            ServiceError: ``runner_failed``: the engine can't go on; the process should end.
        """
        ...

    def end(self, slot: int, *, parked: int = 0) -> None:
        """Nothing is drawn in this slot any more; its cells stay. ``parked``: where its sampler is kept; 0: nowhere."""
        ...

    def keep(self, slot: int, count: int) -> None:
        """Frees the slot's cells from position ``count`` on."""
        ...

    def share(self, source: int, slot: int, count: int) -> None:
        """Gives the empty ``slot`` the first ``count`` tokens of ``source``."""
        ...

    def move(self, source: int, slot: int) -> None:
        """Gives cells and sampler of ``source`` to the empty ``slot``, and leaves ``source`` empty."""
        ...

    def park(self, slot: int, parked: int) -> None:
        """Copies the slot's cells to host memory."""
        ...

    def restore(self, parked: int, slot: int, count: int) -> None:
        """Gives the empty ``slot`` the first ``count`` tokens of what was parked, which stays there."""
        ...

    def forget(self, parked: int) -> None:
        """Frees what was parked there, cells and sampler; nothing there is no error."""
        ...

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
        """One vector of length 1 for each input's ids, pooled as the model wants it; of pairs one score each.

        Args:
            inputs: at most ``n_parallel``, each of 1 to ``n_ctx`` tokens, ``n_batch`` tokens in all.

        Raises:
            RequestError: ``invalid_request``: this model has no embeddings to give.
            ServiceError: ``runner_failed``: the engine can't go on; the process should end.
        """
        ...

    def input_tokens(self, one: EmbedInput) -> Sequence[int]:
        """The ids of an input for `embed`, with the tokens that the model wants around a text. Any thread.

        Raises:
            RequestError: ``invalid_request``: not for this model.
        """
        ...

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> Sequence[int]:
        """The ids of a text. Any thread."""
        ...

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of ids that are the model's, special ones by their names. Any thread."""
        ...

    def set_threads(self, count: int) -> None:
        """Computes with so many threads from the next step on, where the engine has threads of its own."""
        ...

    def recite(self, text: str, count: int, follow: Sequence[int] = ()) -> Recital:
        """Goes on greedily with a text, in the empty slot 0, up to so many tokens, and forgets them; see `canary`.

        Engine thread, before anything was begun. ``follow``: tokens to go on with in place of the drawn ones.

        Raises:
            ServiceError: ``runner_failed``: the engine can't compute.
        """
        ...

    def piece(self, token: int) -> bytes:
        """The bytes of a token's text; empty for control tokens. They may cut a character. Any thread."""
        ...

    def is_end(self, token: int) -> bool:
        """Whether the model ends its answer with this token. Any thread."""
        ...

    def close(self) -> None:
        """Frees everything native; the engine is unusable afterwards."""
        ...


class LoadCancelled(Exception):
    """The load was stopped by its progress callback."""


Progress = Callable[[float], bool]
"""Told 0.0 to 1.0 while loading; returns False to stop the load."""


class Loader(Protocol):
    """How a kind of engine is loaded."""

    def __call__(self, spec: LoadSpec, progress: Progress) -> Engine:
        """Loads a model.

        Raises:
            RequestError: ``model_file_invalid``: cut short, no GGUF, wrong hash, unknown architecture; with what to do.
            ServiceError: ``runner_failed``: out of memory and the like, with the numbers; ``backend_faulty``: what it
                computes are no numbers.
            StartError: ``engine_missing``: the engine's library isn't installed, with what to install.
            LoadCancelled: the callback said so.
        """
        ...
