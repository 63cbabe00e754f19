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


def _honoured(*names: str) -> dict[str, Field]:
    return {name: Field(treatment="honoured") for name in names}


def _inert(*names: str) -> dict[str, Field]:
    return {name: Field(treatment="inert") for name in names}


def _refused(name: str, needs: str, *harmless: Any) -> dict[str, Field]:
    return {name: Field(treatment="refused", needs=needs, harmless=harmless)}


_SAMPLING: Final = _honoured(
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "repeat_penalty", "repeat_last_n"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "seed"),
    *("top_n_sigma", "xtc_probability", "xtc_threshold", "mirostat", "mirostat_tau", "mirostat_eta"),
    *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
)
_SHARED: Final = {
    **_honoured("model", "stream", "stream_options", "max_tokens", "n", "stop", "ignore_eos"),
    **_SAMPLING,
    **_inert("user", "safety_identifier", "metadata", "store", "service_tier", "prediction", "verbosity"),
    **_inert("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    **_refused("grammar", "grammars", ""),
    **_refused("json_schema", "structured output"),
}

CHAT_FIELDS: Final[dict[str, Field]] = {
    **_SHARED,
    **_honoured("messages", "max_completion_tokens", "enable_thinking", "reasoning_effort"),
    **_inert("parallel_tool_calls"),
    **_refused("tools", "tool calling", []),
    **_refused("tool_choice", "tool calling", "none", "auto"),
    **_refused("functions", "tool calling (and `tools` in place of the old `functions`)", []),
    **_refused("function_call", "tool calling (and `tool_choice` in place of the old `function_call`)", "none", "auto"),
    **_refused("response_format", "structured output", {"type": "text"}),
    **_refused("logprobs", "log probabilities", False),
    **_refused("top_logprobs", "log probabilities", 0),
    **_refused("modalities", "other answers than text", ["text"]),
    **_refused("audio", "spoken answers"),
    **_refused("web_search_options", "web search"),
    **_refused("moderation", "moderation"),
}

COMPLETION_FIELDS: Final[dict[str, Field]] = {
    **_SHARED,
    **_honoured("prompt"),
    **_refused("best_of", "picking the best of several answers", 1),
    **_refused("echo", "echo", False),
    **_refused("suffix", "infill", ""),
    **_refused("logprobs", "log probabilities", False),
}


def sort_fields(body: dict[str, Any], table: dict[str, Field]) -> Sorted:
    """A body's fields by treatment.

    Raises:
        RequestError: ``unsupported_field``, ``invalid_request``; ``param`` names the field.
    """
    honoured: dict[str, Any] = {}
    inert: list[str] = []
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
                honoured[name] = value
            case "inert":
                inert.append(name)
            case "refused":
                if not any(_same(value, allowed) for allowed in field.harmless):
                    raise RequestError(
                        "unsupported_field",
                        f"{name}: this version lacks {field.needs}; leave the field out",
                        param=name,
                    )
    return Sorted(honoured=honoured, inert=tuple(inert))


def _same(value: Any, allowed: Any) -> bool:
    """Equal and of one type: 0 is not False."""
    return type(value) is type(allowed) and value == allowed
