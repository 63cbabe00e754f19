"""One sequence's sampler chain: a row of logits in, a token out. In the order of llama.cpp's common sampler.

    temperature 0:  logit_bias > penalties > DRY > greedy: the first of the greatest logits
    mirostat:       logit_bias > temperature > mirostat
    else:           logit_bias > penalties > DRY > top_n_sigma > top_k > typical_p > top_p > min_p > XTC > temperature
                    > draw

A grammar is asked about the drawn token alone; where it refuses that one, all that it refuses is taken out of the row
after the penalties, and the rest is done again, with dice of its own: the same ones would favour some tokens.

The row is read where llama.cpp left it; it is copied only where something edits single logits. Nothing native is made
for a request: see `filters` and `breakers` for what that would cost. A chain knows no slot: it can be set aside and go
on in another one. What it remembers comes from the tokens it was begun with and those it drew, but for mirostat's mu.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from skulk.engines.grammar.constraint import Allowed, Follower
from skulk.engines.grammar.reader import refusal
from skulk.engines.llama_cpp import filters
from skulk.engines.llama_cpp.breakers import BreakerIndex, Breakers
from skulk.engines.llama_cpp.draw import PLACE_XTC, Drawer, uniform
from skulk.engines.llama_cpp.filters import Candidates, Logits
from skulk.engines.llama_cpp.mirostat import Mirostat
from skulk.engines.llama_cpp.native import address_of_row
from skulk.engines.llama_cpp.penalties import Biases, Dry, Edit, Penalties
from skulk.engines.llama_cpp.sampling import Settled, SettledDry
from skulk.engines.llama_cpp.vocabulary import Vocabulary
from skulk.errors import ServiceError

# Another key for the draws after a refusal.
_REDRAW: Final = 0x5DEE_CE66_D1CE_4E5B
_MAX_VIEWS: Final = 1024
_MAX_BREAKERS_KEPT: Final = 16


class NoNumbers(ServiceError):
    """The scores are no numbers: the weights are damaged, or the backend computes wrongly."""


class Workbench:
    """What all chains of one engine share: scratch of a row's size, and what was found out about the vocabulary.

    The engine thread's.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._views: dict[int, Logits] = {}
        self._address_of_row = address_of_row()
        self._edited = np.empty(vocabulary.size, dtype=np.float32)
        self._index: BreakerIndex | None = None
        self._breakers: dict[tuple[str, ...], Breakers] = {}
        self.drawer = Drawer(vocabulary.size)
        self.suppressed: tuple[tuple[int, float], ...] = tuple((token, -np.inf) for token in vocabulary.suppressed)

    def row(self, context: int, index: int) -> Logits:
        """The logits of batch row ``index``, (n_vocab,) float32: llama.cpp's own memory, until the next call."""
        address = self._address_of_row(context, index)
        assert address, f"row {index} has no logits"
        view = self._views.get(address)
        if view is None:
            if len(self._views) >= _MAX_VIEWS:
                self._views.clear()
            memory: Any = (ctypes.c_float * self._vocabulary.size).from_address(address)
            view = np.frombuffer(memory, dtype=np.float32)
            view.flags.writeable = False
            self._views[address] = view
        return view

    def edited(self, row: Logits, edits: Sequence[Edit]) -> Logits:
        """A copy of the row after these edits, until the next such call."""
        np.copyto(self._edited, row)
        for edit in edits:
            edit.apply(self._edited)
        return self._edited

    def narrowed(self, row: Logits, allowed: Allowed) -> Logits:
        """A copy of the row, which may be `edited`'s, with -inf where it isn't allowed; until the next such call."""
        if row is not self._edited:
            np.copyto(self._edited, row)
        np.copyto(self._edited, -np.inf, where=~allowed)
        return self._edited

    def breakers_of(self, texts: tuple[str, ...]) -> Breakers:
        """The sequence breakers of these texts; the last few are remembered."""
        found = self._breakers.pop(texts, None)
        if found is None:
            if self._index is None:
                self._index = BreakerIndex(self._vocabulary.whole_pieces(), self._vocabulary.tokenise_bytes)
            found = self._index.find([text.encode("utf-8", "replace") for text in texts])
        self._breakers[texts] = found
        if len(self._breakers) > _MAX_BREAKERS_KEPT:
            del self._breakers[next(iter(self._breakers))]
        return found


class SamplerChain:
    """See the module.

    Args:
        history: the tokens of the sequence so far.
        follower: where the answer is in its grammar; None: it has none.
    """

    def __init__(
        self, settled: Settled, history: Sequence[int], workbench: Workbench, follower: Follower | None = None
    ) -> None:
        self._settled = settled
        self._workbench = workbench
        self._edits: tuple[Edit, ...] = tuple(_edits_of(settled, history, workbench))
        self._follower = follower
        self._is_bare = settled.is_greedy and not self._edits and follower is None
        self._mirostat = (
            Mirostat(settled.mirostat, settled.mirostat_tau, settled.mirostat_eta) if settled.mirostat else None
        )

    def sample(self, context: int, index: int, position: int) -> int:
        """Draws from the logits of batch row ``index`` of the last call, and remembers the token.

        Args:
            context: the llama_context.
            index: of a row that has logits.
            position: of the drawn token in its sequence, prompt included.

        Raises:
            ServiceError: ``runner_failed``: the logits are no numbers.
            RequestError: ``invalid_request``: no token can go on as the grammar wants it, or that is too much work to
                tell.
        """
        row = self._workbench.row(context, index)
        return _greedy(row) if self._is_bare else self.sample_row(row, position)

    def sample_row(self, row: Logits, position: int) -> int:
        """`sample` from a row, (n_vocab,) float32."""
        if self._edits:
            row = self._workbench.edited(row, self._edits)
        token = self._chosen(row, position, self._settled.key)
        for edit in self._edits:
            edit.accept(token)
        return token

    def _chosen(self, row: Logits, position: int, key: int) -> int:
        mu = self._mirostat.mu if self._mirostat is not None else 0.0
        token = self._taken(row, position, key)
        follower = self._follower
        if follower is None or follower.accepts(token):
            return token
        if self._mirostat is not None:
            self._mirostat.mu = mu
        row = self._workbench.narrowed(row, follower.allowed())
        if not np.isfinite(row.max()):
            raise refusal("no token of this model can go on with this answer as it wants; loosen it at this place")
        token = self._taken(row, position, key ^ _REDRAW)
        is_accepted = follower.accepts(token)
        assert is_accepted, f"token {token} was allowed, and then refused"
        return token

    def _taken(self, row: Logits, position: int, key: int) -> int:
        return _greedy(row) if self._settled.is_greedy else self._drawn(row, position, key)

    def _drawn(self, row: Logits, position: int, key: int) -> int:
        settled = self._settled
        candidates = Candidates(row, float(row[_greedy(row)]), scratch=self._workbench.drawer.scratch)
        if self._mirostat is not None:
            temperature = np.float32(settled.temperature)
            warmed = Candidates(row / temperature, float(np.float32(candidates.peak) / temperature))
            return self._mirostat.draw(warmed, uniform(key, position))
        if settled.top_n_sigma > 0:
            candidates = filters.keep_top_n_sigma(candidates, settled.top_n_sigma)
        if settled.top_k > 0:
            candidates = filters.keep_top_k(candidates, settled.top_k)
        if settled.typical_p < 1:
            candidates = filters.keep_typical(candidates, settled.typical_p)
        if settled.top_p < 1:
            candidates = filters.keep_top_p(candidates, settled.top_p)
        if settled.min_p > 0:
            candidates = filters.keep_min_p(candidates, settled.min_p)
        if settled.has_xtc and uniform(key, position, PLACE_XTC) <= settled.xtc_probability:
            candidates = filters.cut_xtc(candidates, settled.xtc_threshold)
        return self._workbench.drawer.draw(candidates, settled.temperature, key, position)


def _edits_of(settled: Settled, history: Sequence[int], workbench: Workbench) -> list[Edit]:
    edits: list[Edit] = []
    biases = (*settled.logit_bias, *workbench.suppressed)
    if biases:
        edits.append(Biases(biases))
    if settled.mirostat and not settled.is_greedy:
        return edits
    if settled.has_penalties:
        edits.append(
            Penalties(
                history,
                look_back=settled.look_back,
                repeat=settled.repeat_penalty,
                frequency=settled.frequency_penalty,
                presence=settled.presence_penalty,
            )
        )
    if settled.dry is not None:
        edits.append(_dry_of(settled.dry, history, workbench))
    return edits


def _dry_of(dry: SettledDry, history: Sequence[int], workbench: Workbench) -> Dry:
    return Dry(
        history,
        look_back=dry.look_back,
        multiplier=dry.multiplier,
        base=dry.base,
        allowed=dry.allowed,
        breakers=workbench.breakers_of(dry.breakers),
    )


def _greedy(row: Logits) -> int:
    """The first of the greatest logits, if it is a number: of NaN among them numpy makes the greatest."""
    best = int(row.argmax())
    peak = float(row[best])
    if not math.isfinite(peak):
        raise NoNumbers(
            "runner_failed",
            f"the model's scores of the next token are no numbers (the greatest is {peak}): its weights are damaged, "
            "or this backend computes them wrongly. Verify the file, or place the model on another backend.",
        )
    return best
