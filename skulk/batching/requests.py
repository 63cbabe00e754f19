"""Requests and their sequences. One law: a sequence has tokens known and tokens computed, and steps close the gap.

    gap > 1, or nothing drawn yet   prefill: the step computes a chunk of it
    gap = 1 after a drawn token     decode: the step computes that token and draws the next
    gap = 0                         never between steps: the row that closes the gap draws

A fresh prompt, a resumed answer and cells found in another slot differ only in where the two counts start.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

import msgspec

from skulk.batching.cells import NO_CELLS, Cells
from skulk.batching.tokens import TokenLog
from skulk.wire.generation import FinishReason, ResumedChoice, Sampling, StreamEnd, StreamPhase

Lane = Literal[-1, 0, 1]
"""Who gets a slot first: resumed answers (-1), interactive requests (0), batch requests (1)."""
LANE_WIDTH: Final = 2**40
"""More than any runner takes in its life, so that the places of two lanes never meet."""


class RequestKey(NamedTuple):
    """One attempt of one request."""

    request_id: str
    attempt: int


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """An admitted request. Times are seconds of the runner's clock.

    Attributes:
        prompt: ids, at least one.
        max_tokens: of each choice, end token included; it fits the window.
        emitted: ids of choice 0 that another runner drew; they count as drawn here.
        sent_characters: of the text of choice 0, sent by that runner.
        others: the same of the choices from 1 on; missing ones were not begun.
        lane: who is served first; within a lane the order of arrival counts.
        border: where its last turn begins, tokens; worth keeping a state of, where states can't be cut. 0: unknown.
        deadline: when the request ends with ``deadline_exceeded``.
        digests: of its prompt's beginnings (`skulk.placement.prefixes`), to be told while its cells are there.
    """

    key: RequestKey
    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    max_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    emitted: tuple[int, ...] = ()
    sent_characters: int = 0
    others: tuple[ResumedChoice, ...] = ()
    lane: Lane = 0
    border: int = 0
    arrived_at: float
    deadline: float
    digests: tuple[int, ...] = ()

    @property
    def begun(self) -> tuple[ResumedChoice, ...]:
        """What was drawn before, of each choice."""
        first = ResumedChoice(emitted_tokens=self.emitted, sent_characters=self.sent_characters)
        missing = (ResumedChoice(),) * (self.n - 1 - len(self.others))
        return (first, *self.others, *missing)

    @property
    def cells(self) -> int:
        """Cells that one of its sequences may need."""
        return len(self.prompt) + self.max_tokens


class Sequence(msgspec.Struct, frozen=True, kw_only=True):
    """One choice of a request.

    Attributes:
        slot: where it is computed; -1 while it waits.
        order: its place in the order of arrival, lane by lane; it keeps it when it is parked.
        drawn: the answer's ids so far.
        computed: tokens, from the prompt's first on, whose cells are filled.
        cached: tokens of the prompt that were taken over at its start instead of computed.
        cells: what it holds of a unified cache.
        parked: where its sampler, and perhaps its cells, were set aside; 0: nowhere.
        marks: positions at which its state is to be kept for others, ascending.
        passed: how often a shorter prompt was computed before its own.
        held_bytes: of a character that isn't complete.
        held_text: that may become a stop string.
        skip: characters to leave out, for another runner sent them.
        started_at: when it got its slot; ``first_at``: when its first token was drawn here.
    """

    request: BatchRequest
    choice: int = 0
    slot: int = -1
    order: int = 0
    drawn: TokenLog = TokenLog()
    computed: int = 0
    cached: int = 0
    cells: Cells = NO_CELLS
    parked: int = 0
    marks: tuple[int, ...] = ()
    passed: int = 0
    held_bytes: bytes = b""
    held_text: str = ""
    skip: int = 0
    started_at: float = 0.0
    first_at: float = 0.0

    @property
    def known(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.request.prompt) + self.drawn.count

    @property
    def gap(self) -> int:
        """Tokens that are known and not computed."""
        return self.known - self.computed

    @property
    def is_decoding(self) -> bool:
        """Whether its next row is one drawn token."""
        done = self.computed - len(self.request.prompt)
        return done >= 0 and self.drawn.count - done == 1

    @property
    def phase(self) -> StreamPhase:
        if self.slot < 0:
            return "queued"
        return "decode" if self.is_decoding else "prefill"

    @property
    def may_need(self) -> int:
        """Tokens that its answer may still have."""
        return self.request.max_tokens - self.drawn.count

    def known_tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """The ids at these positions; O(what is asked for)."""
        prompt_count = len(self.request.prompt)
        if start >= prompt_count:
            return self.drawn.slice(start - prompt_count, stop - prompt_count)
        if stop <= prompt_count:
            return self.request.prompt[start:stop]
        return self.request.prompt[start:] + self.drawn.slice(0, stop - prompt_count)


class Emitted(msgspec.Struct, frozen=True, kw_only=True):
    """New text of one choice; ``finish_reason``: it ended with this."""

    key: RequestKey
    choice: int
    text: str
    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None


class Progressed(msgspec.Struct, frozen=True, kw_only=True):
    """A request went on to another phase, or further in its prompt: ``processed`` of ``total`` tokens."""

    key: RequestKey
    phase: StreamPhase
    processed: int
    total: int


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A request's one end; nothing of it follows."""

    key: RequestKey
    end: StreamEnd


Output = Emitted | Progressed | Ended
