"""What a card says of a model of the hub whose files it doesn't list: preferences and limits over what the files tell.

    hint (TOML, without [[files]]) ──┐
    header, names, config.json ──────┴──> ModelCard      the hint wins where it says something

It belongs to every quantization and revision of its repository. What it doesn't say is read from the files, as for any
other model; so it holds no sizes and no hashes that could grow stale.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from skulk.errors import RequestError
from skulk.models.reference import is_reference, parse_reference
from skulk.placement.backends import parse_tag
from skulk.wire.model import ModelCard, ModelFormat, SamplingDefaults

ReasoningFormat = Literal["", "think", "harmony"]
"""How a model marks its reasoning: ``<think>`` tags, harmony's channels; empty: as its template says, or not at all."""
ToolFormat = Literal["", "hermes", "harmony", "qwen3_coder", "llama3_json", "mistral"]
"""How a model writes calls: JSON in ``<tool_call>`` tags (hermes), …; empty: as its template says."""
_SAMPLING_BOUNDS: Final = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "top_k": (0, 10_000),
    "repeat_penalty": (0.0, 10.0),
}


class CardHint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A card without files. Zero, empty and absent: it says nothing of that.

    Attributes:
        model_id: the repository, ``org/repo``.
        sources: the pages that all of this was read from.
        quantization: to take where the request names none; ``file`` names one file (the first part) instead.
        max_context_tokens: the most that is admitted.
        min_vram_gib: a node whose GPU has less memory doesn't get it.
        vision: False: its projector isn't fetched, and it takes no images.
        sampling: what requests get that don't say.
    """

    model_id: str
    sources: tuple[str, ...]
    name: str = ""
    family: str = ""
    format: ModelFormat = "gguf"
    backends: tuple[str, ...] = ()
    quantization: str = ""
    file: str = ""
    max_context_tokens: int | None = None
    min_vram_gib: float = 0.0
    vision: bool | None = None
    capabilities: tuple[str, ...] = ()
    reasoning_format: ReasoningFormat = ""
    tool_format: ToolFormat = ""
    sampling: SamplingDefaults = SamplingDefaults()
    license: str = ""


def problem_of(hint: CardHint) -> str:
    """What is wrong with it, field first; empty: nothing."""
    if not is_reference(hint.model_id) or parse_reference(hint.model_id).repo != hint.model_id:
        return f"model_id: {hint.model_id!r} is no repository of the hub (org/repo)"
    if not hint.sources or not all(page.startswith("https://") for page in hint.sources):
        return "sources: at least one page (https://…) must be named that this was read from"
    return limits_problem(hint.backends, hint.max_context_tokens, hint.min_vram_gib) or _sampling_problem(hint.sampling)


def limits_problem(backends: tuple[str, ...], max_context_tokens: int | None, min_vram_gib: float) -> str:
    """What is wrong with the limits that cards of both kinds may have; empty: nothing."""
    if wrong := next((tag for tag in backends if parse_tag(tag) is None), None):
        return f"backends: {wrong!r} is no <engine>-<compute>"
    if max_context_tokens is not None and max_context_tokens <= 0:
        return f"max_context_tokens: {max_context_tokens} is not over 0"
    if not 0 <= min_vram_gib < 1e6:
        return f"min_vram_gib: {min_vram_gib} is no size"
    return ""


def _sampling_problem(sampling: SamplingDefaults) -> str:
    for name, (low, high) in _SAMPLING_BOUNDS.items():
        value = getattr(sampling, name)
        if value is not None and not low <= value <= high:
            return f"sampling.{name}: {value} is not from {low} to {high}"
    return ""


def with_hint(card: ModelCard, hint: CardHint) -> ModelCard:
    """The card, with what the hint says over it."""
    said = {
        "name": hint.name or card.name,
        "backends": hint.backends or card.backends,
        "max_context_tokens": hint.max_context_tokens or card.max_context_tokens,
        "min_vram_gib": hint.min_vram_gib,
        "reasoning_format": hint.reasoning_format,
        "tool_format": hint.tool_format,
        "sampling": hint.sampling,
        "license": card.license or hint.license,
    }
    seen = tuple(dict.fromkeys((*hint.capabilities, *card.capabilities)))
    if hint.vision is False:
        seen = tuple(one for one in seen if one != "vision")
        said["projector"] = None
    elif hint.vision and "vision" not in seen:
        seen = (*seen, "vision")
    return msgspec.structs.replace(card, capabilities=seen, **said)


def checked(hint: CardHint, where: str) -> CardHint:
    """The hint itself.

    Raises:
        RequestError: ``invalid_request``: a field of it is wrong.
    """
    if problem := problem_of(hint):
        raise RequestError("invalid_request", f"the card {where} is not valid: {problem}; mend it or remove it.")
    return hint
