"""``config.json`` and the index of safetensors: an MLX model's card, and who has eyes. Pure; takes hostile text.

| card field           | from `config.json` (of a vision model: from its `text_config`)                           |
|----------------------|------------------------------------------------------------------------------------------|
| `family`             | `model_type`                                                                             |
| `context_length`     | `max_position_embeddings`                                                                |
| `kv_bytes_per_token` | `num_hidden_layers` x `num_key_value_heads` x 2 x `head_dim` x 2 bytes                   |
| `quantization`       | `quantization.bits` and `.group_size`, else `torch_dtype`                                |
| `weights_bytes`      | `metadata.total_size` of the index, else the files' sizes                                |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import msgspec

from skulk.errors import RequestError
from skulk.wire.model import ModelCard, ModelFile

MLX_BACKENDS: Final = ("mlx-metal",)
MAX_JSON: Final = 64 * 1024 * 1024
MAX_SHARDS: Final = 4096
_MAX: Final = 2**40
_F16_BYTES: Final = 2
_EYES: Final = ("vision_config", "visual", "vision_tower", "mm_vision_tower", "image_token_id", "image_token_index")
_EMBEDDERS: Final = ("BertModel", "XLMRobertaModel", "NomicBertModel", "ModernBertModel", "MPNetModel", "RobertaModel")


class SafetensorsIndex(msgspec.Struct, frozen=True, kw_only=True):
    """Which files hold a model's tensors, and their bytes together (None where the index doesn't say)."""

    files: tuple[str, ...]
    total_bytes: int | None = None


def read_config(body: bytes, name: str) -> dict[str, Any]:
    """A configuration.

    Raises:
        RequestError: ``model_file_invalid``: it is no JSON object.
    """
    found = _object(body, name)
    if not isinstance(found.get("model_type"), str):
        raise RequestError("model_file_invalid", f"{name} names no model_type; it is no model's configuration.")
    return found


def read_index(body: bytes, name: str) -> SafetensorsIndex:
    """The index of a model in several files.

    Raises:
        RequestError: ``model_file_invalid``: it is no index, or names files outside its folder.
    """
    found = _object(body, name)
    weight_map = _mapping(found.get("weight_map"))
    if not weight_map:
        raise RequestError("model_file_invalid", f"{name} has no weight_map; download it again.")
    files = sorted({str(file) for file in weight_map.values()})
    if len(files) > MAX_SHARDS or any(
        "/" in file or "\\" in file or not file.endswith(".safetensors") for file in files
    ):
        raise RequestError("model_file_invalid", f"{name} names files that can't be; download it again.")
    total = _count(_mapping(found.get("metadata")).get("total_size"))
    return SafetensorsIndex(files=tuple(files), total_bytes=total or None)


def is_vision_config(body: bytes) -> bool:
    """Whether a configuration is one of a model that sees; an empty or broken one says nothing."""
    try:
        config = _object(body, "config.json")
    except RequestError:
        return False
    return has_eyes(config)


def has_eyes(config: dict[str, Any]) -> bool:
    """Whether a configuration has a vision part."""
    return any(config.get(name) is not None for name in _EYES)


def card_from_config(
    config: dict[str, Any],
    *,
    model_id: str,
    files: Sequence[ModelFile],
    weights_bytes: int | None = None,
    source: str = "",
) -> ModelCard:
    """The card of a model in safetensors, as MLX serves it.

    Raises:
        RequestError: ``model_file_invalid``: the configuration lacks what a language model has.
    """
    inner = {**config, **_mapping(config.get("text_config"))}
    layers, heads = _count(inner.get("num_hidden_layers")), _count(inner.get("num_attention_heads"))
    context, hidden = _count(inner.get("max_position_embeddings")), _count(inner.get("hidden_size"))
    if not layers or not context:
        raise RequestError(
            "model_file_invalid",
            f"the config.json of {model_id} doesn't say its layers and context; it is no language model.",
        )
    kv_heads = _count(inner.get("num_key_value_heads")) or heads
    head_dim = _count(inner.get("head_dim")) or (hidden // heads if heads else 0)
    is_embedder = any(name in str(config.get("architectures")) for name in _EMBEDDERS)
    return ModelCard(
        model_id=model_id,
        name=model_id.rsplit("/", 1)[-1],
        family=str(config["model_type"])[:100],
        format="mlx",
        backends=MLX_BACKENDS,
        files=tuple(files),
        quantization=_quantization(config),
        context_length=context,
        weights_bytes=weights_bytes or sum(file.size_bytes for file in files),
        kv_bytes_per_token=min(_MAX, layers * kv_heads * 2 * head_dim * _F16_BYTES),
        layers=layers,
        embedding_length=hidden,
        vocabulary_size=_count(inner.get("vocab_size")),
        tasks=("TextEmbedding",) if is_embedder else ("TextGeneration",),
        capabilities=("embedding",) if is_embedder else ("text", "vision") if has_eyes(config) else ("text",),
        source=source,
    )


def _quantization(config: dict[str, Any]) -> str:
    if bits := _count(_mapping(config.get("quantization")).get("bits")):
        return f"{bits}bit"
    kind: Any = config.get("torch_dtype") or config.get("dtype")
    return {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(str(kind), "")


def _count(value: Any) -> int:
    """A sane whole number, else 0."""
    return value if type(value) is int and 0 < value <= _MAX else 0


def _mapping(value: Any) -> dict[str, Any]:
    """A JSON object, else an empty one."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _object(body: bytes, name: str) -> dict[str, Any]:
    if len(body) > MAX_JSON:
        raise RequestError("model_file_invalid", f"{name} has {len(body):,} bytes; at most {MAX_JSON:,} are possible.")
    try:
        found: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError("model_file_invalid", f"{name} is no JSON ({error}); download it again.") from error
    if not isinstance(found, dict):
        raise RequestError("model_file_invalid", f"{name} is no JSON object; download it again.")
    return cast("dict[str, Any]", found)
