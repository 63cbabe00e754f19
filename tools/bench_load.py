"""The load that `bench_serving` puts on a server, and what its answers amount to. Pure.

prompts      words drawn from a list by a seed: distinct from the first word on, or distinct behind a shared prefix
arrivals     closed loop: the next request when one ends; open loop: exponential gaps of a seed at a rate
samples      one a request: when it was sent, when each event with text came, how many tokens its usage counts
figures      tokens/s, time to the first token, gaps between tokens
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final, cast

import msgspec
from bench_figures import percentile

_LIST: Final = """
amber anchor apple autumn basket beacon birch border bridge bronze butter canyon castle cedar chalk cherry
circle clover coast copper corner cotton crystal dawn delta desert dragon eagle ember engine evening falcon
feather fern field flame forest fossil garden gentle glacier gold granite grove harbor hazel hollow honey island
ivory jasmine juniper kettle ladder lantern lemon linen marble meadow mirror morning mountain needle north oak
ocean olive orchard paper pebble pepper pine planet prairie quiet rain raven river saddle salt sand shadow
silver spring stone storm summer thunder timber valley velvet village violet walnut water willow winter
"""
WORDS: Final = tuple(_LIST.split())


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One request to send."""

    name: str
    prompt: str
    max_tokens: int


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a request. Times in seconds of one clock.

    Attributes:
        arrivals_s: when each event with text came; one may hold several tokens.
        completion_tokens: as the server counts them, else the events.
        error: why it failed; empty: it didn't.
    """

    name: str
    sent_s: float
    ended_s: float
    arrivals_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return self.arrivals_s[0] - self.sent_s if self.arrivals_s else math.nan

    @property
    def gaps_s(self) -> tuple[float, ...]:
        return tuple(after - before for before, after in pairwise(self.arrivals_s))


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One round on one server. Seconds, and tokens per second of all requests together; NaN where there is nothing."""

    tokens_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    gap_p50_s: float
    gap_p99_s: float
    longest_gap_s: float
    completed: int
    failed: int
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    errors: tuple[str, ...] = ()


def text_of(count: int, seed: str) -> str:
    """``count`` words; the same for the same seed."""
    chance = random.Random(seed)
    return " ".join(chance.choice(WORDS) for _ in range(count))


def jobs(*, count: int, words: int, max_tokens: int, seed: str, shared_words: int = 0) -> list[Job]:
    """Requests whose prompts differ from the first word on, or behind ``shared_words`` that all of them begin with."""
    assert count > 0 and words > 0 and max_tokens > 0
    prefix = text_of(shared_words, f"{seed} shared") + " " if shared_words else ""
    return [
        Job(name=f"{number}", prompt=f"{prefix}{text_of(words, f'{seed} {number}')}", max_tokens=max_tokens)
        for number in range(count)
    ]


def arrivals(count: int, rate: float, seed: str) -> tuple[float, ...]:
    """When to send each request of an open loop, in seconds from its start: a Poisson process of ``rate`` a second."""
    assert count > 0 and rate > 0
    chance = random.Random(seed)
    at_s = 0.0
    times = [at_s]
    for _ in range(count - 1):
        at_s += chance.expovariate(rate)
        times.append(at_s)
    return tuple(times)


def figures(samples: Sequence[Sample]) -> Figures:
    """What a round amounts to; failed requests count only as such."""
    good = [sample for sample in samples if not sample.error]
    spent_s = max((s.ended_s for s in good), default=0.0) - min((s.sent_s for s in good), default=0.0)
    firsts = [sample.ttft_s for sample in good if sample.arrivals_s]
    gaps = [gap for sample in good for gap in sample.gaps_s]
    tokens = sum(sample.completion_tokens for sample in good)
    return Figures(
        tokens_per_s=tokens / spent_s if spent_s > 0 else math.nan,
        ttft_p50_s=percentile(firsts, 0.5),
        ttft_p99_s=percentile(firsts, 0.99),
        gap_p50_s=percentile(gaps, 0.5),
        gap_p99_s=percentile(gaps, 0.99),
        longest_gap_s=max(gaps, default=math.nan),
        completed=len(good),
        failed=len(samples) - len(good),
        prompt_tokens=sum(sample.prompt_tokens for sample in good),
        completion_tokens=tokens,
        cached_tokens=sum(sample.cached_tokens for sample in good),
        errors=tuple(sorted({sample.error for sample in samples if sample.error}))[:5],
    )


def intrusion(streams: Sequence[Sample], long: Sample) -> Figures:
    """How a long prompt disturbs running streams: their longest gap that touches the time from its sending to its
    first token, and that prompt's own time to the first token. Tokens per second are those of the streams meanwhile.
    """
    if long.error or not long.arrivals_s:
        return figures([*streams, msgspec.structs.replace(long, error=long.error or "the long prompt gave no token")])
    start, end = long.sent_s, long.arrivals_s[0]
    gaps: list[float] = []
    errors = [stream.error for stream in streams if stream.error]
    for stream in streams:
        if stream.error or not stream.arrivals_s:
            continue
        if stream.arrivals_s[-1] < end:
            errors.append(f"stream {stream.name} was over before the long prompt's first token; give it more tokens")
        gaps += [after - before for before, after in pairwise(stream.arrivals_s) if after > start and before < end]
    meanwhile = sum(1 for stream in streams for at_s in stream.arrivals_s if start < at_s <= end)
    return Figures(
        tokens_per_s=meanwhile / (end - start) if end > start else math.nan,
        ttft_p50_s=long.ttft_s,
        ttft_p99_s=long.ttft_s,
        gap_p50_s=percentile(gaps, 0.5),
        gap_p99_s=percentile(gaps, 0.99),
        longest_gap_s=max(gaps, default=math.nan),
        completed=len(streams) + 1 - len(errors),
        failed=len(errors),
        prompt_tokens=long.prompt_tokens,
        completion_tokens=meanwhile,
        cached_tokens=long.cached_tokens,
        errors=tuple(sorted(set(errors)))[:5],
    )


def usage_of(event: dict[str, Any]) -> tuple[int, int, int] | None:
    """Prompt, completion and cached tokens of a stream's event, where it has them."""
    usage: dict[str, Any] | None = event.get("usage")
    if not usage:
        return None
    details: dict[str, Any] = usage.get("prompt_tokens_details") or {}
    return int(usage["prompt_tokens"]), int(usage["completion_tokens"]), int(details.get("cached_tokens") or 0)


def has_text(event: dict[str, Any]) -> bool:
    """Whether a stream's event brings text: of a chat (``delta``) or of a completion (``text``)."""
    for choice in event.get("choices") or ():
        delta: dict[str, Any] = choice.get("delta") or {}
        if delta.get("content") or delta.get("reasoning_content") or choice.get("text"):
            return True
    return False


def error_of(event: Any) -> str:
    """The error that a stream's event or a refusal's body tells; empty: none."""
    error: Any = cast("dict[str, Any]", event).get("error") if isinstance(event, dict) else event
    if not error:
        return ""
    if isinstance(error, dict):
        known = cast("dict[str, Any]", error)
        return str(known.get("message") or known.get("code") or known)
    return str(error)
