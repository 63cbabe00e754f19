"""How the next token is drawn, settled: what was asked, filled up with defaults, and checked.

asked > the model's own (`general.sampling.*` of the GGUF) > OpenAI's (temperature 1, everything else off)
"""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
from collections.abc import Callable
from typing import Any, Final

import msgspec

from skulk.batching.ranges import WHOLE, check_sampling, is_in_range
from skulk.wire.generation import Sampling

log = logging.getLogger(__name__)

DEFAULT_REPEAT_LAST_N: Final = 64
DEFAULT_BREAKERS: Final = ("\n", ":", '"', "*")
# Lower temperatures are greedy: they differ from it only where two logits are equal but for rounding.
LEAST_TEMPERATURE: Final = 1e-6
# Above it XTC never has two tokens to choose between.
_MOST_XTC_THRESHOLD: Final = 0.5

# GGUF key -> field of Sampling: all that llama.cpp defines but for the order of samplers, which is always its own.
METADATA_KEYS: Final[dict[str, str]] = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.xtc_probability": "xtc_probability",
    "general.sampling.xtc_threshold": "xtc_threshold",
    "general.sampling.penalty_last_n": "repeat_last_n",
    "general.sampling.penalty_repeat": "repeat_penalty",
    "general.sampling.mirostat": "mirostat",
    "general.sampling.mirostat_tau": "mirostat_tau",
    "general.sampling.mirostat_eta": "mirostat_eta",
}
SEQUENCE_KEY: Final = "general.sampling.sequence"


class SettledDry(msgspec.Struct, frozen=True, kw_only=True):
    """DRY's numbers; ``look_back`` is at least 1 and at most the window."""

    multiplier: float
    base: float
    allowed: int
    look_back: int
    breakers: tuple[str, ...]


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling with every field decided. 0 or 1, whichever is the neutral value, means off.

    Attributes:
        temperature: 0 is greedy; then no filter counts.
        mirostat: 1 or 2 leaves only ``logit_bias`` and ``temperature`` of the rest, as llama.cpp does.
        look_back: how many of the last tokens the penalties regard.
        dry: None where it is off.
        key: 64 bits of seed and choice; all draws hang on it.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    top_n_sigma: float
    xtc_probability: float
    xtc_threshold: float
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    look_back: int
    dry: SettledDry | None
    logit_bias: tuple[tuple[int, float], ...]
    key: int

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def has_penalties(self) -> bool:
        return self.look_back > 0 and (self.repeat_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def has_xtc(self) -> bool:
        return self.xtc_probability > 0 and self.xtc_threshold <= _MOST_XTC_THRESHOLD


def model_defaults(metadata: Callable[[str], str | None]) -> Sampling:
    """The model's own sampling, from its metadata; values that aren't numbers in range are left out with a warning."""
    found: dict[str, Any] = {}
    for key, field in METADATA_KEYS.items():
        text = metadata(key)
        if text is None:
            continue
        try:
            value = int(text) if field in WHOLE else float(text)
        except ValueError:
            value = math.nan
        if is_in_range(field, value):
            found[field] = value
        else:
            log.warning("the model's own %s is %r, which is no sensible value: it is ignored", key, text)
    if metadata(SEQUENCE_KEY):
        log.warning("the model's own %s is not followed: the order is llama.cpp's", SEQUENCE_KEY)
    return Sampling(**found)


def settle(
    asked: Sampling,
    defaults: Sampling,
    *,
    vocabulary_size: int,
    window: int,
    choice: int,
    fresh_seed: Callable[[], int] = lambda: secrets.randbits(64),
) -> Settled:
    """Decides every field.

    An omitted ``repeat_last_n`` is 64 with ``repeat_penalty``, as in llama.cpp, and the whole window where only
    OpenAI's two penalties are set, as their definition wants. An omitted seed is a fresh one.

    Raises:
        RequestError: ``invalid_request``, with the field: a value out of its range, or a bias for no token.
    """
    check_sampling(asked, vocabulary_size)

    def pick(field: str, default: float) -> float:
        own: float | None = getattr(asked, field)
        models: float | None = getattr(defaults, field)
        return own if own is not None else models if models is not None else default

    def within(field: str, default: int) -> int:
        count = int(pick(field, default))
        return window if count < 0 else min(count, window)

    temperature = pick("temperature", 1.0)
    repeat_penalty = pick("repeat_penalty", 1.0)
    return Settled(
        temperature=temperature if temperature >= LEAST_TEMPERATURE else 0.0,
        top_k=min(max(0, int(pick("top_k", 0))), vocabulary_size),
        top_p=pick("top_p", 1.0),
        min_p=pick("min_p", 0.0),
        typical_p=pick("typical_p", 1.0),
        top_n_sigma=pick("top_n_sigma", -1.0),
        xtc_probability=pick("xtc_probability", 0.0),
        xtc_threshold=pick("xtc_threshold", 0.1),
        mirostat=int(pick("mirostat", 0)),
        mirostat_tau=pick("mirostat_tau", 5.0),
        mirostat_eta=pick("mirostat_eta", 0.1),
        repeat_penalty=repeat_penalty,
        presence_penalty=pick("presence_penalty", 0.0),
        frequency_penalty=pick("frequency_penalty", 0.0),
        look_back=within("repeat_last_n", DEFAULT_REPEAT_LAST_N if repeat_penalty != 1.0 else -1),
        dry=_settled_dry(asked, pick, within),
        logit_bias=tuple(sorted(asked.logit_bias.items())),
        key=key_of(asked.seed if asked.seed is not None else fresh_seed(), choice),
    )


def _settled_dry(
    asked: Sampling, pick: Callable[[str, float], float], within: Callable[[str, int], int]
) -> SettledDry | None:
    multiplier = pick("dry_multiplier", 0.0)
    look_back = within("dry_penalty_last_n", DEFAULT_REPEAT_LAST_N)
    if multiplier == 0 or look_back == 0:
        return None
    return SettledDry(
        multiplier=multiplier,
        base=pick("dry_base", 1.75),
        allowed=int(pick("dry_allowed_length", 2)),
        look_back=look_back,
        breakers=DEFAULT_BREAKERS if asked.dry_sequence_breakers is None else asked.dry_sequence_breakers,
    )


def key_of(seed: int, choice: int) -> int:
    """64 bits that all draws of one choice hang on."""
    digest = hashlib.blake2b(f"{seed} {choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
