"""Loads a GGUF model into an engine that has worked once.

check the file -> hash it where it is pinned -> weights -> context -> prompts -> one chunk and one decode step
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec

from skulk.engines.llama_cpp.amx import can_use_tiles
from skulk.engines.llama_cpp.chain import NoNumbers
from skulk.engines.llama_cpp.devices import device_list, free_bytes
from skulk.engines.llama_cpp.embedder import LlamaCppEmbedder, open_embedder
from skulk.engines.llama_cpp.engine import LlamaCppEngine
from skulk.engines.llama_cpp.failures import context_failure, load_failure
from skulk.engines.llama_cpp.layout import Layout, kv_type_of, layout_of
from skulk.engines.llama_cpp.native import build_id, engine_version, forget_errors, library, recent_errors
from skulk.engines.llama_cpp.prompt import Prompter
from skulk.engines.llama_cpp.sampling import model_defaults
from skulk.engines.llama_cpp.threads import physical_cores
from skulk.engines.llama_cpp.vocabulary import Vocabulary
from skulk.engines.protocol import EngineInfo, LoadCancelled, LoadSpec, Progress
from skulk.errors import RequestError, ServiceError
from skulk.units import MIB

log = logging.getLogger(__name__)

MAX_METADATA_BYTES: Final = 4 * MIB
_HASH_BLOCK_BYTES: Final = 8 * MIB
_MAGIC: Final = b"GGUF"
# llama_flash_attn_type of llama.h.
_FLASH_ATTENTION: Final = {"auto": -1, "off": 0, "on": 1}


def load(spec: LoadSpec, progress: Progress) -> LlamaCppEngine | LlamaCppEmbedder:
    """See `skulk.engines.protocol.Loader`. Blocks for as long as the weights take to load."""
    kv_type = kv_type_of(spec.kv_type)
    _check_file(spec, progress)
    lib = library()
    compute = spec.backend.partition("-")[2]
    free_before = free_bytes(compute)
    model = _load_model(lib, spec, progress)

    def taken() -> int:
        return max(0, free_before - free_bytes(compute))

    if spec.embeds:
        return _embedder(lib, model, spec, taken, progress)
    return _generator(lib, model, spec, kv_type, taken, progress)


def _embedder(lib: Any, model: int, spec: LoadSpec, taken: Callable[[], int], progress: Progress) -> LlamaCppEmbedder:
    architecture = metadata(lib, model, "general.architecture") or ""
    has_pooling = (metadata(lib, model, f"{architecture}.pooling_type") or "0") != "0"
    try:
        engine = open_embedder(model, spec, architecture, taken, has_pooling=has_pooling)
    except BaseException:
        lib.llama_model_free(model)
        raise
    return _ready(engine, progress)


def _generator(
    lib: Any, model: int, spec: LoadSpec, kv_type: int, taken: Callable[[], int], progress: Progress
) -> LlamaCppEngine:
    context: int | None = None
    prompter: Prompter | None = None
    try:
        _check_kind(lib, model, spec.path)
        layout = layout_of(spec)
        context = _make_context(lib, model, spec, layout, kv_type)
        vocabulary = Vocabulary(model)
        template = _template_of(lib, model)
        info = _info(lib, model, context, spec, layout, vocabulary, has_template=template is not None)
        info = msgspec.structs.replace(info, device_bytes=taken())
        prompter = Prompter(vocabulary, template, info.n_ctx)
        prompter.start()
        engine = LlamaCppEngine(
            model=model,
            context=context,
            layout=layout,
            info=info,
            vocabulary=vocabulary,
            prompter=prompter,
            defaults=model_defaults(lambda key: metadata(lib, model, key)),
        )
    except BaseException:
        if prompter is not None:
            prompter.close()
        if context is not None:
            lib.llama_free(context)
        lib.llama_model_free(model)
        raise
    return _ready(engine, progress)


E = TypeVar("E", LlamaCppEngine, LlamaCppEmbedder)


def _ready(engine: E, progress: Progress) -> E:
    try:
        _go_on(progress)
        engine.warm_up()
    except NoNumbers as error:
        engine.close()
        raise ServiceError("backend_faulty", error.detail) from error
    except BaseException:
        engine.close()
        raise
    return engine


def _go_on(progress: Progress, done: float = 1.0) -> None:
    if not progress(done):
        raise LoadCancelled


def _check_file(spec: LoadSpec, progress: Progress) -> None:
    """What can be known before llama.cpp looks: the file is there, is a GGUF, and has the pinned hash."""
    digest = hashlib.sha256()
    try:
        with open(spec.path, "rb") as file:
            magic = file.read(len(_MAGIC))
            if magic != _MAGIC:
                raise RequestError(
                    "model_file_invalid",
                    f"{spec.path} is not a GGUF file: it starts with {magic!r} instead of {_MAGIC!r}; download the "
                    "model again or choose another file.",
                )
            if spec.sha256 is None:
                return
            digest.update(magic)
            while block := file.read(_HASH_BLOCK_BYTES):
                digest.update(block)
                _go_on(progress, 0.0)
    except OSError as error:
        raise RequestError(
            "model_file_invalid", f"{spec.path} can't be read: {error.strerror}; check the path and its permissions."
        ) from error
    if digest.hexdigest() != spec.sha256.lower():
        raise RequestError(
            "model_file_invalid",
            f"{spec.path} has the sha256 {digest.hexdigest()}, but its card pins {spec.sha256}: it is damaged or "
            "another file; download it again.",
        )


def _load_model(lib: Any, spec: LoadSpec, progress: Progress) -> int:
    compute = spec.backend.partition("-")[2] or "cpu"
    params = lib.llama_model_default_params()
    devices = device_list(compute)
    params.devices = ctypes.cast(devices, ctypes.c_void_p)
    params.n_gpu_layers = 0 if compute == "cpu" else spec.gpu_layers
    if compute == "cpu":
        # llama.cpp repacks weights for the processor; a mapped file would stay in memory beside the repacked ones.
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE
    params.use_extra_bufts = can_use_tiles()
    watch = _ProgressWatch(progress)
    callback = lib.llama_progress_callback(watch.take)
    params.progress_callback = callback
    forget_errors()
    model: int | None = lib.llama_model_load_from_file(os.fsencode(spec.path), params)
    if watch.error is not None or watch.is_cancelled:
        if model:
            lib.llama_model_free(model)
        raise watch.error or LoadCancelled
    if not model:
        raise load_failure(spec.path, os.path.getsize(spec.path), recent_errors(), engine_version())
    return model


class _ProgressWatch:
    """The progress callback on the native side: remembers why it said no. An exception must not cross into C."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.error: BaseException | None = None
        self.is_cancelled = False

    def take(self, done: float, _user: Any) -> bool:
        """The callback of ``llama_model_params``."""
        try:
            self.is_cancelled = not self._progress(min(1.0, max(0.0, done)))
        except BaseException as error:  # noqa: BLE001 - raised again once llama.cpp has returned
            self.error = error
            return False
        return not self.is_cancelled


def _check_kind(lib: Any, model: int, path: str) -> None:
    if not lib.llama_model_has_decoder(model) or lib.llama_model_has_encoder(model):
        raise RequestError(
            "model_file_invalid",
            f"{path} is no model that generates text from a prompt (it is an encoder); choose a chat or base model.",
        )


def _make_context(lib: Any, model: int, spec: LoadSpec, layout: Layout, kv_type: int) -> int:
    params = lib.llama_context_default_params()
    params.n_ctx = layout.n_ctx
    params.n_batch = layout.n_batch
    params.n_ubatch = layout.n_ubatch
    params.n_seq_max = spec.n_parallel
    # Only sampled rows give logits, at most one a sequence: the output buffer shrinks from 98 to 17 MiB.
    params.n_outputs_max = spec.n_parallel
    params.n_threads = params.n_threads_batch = spec.n_threads or physical_cores()
    params.flash_attn_type = _FLASH_ATTENTION[spec.flash_attention]
    params.type_k = params.type_v = kv_type
    params.kv_unified = layout.unified
    params.swa_full = False
    params.no_perf = True
    if spec.backend.endswith("-cpu"):
        params.offload_kqv = params.op_offload = False
    forget_errors()
    context: int | None = lib.llama_init_from_model(model, params)
    if not context:
        raise context_failure(layout.n_ctx, spec.n_parallel, spec.kv_type, recent_errors())
    return context


def _info(
    lib: Any,
    model: int,
    context: int,
    spec: LoadSpec,
    layout: Layout,
    vocabulary: Vocabulary,
    *,
    has_template: bool,
) -> EngineInfo:
    """What came of it; llama.cpp's own numbers win over the plan's."""
    return EngineInfo(
        engine="llama_cpp",
        version=engine_version(),
        build=build_id(),
        backend=spec.backend,
        architecture=metadata(lib, model, "general.architecture") or "",
        n_ctx=min(layout.window, int(lib.llama_n_ctx_seq(context))),
        n_parallel=int(lib.llama_n_seq_max(context)),
        n_batch=int(lib.llama_n_batch(context)),
        vocabulary_size=vocabulary.size,
        has_template=has_template,
        kv_cells=int(lib.llama_n_ctx(context)),
        n_threads=int(lib.llama_n_threads(context)) if spec.backend.endswith("-cpu") else 0,
    )


def _template_of(lib: Any, model: int) -> str | None:
    template: bytes | None = lib.llama_model_chat_template(model, None)
    text = (template or b"").decode("utf-8", "replace")
    return text if text.strip() else None


def metadata(lib: Any, model: int, key: str) -> str | None:
    """A metadata value as llama.cpp writes it; None where the model has no such key."""
    buffer = ctypes.create_string_buffer(256)
    length: int = lib.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    if length < 0 or length > MAX_METADATA_BYTES:
        return None
    if length >= len(buffer):
        buffer = ctypes.create_string_buffer(length + 1)
        lib.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")
