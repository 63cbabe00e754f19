"""A grammar over the tokens of one vocabulary: whether a token may come next, and which ones may.

    PieceTree    the texts of all tokens as one tree, level by level, so that numpy walks all of them at once
    Grammar      one text in GBNF, with what was found out about it
    Follower     where one answer is in its grammar; the tokens that it accepted decide it, nothing else
    Grammars     the last few grammars of one engine, by their texts

A token whose text is empty, as that of control tokens is, may only come where the grammar names it (``<|think|>``). End
tokens may come where the text may end, and change nothing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from skulk.engines.grammar.automaton import DEAD, Automaton, Overrun, Program
from skulk.engines.grammar.reader import read_grammar, refusal
from skulk.errors import RequestError

Allowed: TypeAlias = NDArray[np.bool_]

MAX_REPLAY: Final = 1_000_000
"""Ways looked at while an answer is followed again from its tokens: about a second."""
_MAX_MASKS: Final = 32
_MAX_GRAMMARS: Final = 4


class Tokens(NamedTuple):
    """What a grammar has to know of a vocabulary.

    Attributes:
        pieces: the bytes of each token's text; empty for control tokens.
        ends: tokens that end an answer.
        token_of: the id of a token's own text, ``<think>``; None: it is no single token.
    """

    pieces: Sequence[bytes]
    ends: frozenset[int]
    token_of: Callable[[str], int | None]


class _Level(NamedTuple):
    """The nodes so many bytes below the root: (n,) the parent's index in the level above and the byte that leads there.

    ``tokens`` (m,) end here, at the nodes ``ends_at`` (m,).
    """

    parents: NDArray[np.intp]
    bytes: NDArray[np.intp]
    tokens: NDArray[np.intp]
    ends_at: NDArray[np.intp]


class PieceTree:
    """See the module. O(bytes of all pieces) to make and to walk."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        lengths = np.fromiter(map(len, pieces), dtype=np.intp, count=len(pieces))
        starts = np.cumsum(lengths) - lengths
        text = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        alive = lengths.nonzero()[0]
        at = np.zeros(len(pieces), dtype=np.intp)
        self._size = len(pieces)
        self._levels: list[_Level] = []
        while alive.size:
            depth = len(self._levels)
            codes, node = np.unique(at[alive] * 256 + text[starts[alive] + depth], return_inverse=True)
            at[alive] = node
            is_last = lengths[alive] == depth + 1
            self._levels.append(_Level(codes // 256, codes % 256, alive[is_last], node[is_last]))
            alive = alive[~is_last]

    def reachable(self, automaton: Automaton, state: int) -> Allowed:
        """The tokens whose whole text the automaton takes from this state, (n_vocab,).

        Raises:
            Overrun: too much work.
        """
        allowed = np.zeros(self._size, dtype=np.bool_)
        states = np.array([state])
        for level in self._levels:
            before = states[level.parents]
            states = automaton.table[before, level.bytes]
            while (missing := np.flatnonzero(states < 0)).size:
                for one in np.unique(before[missing]):
                    automaton.make_row(int(one))
                states[missing] = automaton.table[before[missing], level.bytes[missing]]
            allowed[level.tokens] = states[level.ends_at] != DEAD
            if not states.any():
                break
        return allowed


class Grammar:
    """See the module. Made in any thread, used in one.

    Raises:
        RequestError: ``invalid_request``: what is wrong with it, and where.
    """

    def __init__(self, text: str, tokens: Tokens, tree: PieceTree) -> None:
        self.tokens = tokens
        self.program = Program(read_grammar(text, tokens.token_of, len(tokens.pieces)))
        self._tree = tree
        self._ends = sorted(tokens.ends)
        try:
            self._automaton = Automaton(self.program)
        except Overrun as error:
            raise _too_much() from error
        self._masks: OrderedDict[int, NDArray[np.uint8]] = OrderedDict()

    @property
    def automaton(self) -> Automaton:
        """The one to begin or to go on in; another one when the last one has become full."""
        if self._automaton.is_full:
            self._automaton = Automaton(self.program)
            self._masks.clear()
        return self._automaton

    def after(self, automaton: Automaton, state: int, token: int) -> int:
        """The state after a token; `DEAD`: it may not come there.

        Raises:
            Overrun: too much work.
        """
        if token in self.tokens.ends:
            return state if automaton.is_accepted(state) else DEAD
        following = state if self.tokens.pieces[token] else DEAD
        for byte in self.tokens.pieces[token]:
            following = automaton.step(following, byte)
            if following == DEAD:
                break
        named = automaton.tokens_at(state)
        ways = [way for one, found in named.items() if (one.token == token) != one.is_other for way in found]
        return automaton.joined(ways, following) if ways else following

    def allowed(self, automaton: Automaton, state: int) -> Allowed:
        """The tokens that may come at a state, (n_vocab,).

        Raises:
            Overrun: too much work.
        """
        assert automaton is self._automaton, "an automaton that is full is left before it is asked"
        packed = self._masks.get(state)
        if packed is not None:
            self._masks.move_to_end(state)
            return np.unpackbits(packed, count=len(self.tokens.pieces)).view(np.bool_)
        allowed = self._found(automaton, state)
        self._masks[state] = np.packbits(allowed)
        if len(self._masks) > _MAX_MASKS:
            self._masks.popitem(last=False)
        return allowed

    def _found(self, automaton: Automaton, state: int) -> Allowed:
        allowed = self._tree.reachable(automaton, state)
        for named in automaton.tokens_at(state):
            if named.is_other:
                but = allowed[named.token]
                allowed[:] = True
                allowed[named.token] = but
            else:
                allowed[named.token] = True
        allowed[self._ends] = automaton.is_accepted(state)
        return allowed


class Follower:
    """See the module.

    Args:
        accepted: the tokens of the answer so far.

    Raises:
        RequestError: ``invalid_request``: these tokens aren't of the grammar, or it is too much work to tell.
    """

    def __init__(self, grammar: Grammar, accepted: Sequence[int] = ()) -> None:
        self._grammar = grammar
        self._automaton = grammar.automaton
        self._state = self._automaton.start
        work = 0
        for count, token in enumerate(accepted):
            if not self.accepts(token):
                raise refusal(f"token {count} of the answer that is to be gone on with, {token}, is not of the grammar")
            work += self._automaton.spent
            if work > MAX_REPLAY:
                raise _too_much()

    def accepts(self, token: int) -> bool:
        """Goes on to this token, if it may come next.

        Raises:
            RequestError: ``invalid_request``: too much work.
        """
        try:
            self._make_room()
            state = self._grammar.after(self._automaton, self._state, token)
        except Overrun as error:
            raise _too_much() from error
        if state == DEAD:
            return False
        self._state = state
        return True

    def allowed(self) -> Allowed:
        """The tokens that may come next, (n_vocab,).

        Raises:
            RequestError: ``invalid_request``: too much work.
        """
        try:
            self._make_room()
            return self._grammar.allowed(self._automaton, self._state)
        except Overrun as error:
            raise _too_much() from error

    def _make_room(self) -> None:
        if self._automaton.is_full:
            full, self._automaton = self._automaton, self._grammar.automaton
            self._automaton.allow_work()
            self._state = self._automaton.adopt(full, self._state)
        self._automaton.allow_work()


class Grammars:
    """See the module. Any thread, but each `Grammar` is for the one that draws.

    Args:
        tokens: tells the vocabulary, once, when the first grammar is asked for.
    """

    def __init__(self, tokens: Callable[[], Tokens]) -> None:
        self._read_tokens = tokens
        self._lock = threading.Lock()
        self._vocabulary: tuple[Tokens, PieceTree] | None = None
        self._grammars: OrderedDict[str, Grammar] = OrderedDict()

    def get(self, text: str) -> Grammar:
        """The grammar of this text.

        Raises:
            RequestError: ``invalid_request``: what is wrong with it, and where.
        """
        with self._lock:
            if self._vocabulary is None:
                tokens = self._read_tokens()
                self._vocabulary = tokens, PieceTree(tokens.pieces)
            vocabulary = self._vocabulary
            found = self._grammars.get(text)
        # Not under the lock: a long one must not hold up who draws.
        found = found or Grammar(text, *vocabulary)
        with self._lock:
            found = self._grammars.setdefault(text, found)
            self._grammars.move_to_end(text)
            if len(self._grammars) > _MAX_GRAMMARS:
                self._grammars.popitem(last=False)
        return found


def _too_much() -> RequestError:
    return refusal(
        "it leaves too many ways open at once to be followed; make it less ambiguous, with fewer repetitions of "
        "what may be empty"
    )
