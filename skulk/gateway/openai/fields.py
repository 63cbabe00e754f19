"""Every documented request field of the OpenAI dialect, once: honoured, inert or refused. None is ignored in silence.

    honoured   read into the Structs of `requests`
    inert      accepted because it can't change the answer; the header ``X-Skulk-Inert`` names those sent
    refused    this version lacks what it needs: 400 ``unsupported_field``, unless its value asks for nothing

``null`` always counts as "not sent". Any other top-level field: 400 ``invalid_request`` with its name. A test proves
that the honoured fields equal the Structs'.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import msgspec

from skulk.errors import RequestError

Treatment = Literal["honoured", "inert", "refused"]


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one field.

    Attributes:
        needs: what a refused one would need.
        harmless: values of a refused one that ask for nothing.
    """

    treatment: Treatment
    needs: str = ""
    harmless: tuple[Any, ...] = ()


class Sorted(msgspec.Struct, frozen=True, kw_only=True):
    """A body's fields by treatment; ``inert``: the names of those sent."""

    honoured: dict[str, Any]
    inert: tuple[str, ...]


def honoured(*names: str) -> dict[str, Field]:
    """Fields that are read."""
    return {name: Field(treatment="honoured") for name in names}


def inert(*names: str) -> dict[str, Field]:
    """Fields that are accepted and do nothing."""
    return {name: Field(treatment="inert") for name in names}


def refused(name: str, needs: str, *harmless: Any) -> dict[str, Field]:
    """A field that is refused, but for its harmless values."""
    return {name: Field(treatment="refused", needs=needs, harmless=harmless)}


_SAMPLING: Final = honoured(
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "repeat_penalty", "repeat_last_n"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "seed"),
    *("top_n_sigma", "xtc_probability", "xtc_threshold", "mirostat", "mirostat_tau", "mirostat_eta"),
    *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
    "grammar",
)
_SHARED: Final = {
    **honoured("model", "stream", "stream_options", "max_tokens", "n", "stop", "ignore_eos"),
    **_SAMPLING,
    **inert("user", "safety_identifier", "metadata", "store", "service_tier", "prediction", "verbosity"),
    **inert("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    **refused("json_schema", "structured output"),
}

CHAT_FIELDS: Final[dict[str, Field]] = {
    **_SHARED,
    **honoured("messages", "max_completion_tokens", "enable_thinking", "reasoning_effort"),
    **inert("parallel_tool_calls"),
    **refused("tools", "tool calling", []),
    **refused("tool_choice", "tool calling", "none", "auto"),
    **refused("functions", "tool calling (and `tools` in place of the old `functions`)", []),
    **refused("function_call", "tool calling (and `tool_choice` in place of the old `function_call`)", "none", "auto"),
    **refused("response_format", "structured output", {"type": "text"}),
    **refused("logprobs", "log probabilities", False),
    **refused("top_logprobs", "log probabilities", 0),
    **refused("modalities", "other answers than text", ["text"]),
    **refused("audio", "spoken answers"),
    **refused("web_search_options", "web search"),
    **refused("moderation", "moderation"),
}

COMPLETION_FIELDS: Final[dict[str, Field]] = {
    **_SHARED,
    **honoured("prompt", "suffix", "echo"),
    **refused("best_of", "picking the best of several answers", 1),
    **refused("logprobs", "log probabilities", False),
}


def sort_fields(body: dict[str, Any], table: dict[str, Field]) -> Sorted:
    """A body's fields by treatment.

    Raises:
        RequestError: ``unsupported_field``, ``invalid_request``; ``param`` names the field.
    """
    read: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in body.items():
        field = table.get(name)
        if field is None:
            raise RequestError(
                "invalid_request",
                f"{name[:100]} is not a field of this call; leave it out",
                param=name[:100],
            )
        if value is None:
            continue
        match field.treatment:
            case "honoured":
                read[name] = value
            case "inert":
                ignored.append(name)
            case "refused":
                if not any(_same(value, allowed) for allowed in field.harmless):
                    raise RequestError(
                        "unsupported_field",
                        f"{name}: this version lacks {field.needs}; leave the field out",
                        param=name,
                    )
    return Sorted(honoured=read, inert=tuple(ignored))


def _same(value: Any, allowed: Any) -> bool:
    """Equal and of one type: 0 is not False."""
    return type(value) is type(allowed) and value == allowed
