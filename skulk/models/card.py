"""Model cards: made of a GGUF header, or read from a TOML file.

| card field | from the header |
|---|---|
| `weights_bytes` | sum of the tensors' sizes, over all parts |
| KV, windows, states, activations | see `skulk.models.header_sizes` |
| `context_length` | `<arch>.context_length` |
| `quantization` | the file's name, else `general.file_type` |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from skulk.errors import RequestError
from skulk.models.ggml_types import FILE_TYPES
from skulk.models.gguf import GgufHeader
from skulk.models.header_sizes import sizes_of
from skulk.models.hints import CardHint, ReasoningFormat, ToolFormat, checked, limits_problem
from skulk.models.quantization import parse_file_name
from skulk.wire.model import ModelCard, ModelFile, ModelFormat, SamplingDefaults

GGUF_BACKENDS: Final = ("llama_cpp-vulkan", "llama_cpp-rocm", "llama_cpp-cuda", "llama_cpp-cpu")
MAX_CARD_BYTES: Final = 256 * 1024
# What JSON readers everywhere hold exactly.
MAX_NUMBER: Final = 2**53
_TEMPLATE: Final = "tokenizer.chat_template"
# Architectures that are parts of other models: `general.architecture`.
_NO_TEXT: Final = {
    "clip": "a projector (the vision or audio part of another model)",
    "t5encoder": "an encoder",
}
# Architectures that answer with vectors whatever their pooling says, and keep no cache: all tokens of a text see each
# other in one pass.
_EMBEDDERS: Final = frozenset(
    {
        "bert",
        "nomic-bert",
        "nomic-bert-moe",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "gemma-embedding",
    }
)


class CardFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A card as a TOML file writes it: `ModelCard`, and where its files may lie.

    Attributes:
        package: an installed Python package that carries the files, beside its ``__init__.py``.
    """

    model_id: str
    name: str
    family: str
    backends: tuple[str, ...]
    files: tuple[ModelFile, ...]
    context_length: int
    weights_bytes: int
    kv_bytes_per_token: int
    format: ModelFormat = "gguf"
    quantization: str = ""
    max_context_tokens: int | None = None
    window: int = 0
    window_kv_bytes_per_token: int = 0
    recurrent_bytes: int = 0
    activations: int = 0
    layers: int = 0
    embedding_length: int = 0
    vocabulary_size: int = 0
    tasks: tuple[str, ...] = ("TextGeneration",)
    capabilities: tuple[str, ...] = ("text",)
    tags: tuple[str, ...] = ()
    min_vram_gib: float = 0.0
    reasoning_format: ReasoningFormat = ""
    tool_format: ToolFormat = ""
    sampling: SamplingDefaults = SamplingDefaults()
    license: str = ""
    source: str = ""
    package: str = ""

    def to_card(self) -> ModelCard:
        """The card itself."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__ if name != "package"}
        return ModelCard(**fields)


def read_card(path: Path) -> CardFile | CardHint:
    """A card from a TOML file; one without files is a hint.

    Raises:
        RequestError: ``invalid_request``: the file can't be read, is no TOML, or no card; with the place.
    """
    try:
        body = path.read_bytes()
    except OSError as error:
        raise RequestError("invalid_request", f"the card {path} can't be read: {error.strerror}.") from error
    if len(body) > MAX_CARD_BYTES:
        raise RequestError("invalid_request", f"the card {path} has {len(body):,} bytes; at most {MAX_CARD_BYTES:,}.")
    try:
        told: dict[str, Any] = msgspec.toml.decode(body)
        # the wire ignores fields that it doesn't know; a person who mistyped one should hear of it
        unknown = sorted(set(told.get("sampling", {})) - set(SamplingDefaults.__struct_fields__))
        if unknown:
            raise msgspec.ValidationError(f"Object contains unknown field `{unknown[0]}` - at `$.sampling`")
        if "files" not in told:
            return checked(msgspec.convert(told, CardHint), str(path))
        card = msgspec.convert(told, CardFile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(
            "invalid_request", f"the card {path} is not valid: {error}; mend it or remove it."
        ) from error
    if not card.files or not card.backends or card.context_length <= 0:
        raise RequestError(
            "invalid_request", f"the card {path} needs at least one file, one backend and a context_length over 0."
        )
    if problem := limits_problem(card.backends, card.max_context_tokens, card.min_vram_gib):
        raise RequestError("invalid_request", f"the card {path} is not valid: {problem}; mend it or remove it.")
    if wrong := next((file.name for file in card.files if not _is_inside(file.name)), None):
        raise RequestError("invalid_request", f"the card {path} names the file {wrong!r}, which leaves its folder.")
    return card


def _is_inside(name: str) -> bool:
    return bool(name) and not name.startswith("/") and ".." not in name.split("/") and "\\" not in name


def card_from_gguf(
    headers: Sequence[GgufHeader],
    *,
    model_id: str,
    files: Sequence[ModelFile],
    source: str = "",
) -> ModelCard:
    """A card from the headers of a model's files, the first part first.

    Raises:
        RequestError: ``model_file_invalid``: the header lacks what a language model has, or is of another kind.
    """
    header = headers[0]
    name = files[0].name
    architecture = header.get("general.architecture", str, "")
    if not architecture:
        raise RequestError("model_file_invalid", f"{name} doesn't say its architecture; choose another file.")
    if architecture in _NO_TEXT:
        raise RequestError(
            "model_file_invalid", f"{name} is {_NO_TEXT[architecture]}; it can't generate text by itself."
        )
    layers = header.get(f"{architecture}.block_count", int, 0)
    context_length = header.get(f"{architecture}.context_length", int, 0)
    if layers <= 0 or context_length <= 0:
        raise RequestError(
            "model_file_invalid", f"{name} doesn't say its layers and context length; it is no language model."
        )
    sizes = sizes_of(header, architecture)
    file_type = FILE_TYPES.get(header.get("general.file_type", int, -1), "")
    card = ModelCard(
        model_id=model_id,
        name=header.get("general.name", str, "") or model_id,
        family=architecture,
        backends=GGUF_BACKENDS,
        files=tuple(files),
        quantization=parse_file_name(name.rsplit("/", 1)[-1]).quantization or file_type,
        context_length=context_length,
        weights_bytes=sum(part.weights_bytes for part in headers),
        kv_bytes_per_token=0 if architecture in _EMBEDDERS else sizes.kv_bytes_per_token,
        window=sizes.window,
        window_kv_bytes_per_token=sizes.window_kv_bytes_per_token,
        recurrent_bytes=sizes.recurrent_bytes,
        activations=sizes.activations,
        layers=layers,
        embedding_length=header.get(f"{architecture}.embedding_length", int, 0),
        vocabulary_size=_vocabulary_size(header, architecture),
        tasks=("TextEmbedding",) if is_embedder(header, architecture) else ("TextGeneration",),
        capabilities=("embedding",) if is_embedder(header, architecture) else ("text",),
        tags=_tags(header, architecture),
        license=header.get("general.license", str, ""),
        source=source,
    )
    numbers = (card.context_length, card.layers, card.vocabulary_size, card.embedding_length)
    if any(not 0 <= number <= MAX_NUMBER for number in (*numbers, *sizes)):
        raise RequestError("model_file_invalid", f"{name} claims impossible sizes in its header; download it again.")
    return card


def with_vision(card: ModelCard) -> ModelCard:
    """The card of a model that also sees."""
    return msgspec.structs.replace(card, capabilities=tuple(dict.fromkeys((*card.capabilities, "vision"))))


def is_embedder(header: GgufHeader, architecture: str) -> bool:
    """Whether the model answers with vectors: by its kind, or by a pooling in its header (0: none, 4: a ranker's)."""
    return architecture in _EMBEDDERS or header.get(f"{architecture}.pooling_type", int, 0) > 0


def _vocabulary_size(header: GgufHeader, architecture: str) -> int:
    """The number of tokens, however the header tells it."""
    said = header.get(f"{architecture}.vocab_size", int, 0)
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if said or tokens is None or isinstance(tokens, (str, int, float)):
        return said
    return len(tokens) if isinstance(tokens, tuple) else tokens.count


def _tags(header: GgufHeader, architecture: str) -> tuple[str, ...]:
    tags: list[str] = []
    if _TEMPLATE not in header.metadata:
        tags.append("no-chat-template")
    if window := header.get(f"{architecture}.attention.sliding_window", int, 0):
        tags.append(f"sliding-window-{window}")
    if header.get(f"{architecture}.ssm.state_size", int, 0):
        tags.append("recurrent")
    return tuple(tags)
