"""What the numbers of `Sampling` may be. One table for admission and engine: outside it samplers compute nonsense.

The gateway's dialects may be narrower; what a model's file says of itself is held against the same table.
"""

from __future__ import annotations

from typing import Final

from skulk.errors import RequestError
from skulk.wire.generation import Sampling

INT32_MAX: Final = 2**31 - 1
MAX_BIASES: Final = 4096
BIAS_RANGE: Final = (-1e9, 1e9)
MAX_BREAKERS: Final = 16
# llama.cpp cuts longer ones off.
MAX_BREAKER_BYTES: Final = 40
MAX_GRAMMAR_CHARACTERS: Final = 65_536

# -1 of a count or of top_n_sigma: all of the window, or off.
RANGES: Final[dict[str, tuple[float, float]]] = {
    "temperature": (0.0, 100.0),
    "top_k": (-1, INT32_MAX),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "top_n_sigma": (-1.0, 100.0),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "mirostat": (0, 2),
    "mirostat_tau": (0.0, 100.0),
    "mirostat_eta": (0.0, 1.0),
    "repeat_penalty": (0.01, 100.0),
    "repeat_last_n": (-1, INT32_MAX),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
    "dry_multiplier": (0.0, 100.0),
    "dry_base": (1.0, 100.0),
    "dry_allowed_length": (0, INT32_MAX),
    "dry_penalty_last_n": (-1, INT32_MAX),
}
WHOLE: Final = frozenset({"top_k", "mirostat", "repeat_last_n", "dry_allowed_length", "dry_penalty_last_n"})
"""Fields that are whole numbers."""


def is_in_range(field: str, value: float) -> bool:
    """Whether a field may have this value; NaN and infinities never."""
    low, high = RANGES[field]
    return low <= value <= high


def check_sampling(sampling: Sampling, vocabulary_size: int) -> None:
    """Refuses numbers out of their range, biases of tokens that don't exist, and grammars that are too long.

    Raises:
        RequestError: ``invalid_request``, naming the field.
    """
    for field, (low, high) in RANGES.items():
        value: float | None = getattr(sampling, field)
        if value is not None and not is_in_range(field, value):
            raise _refusal(field, f"{field} is {value:g}; send a number from {low:g} to {high:g}")
    _check_biases(sampling.logit_bias, vocabulary_size)
    if sampling.dry_sequence_breakers is not None:
        _check_breakers(sampling.dry_sequence_breakers)
    if sampling.grammar is not None and len(sampling.grammar) > MAX_GRAMMAR_CHARACTERS:
        raise _refusal(
            "grammar", f"grammar has {len(sampling.grammar)} characters; send at most {MAX_GRAMMAR_CHARACTERS}"
        )


def _check_biases(biases: dict[int, float], vocabulary_size: int) -> None:
    if len(biases) > MAX_BIASES:
        raise _refusal("logit_bias", f"logit_bias names {len(biases)} tokens; send at most {MAX_BIASES}")
    low, high = BIAS_RANGE
    for token, bias in biases.items():
        if not 0 <= token < vocabulary_size:
            raise _refusal(
                "logit_bias", f"logit_bias names the token {token}; this model has tokens 0 to {vocabulary_size - 1}"
            )
        if not low <= bias <= high:
            raise _refusal(
                "logit_bias", f"logit_bias of token {token} is {bias:g}; send a number from {low:g} to {high:g}"
            )


def _check_breakers(breakers: tuple[str, ...]) -> None:
    field = "dry_sequence_breakers"
    if not 1 <= len(breakers) <= MAX_BREAKERS:
        raise _refusal(field, f"{field} has {len(breakers)} texts; send 1 to {MAX_BREAKERS}")
    for breaker in breakers:
        size_bytes = len(breaker.encode("utf-8", "replace"))
        if not 1 <= size_bytes <= MAX_BREAKER_BYTES:
            raise _refusal(field, f"a text of {field} has {size_bytes} bytes; send 1 to {MAX_BREAKER_BYTES}")


def _refusal(field: str, detail: str) -> RequestError:
    return RequestError("invalid_request", detail, param=field)
