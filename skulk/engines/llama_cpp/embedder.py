"""A loaded GGUF model that gives vectors or scores. Implements `skulk.engines.protocol.Engine`, but for generation.

    call: every input in a sequence of its own ──> llama_decode ──> llama_get_embeddings_seq ──> vectors of length 1

Nothing is kept between two calls. An input is never cut: pooling wants all of its tokens in one pass, so ``n_ubatch``
is ``n_batch``, and the window of a request is at most that. Pairs are put together as llama.cpp's server does it: by
the template ``rerank`` of the file, else with the vocabulary's own marks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, Final

from skulk.engines.llama_cpp.batch import Batch
from skulk.engines.llama_cpp.failures import context_failure
from skulk.engines.llama_cpp.native import engine_version, forget_errors, library, recent_errors
from skulk.engines.llama_cpp.threads import physical_cores
from skulk.engines.llama_cpp.vocabulary import Vocabulary
from skulk.engines.no_generation import NoGeneration
from skulk.engines.protocol import EngineInfo, LoadSpec
from skulk.errors import RequestError, ServiceError
from skulk.wire.embedding import EmbedInput, RankPair
from skulk.wire.generation import TextPrompt, TokenPrompt

log = logging.getLogger(__name__)

POOLINGS: Final = {1: "mean", 2: "cls", 3: "last", 4: "rank"}
"""``llama_pooling_type``; 0 is none: a vector for each token, which nobody asks for here."""


_MEAN: Final = 1
_RANK: Final = 4
_MIN_BATCH: Final = 512
"""Tokens of one call at least, so that short inputs share one."""
_FLASH_ATTENTION: Final = {"auto": -1, "off": 0, "on": 1}


def open_embedder(
    model: int, spec: LoadSpec, architecture: str, taken: Callable[[], int], *, has_pooling: bool
) -> LlamaCppEmbedder:
    """The engine of a model that was read; on an error the model is still the caller's.

    Args:
        taken: what the load has taken of a device so far, bytes.
        has_pooling: the file says how tokens become one vector; else they are averaged, with a warning.

    Raises:
        ServiceError: ``runner_failed``: no memory for it.
    """
    lib = library()
    window = min(spec.context_length, spec.n_batch)
    n_batch = max(window, min(_MIN_BATCH, spec.n_batch))
    params = lib.llama_context_default_params()
    params.embeddings = True
    params.n_ctx = params.n_batch = params.n_ubatch = n_batch
    params.n_seq_max = spec.n_parallel
    params.kv_unified = True
    params.n_threads = params.n_threads_batch = spec.n_threads or physical_cores()
    params.flash_attn_type = _FLASH_ATTENTION[spec.flash_attention]
    params.no_perf = True
    if not has_pooling:
        log.warning("%s doesn't say how its tokens become one vector; they are averaged", spec.path)
        params.pooling_type = _MEAN
    if spec.backend.endswith("-cpu"):
        params.offload_kqv = params.op_offload = False
    forget_errors()
    context: int | None = lib.llama_init_from_model(model, params)
    if not context:
        raise context_failure(n_batch, spec.n_parallel, spec.kv_type, recent_errors())
    try:
        pooling: int = lib.llama_pooling_type(context)
        vocabulary = Vocabulary(model)
        size_of = lib.llama_model_n_cls_out if pooling == _RANK else lib.llama_model_n_embd_out
        info = EngineInfo(
            engine="llama_cpp",
            version=engine_version(),
            backend=spec.backend,
            architecture=architecture,
            n_ctx=window,
            n_parallel=int(lib.llama_n_seq_max(context)),
            n_batch=n_batch,
            vocabulary_size=vocabulary.size,
            has_template=True,
            kv_cells=n_batch,
            n_threads=int(lib.llama_n_threads(context)) if spec.backend.endswith("-cpu") else 0,
            device_bytes=taken(),
            pooling=POOLINGS[pooling],
            embedding_size=int(size_of(model)),
        )
        template: bytes | None = lib.llama_model_chat_template(model, b"rerank")
        rank_template = template.decode("utf-8", "replace") if template else None
        return LlamaCppEmbedder(
            model=model, context=context, info=info, vocabulary=vocabulary, rank_template=rank_template
        )
    except BaseException:
        lib.llama_free(context)
        raise


class LlamaCppEmbedder(NoGeneration):
    """The engine; `skulk.engines.llama_cpp.loader.load` makes it. It owns the handles that it is given.

    Args:
        rank_template: how a pair becomes text, with ``{query}`` and ``{document}``; None: by the vocabulary's marks.
    """

    def __init__(
        self, *, model: int, context: int, info: EngineInfo, vocabulary: Vocabulary, rank_template: str | None
    ) -> None:
        self._lib: Any = library()
        self._model: int | None = model
        self._context: int | None = context
        self._memory: int | None = self._lib.llama_get_memory(context)
        self._info = info
        self._vocabulary = vocabulary
        self._rank_template = rank_template
        self._batch = Batch(info.n_batch, info.n_parallel)

    @property
    def info(self) -> EngineInfo:
        return self._info

    def input_tokens(self, one: EmbedInput) -> tuple[int, ...]:
        """See `Engine.input_tokens`."""
        is_ranker = self._info.pooling == "rank"
        if isinstance(one, RankPair) != is_ranker:
            raise RequestError(
                "invalid_request",
                "this model scores documents for a query: POST /v1/rerank"
                if is_ranker
                else "this model gives embeddings and ranks nothing: POST /v1/embeddings",
                param="model",
            )
        match one:
            case RankPair():
                return self._pair(one)
            case TextPrompt(text=text):
                return self._vocabulary.tokenise(text, parse_special=False, add_special=True)
            case TokenPrompt(tokens=tokens):
                self._vocabulary.check_ids(tokens, "input")
                return tokens

    def _pair(self, pair: RankPair) -> tuple[int, ...]:
        words = self._vocabulary
        if self._rank_template is not None:
            # Each text on its own, so that nothing in it becomes a special token of the template.
            before, _, rest = self._rank_template.partition("{query}")
            between, _, after = rest.partition("{document}")
            parts = ((before, True), (pair.query, False), (between, True), (pair.document, False), (after, True))
            return tuple(token for text, is_ours in parts for token in words.tokenise(text, parse_special=is_ours))
        query = words.tokenise(pair.query, parse_special=False)
        document = words.tokenise(pair.document, parse_special=False)
        end = words.eos if words.eos is not None else words.sep
        ends = (end,) if words.adds_eos and end is not None else ()
        starts = (words.bos,) if words.adds_bos and words.bos is not None else ()
        between = (words.sep,) if words.adds_sep and words.sep is not None else ()
        return (*starts, *query, *ends, *between, *document, *(ends or between))

    def embed(self, inputs: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Engine.embed`."""
        assert 0 < len(inputs) <= self._info.n_parallel, f"{len(inputs)} inputs in one call"
        assert all(0 < len(tokens) <= self._info.n_ctx for tokens in inputs), "an input leaves the window"
        context = self._handle()
        if self._memory:
            self._lib.llama_memory_clear(self._memory, False)
        self._batch.fill_whole(inputs)
        forget_errors()
        status: int = self._lib.llama_decode(context, self._batch.native)
        if status != 0:
            reason = "; ".join(recent_errors()) or "no reason given"
            raise ServiceError("runner_failed", f"llama.cpp could not compute vectors (it gave {status}): {reason}.")
        return [self._vector(context, slot) for slot in range(len(inputs))]

    def _vector(self, context: int, slot: int) -> list[float]:
        pointer = self._lib.llama_get_embeddings_seq(context, slot)
        assert pointer, f"sequence {slot} has no vector"
        vector: list[float] = pointer[: self._info.embedding_size]
        if not all(map(math.isfinite, vector)):
            raise ServiceError(
                "runner_failed",
                "the model's vectors are no numbers: its weights are damaged, or this backend computes them wrongly.",
            )
        if self._info.pooling == "rank":
            return vector
        length = math.sqrt(sum(number * number for number in vector))
        return [number / length for number in vector] if length > 0.0 else vector

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

    def piece(self, token: int) -> bytes:
        return self._vocabulary.piece(token)

    def is_end(self, token: int) -> bool:
        return self._vocabulary.is_end(token)

    def warm_up(self) -> None:
        """Computes one input as long as the window, so that a ready engine has worked once.

        Raises:
            ServiceError: ``runner_failed``: it can't.
        """
        token = self._vocabulary.bos if self._vocabulary.bos is not None else 0
        self.embed([(token,) * self._info.n_ctx])

    def close(self) -> None:
        """See `Engine.close`; a second call does nothing."""
        if self._context:
            self._lib.llama_free(self._context)
            self._context = None
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None

    def _handle(self) -> int:
        assert self._context, "the engine was closed"
        return self._context
