"""How the next token is drawn: what was asked, settled with defaults and checked, and the native chain that does it.

    asked > the model's own (`general.sampling.*` of the GGUF) > OpenAI's (temperature 1, everything else off)

    temperature 0:  logit_bias > penalties > greedy
    else:           logit_bias > penalties > top_k > typical_p > top_p > min_p > temperature > dist(seed)

That is the order of llama.cpp's common sampler. Every number is checked first: native samplers abort the
process on some of them.
"""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from skulk.engines.llama_cpp.native import library
from skulk.errors import RequestError
from skulk.wire.generation import Sampling

log = logging.getLogger(__name__)

DEFAULT_REPEAT_LAST_N: Final = 64
MAX_LOGIT_BIASES: Final = 4096
# LLAMA_DEFAULT_SEED means "choose one" to llama.cpp, so it can't be a seed.
_CHOOSE_SEED: Final = 0xFFFFFFFF

# GGUF key -> field of Sampling.
METADATA_KEYS: Final[dict[str, str]] = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_last_n": "repeat_last_n",
    "general.sampling.penalty_repeat": "repeat_penalty",
}

_RANGES: Final[dict[str, tuple[float, float]]] = {
    "temperature": (0.0, 100.0),
    "top_k": (-1, 2**31 - 1),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "repeat_penalty": (0.01, 100.0),
    "repeat_last_n": (-1, 2**31 - 1),
    "presence_penalty": (-100.0, 100.0),
    "frequency_penalty": (-100.0, 100.0),
}
_BIAS_RANGE: Final = (-1e9, 1e9)


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling with every field decided. 0 or 1, whichever is the neutral value, means off.

    Attributes:
        look_back: how many of the last tokens the penalties regard.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    look_back: int
    logit_bias: tuple[tuple[int, float], ...]
    seed: int

    @property
    def has_penalties(self) -> bool:
        return self.look_back > 0 and (self.repeat_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)


def model_defaults(metadata: Callable[[str], str | None]) -> Sampling:
    """The model's own sampling, from its metadata; values that aren't numbers in range are left out with a warning."""
    found: dict[str, Any] = {}
    for key, field in METADATA_KEYS.items():
        text = metadata(key)
        if text is None:
            continue
        low, high = _RANGES[field]
        try:
            value = int(text) if field in ("top_k", "repeat_last_n") else float(text)
        except ValueError:
            value = math.nan
        if low <= value <= high:
            found[field] = value
        else:
            log.warning("the model's own %s is %r, which is no sensible value: it is ignored", key, text)
    return Sampling(**found)


def settle(
    asked: Sampling,
    defaults: Sampling,
    *,
    vocabulary_size: int,
    window: int,
    choice: int,
    fresh_seed: Callable[[], int] = lambda: secrets.randbits(32),
) -> Settled:
    """Decides every field.

    An omitted ``repeat_last_n`` is 64 with ``repeat_penalty``, as in llama.cpp, and the whole window where only
    OpenAI's two penalties are set, as their definition wants.

    Raises:
        RequestError: ``invalid_request``, with the field: a value out of its range, or a bias for no token.
    """
    _check_ranges(asked)

    def pick(field: str, default: float) -> float:
        own: float | None = getattr(asked, field)
        models: float | None = getattr(defaults, field)
        return own if own is not None else models if models is not None else default

    repeat_penalty = pick("repeat_penalty", 1.0)
    look_back = int(pick("repeat_last_n", DEFAULT_REPEAT_LAST_N if repeat_penalty != 1.0 else -1))
    seed = asked.seed if asked.seed is not None else fresh_seed()
    return Settled(
        temperature=pick("temperature", 1.0),
        top_k=min(max(0, int(pick("top_k", 0))), vocabulary_size),
        top_p=pick("top_p", 1.0),
        min_p=pick("min_p", 0.0),
        typical_p=pick("typical_p", 1.0),
        repeat_penalty=repeat_penalty,
        presence_penalty=pick("presence_penalty", 0.0),
        frequency_penalty=pick("frequency_penalty", 0.0),
        look_back=window if look_back < 0 else min(look_back, window),
        logit_bias=_biases(asked.logit_bias, vocabulary_size),
        seed=seed_of(seed, choice),
    )


def seed_of(seed: int, choice: int) -> int:
    """32 bits for the native generator. Choice 0 keeps a seed that fits; each other one has a stream of its own."""
    if choice == 0 and 0 <= seed < _CHOOSE_SEED:
        return seed
    digest = hashlib.blake2b(f"{seed} {choice}".encode(), digest_size=4).digest()
    return min(int.from_bytes(digest, "big"), _CHOOSE_SEED - 1)


def _check_ranges(asked: Sampling) -> None:
    for field, (low, high) in _RANGES.items():
        value: float | None = getattr(asked, field)
        if value is not None and not low <= value <= high:
            raise RequestError("invalid_request", f"{field} is {value}; it must be from {low} to {high}.", param=field)


def _biases(logit_bias: Mapping[int, float], vocabulary_size: int) -> tuple[tuple[int, float], ...]:
    if len(logit_bias) > MAX_LOGIT_BIASES:
        raise RequestError(
            "invalid_request",
            f"logit_bias names {len(logit_bias)} tokens; at most {MAX_LOGIT_BIASES} are allowed.",
            param="logit_bias",
        )
    low, high = _BIAS_RANGE
    for token, bias in logit_bias.items():
        if not 0 <= token < vocabulary_size:
            raise RequestError(
                "invalid_request",
                f"logit_bias names token {token}; this model's tokens are 0 to {vocabulary_size - 1}.",
                param="logit_bias",
            )
        if not low <= bias <= high:
            raise RequestError(
                "invalid_request", f"logit_bias of token {token} is {bias}, out of range.", param="logit_bias"
            )
    return tuple(sorted(logit_bias.items()))


class SamplerChain:
    """A native sampler chain of one slot. The engine thread owns it; `free` it once."""

    def __init__(self, settled: Settled, history: Sequence[int], vocabulary_size: int) -> None:
        lib = library()
        self._lib = lib
        # Kept alive beside the chain that was built from it.
        self._biases = (lib.llama_logit_bias * len(settled.logit_bias))(*settled.logit_bias)
        self._chain: int | None = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        assert self._chain, "llama_sampler_chain_init gave nothing"
        for link in self._links(settled, vocabulary_size):
            assert link, "a native sampler could not be made"
            lib.llama_sampler_chain_add(self._chain, link)
        if settled.has_penalties:
            for token in history[max(0, len(history) - settled.look_back) :]:
                lib.llama_sampler_accept(self._chain, token)

    def _links(self, settled: Settled, vocabulary_size: int) -> list[int]:
        lib = self._lib
        links: list[int] = []
        if settled.logit_bias:
            links.append(lib.llama_sampler_init_logit_bias(vocabulary_size, len(self._biases), self._biases))
        if settled.has_penalties:
            links.append(
                lib.llama_sampler_init_penalties(
                    vocabulary_size,
                    settled.look_back,
                    settled.repeat_penalty,
                    settled.frequency_penalty,
                    settled.presence_penalty,
                )
            )
        if settled.temperature == 0:
            return [*links, lib.llama_sampler_init_greedy()]
        if settled.top_k > 0:
            links.append(lib.llama_sampler_init_top_k(settled.top_k))
        if settled.typical_p < 1:
            links.append(lib.llama_sampler_init_typical(settled.typical_p, 1))
        if settled.top_p < 1:
            links.append(lib.llama_sampler_init_top_p(settled.top_p, 1))
        if settled.min_p > 0:
            links.append(lib.llama_sampler_init_min_p(settled.min_p, 1))
        return [*links, lib.llama_sampler_init_temp(settled.temperature), lib.llama_sampler_init_dist(settled.seed)]

    def sample(self, context: int, index: int) -> int:
        """Draws from the logits of row ``index`` of the last call, and remembers the token for the penalties."""
        assert self._chain, "the chain was freed"
        return self._lib.llama_sampler_sample(self._chain, context, index)

    def free(self) -> None:
        """Frees the chain with all its links."""
        if self._chain:
            self._lib.llama_sampler_free(self._chain)
            self._chain = None
