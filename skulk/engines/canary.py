"""The canary: a short greedy text that a freshly loaded engine has to recite before it serves. Pure.

    what it sings                                              verdict
    scores that are no numbers                                 the loader's, before any text (`NoNumbers`)
    one token 16 times over                                    faulty
    another token than at the first load of this file and      faulty, unless the two best were a near tie there
      build under these settings, at any place
    slower than 0.3 x the median of the last five loads        faulty, unless others had the processors meanwhile
    else                                                       fine: speed and the first text are remembered

The text counts on from 10: every model goes on with it for 16 tokens, and a healthy one is sure of each. Near ties are
told by the recorded margins, the difference of the two greatest scores. A later load is led along the first one's text,
so that every place is compared, also behind a near tie: resuming by prefill parted the texts of a real
model at margins of up to 0.27.
"""

from __future__ import annotations

import statistics
from typing import Final

import msgspec

PROMPT: Final = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10,"
TOKENS: Final = 16
NEAR_TIE: Final = 0.5
SLOWEST: Final = 0.3
"""Of the median speed."""
REMEMBERED: Final = 5
TIMED_STEPS: Final = 4
"""Fewer steps tell no speed: the model ended its text at once."""


class Recital(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine recited.

    Attributes:
        tokens: drawn greedily, up to the end of an answer; behind the recorded text where there is one.
        margins: difference of the two greatest scores at each of them.
        step_s: the median time of a decode step; 0: too few of them.
        waited_s: the part of it that its threads at most waited for a processor, on average.
    """

    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    step_s: float = 0.0
    waited_s: float = 0.0


class CanaryRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one file on one build: the text of the first load, and the last speeds in tokens a second."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    speeds: tuple[float, ...] = ()


def fault_of(recital: Recital, record: CanaryRecord | None) -> str:
    """Why the backend isn't to be trusted, in a sentence; empty: it is."""
    if len(recital.tokens) >= TOKENS and len(set(recital.tokens)) == 1:
        return f"it gave one token ({recital.tokens[0]}) {len(recital.tokens)} times over"
    return "" if record is None else _other_text(recital, record) or _too_slow(recital, record)


def with_recital(record: CanaryRecord | None, recital: Recital) -> CanaryRecord:
    """The record after a load that was fine."""
    known = record or CanaryRecord(tokens=recital.tokens, margins=recital.margins)
    if not recital.step_s:
        return known
    return msgspec.structs.replace(known, speeds=(*known.speeds, 1.0 / recital.step_s)[-REMEMBERED:])


def _other_text(recital: Recital, record: CanaryRecord) -> str:
    known, now = record.tokens, recital.tokens
    # where one ends first, an end was drawn in place of a token, or the other way round
    ends = [] if len(known) == len(now) else [min(len(known), len(now))]
    places = [at for at, (first, later) in enumerate(zip(known, now, strict=False)) if first != later] + ends
    sure = [at for at in places if at < len(record.margins) and record.margins[at] > NEAR_TIE]
    if not sure:
        return ""
    parted, margin = sure[0], record.margins[sure[0]]
    return (
        f"it gave another text than at the first load of this file: they part at token {parted + 1} of "
        f"{len(record.tokens)}, where the scores were {margin:.2f} apart"
    )


def _too_slow(recital: Recital, record: CanaryRecord) -> str:
    if not recital.step_s or not record.speeds:
        return ""
    median = statistics.median(record.speeds)
    alone_s = recital.step_s - recital.waited_s
    slowest_s = 1.0 / (SLOWEST * median)
    if alone_s <= slowest_s:
        return ""
    return (
        f"it computes {1.0 / recital.step_s:.2f} tokens a second, less than {SLOWEST} of the {median:.2f} that its "
        f"last {len(record.speeds)} loads had"
    )
