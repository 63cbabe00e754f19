"""What may follow, byte by byte: a grammar as an automaton whose states are made when they are first come to.

    way      (position, node): go on at this symbol; when its rule is over, go on as the node says
    node     the ways on of whoever called a rule, shared by all who called it at the same place of the text
    state    the ways that begin with a byte or a token, after some text; `ACCEPTED` among them: it may end here

    closure  ways ──rules called, rules over──> the ways of a state
    row      state ──each of 256 bytes──> state; `DEAD`: no text of the grammar goes on so

Stacks that share their nodes (a graph-structured stack, as in GLL) keep ambiguous grammars small: a rule that is called
twice at one place is followed once, with two ways on. Lists of whole stacks, llama.cpp's form, double with every doubt.

States and nodes are remembered, for most of an answer goes in circles. What one token may cost is bounded (`Overrun`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from skulk.engines.grammar.reader import Alternatives, OneByte, OneToken, Rule, Rules, Symbol

Way: TypeAlias = tuple[int, int]
Ways: TypeAlias = frozenset[Way]

DEAD: Final = 0
ACCEPTED: Final[Way] = (-1, -1)
MAX_WORK: Final = 30_000
"""Ways looked at between two calls of `Automaton.allow_work`: some 0.03 s."""
MAX_STATES: Final = 4096
MAX_WAYS: Final = 100_000
"""When so many states, or ways in states and nodes, have come to an automaton, another one is to begin."""
MAX_CARRIED: Final = 300_000
"""Ways that one answer may stand on when it goes over to another automaton: some 30 MB."""
MAX_STATES_OF_TOKEN: Final = 4096

_BYTES: Final = 256
_ALL_BYTES: Final = (1 << _BYTES) - 1
_END: Final = None


class Overrun(Exception):
    """Too much work for one token."""


class Program:
    """A grammar's rules as one list of symbols: each alternative a run of them, and `_END`.

    What several alternatives of a rule begin with stands there once, so that of a thousand names only those are
    followed that the text may still become.
    """

    def __init__(self, rules: Rules) -> None:
        self.symbols: list[OneByte | OneToken | Rule | None] = []
        self.starts: list[tuple[int, ...]] = []
        self.start_rule = rules.start
        for rule in _factored(rules.alternatives):
            starts: list[int] = []
            for one in rule:
                starts.append(len(self.symbols))
                self.symbols += one
                self.symbols.append(_END)
            self.starts.append(tuple(starts))


def _factored(alternatives: list[Alternatives]) -> Iterator[Alternatives]:
    """The same rules, and new ones for what comes after a shared beginning. O(symbols)."""
    todo = deque(alternatives)
    count = len(alternatives)
    while todo:
        groups: dict[object, Alternatives] = {}
        for one in todo.popleft():
            # Symbols of different kinds may be equal as tuples.
            groups.setdefault((type(one[0]), one[0]) if one else None, []).append(one)
        rule: Alternatives = []
        for group in groups.values():
            shared = _shared_beginning(group)
            if all(len(one) == len(shared) for one in group):
                rule.append(group[0])
                continue
            rule.append([*shared, Rule(count)])
            todo.append([one[len(shared) :] for one in group])
            count += 1
        yield rule


def _shared_beginning(group: Alternatives) -> list[Symbol]:
    """What all begin with."""
    least, *others = sorted(group, key=len)
    length = len(least)
    for other in others:
        length = next((at for at in range(length) if not _is_same(least[at], other[at])), length)
    return least[:length]


def _is_same(one: Symbol, other: Symbol) -> bool:
    return type(one) is type(other) and one == other


class Automaton:
    """See the module. One thread at a time.

    Attributes:
        program: the grammar's.
        start: the state before any text.
        table: (states, 256) int32: the state after a byte, -1 where its row wasn't made yet.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._nodes: list[Ways] = []
        self._node_ids: dict[Ways, int] = {}
        self._states: list[Ways] = []
        self._state_ids: dict[Ways, int] = {}
        self._rows_made: list[bool] = []
        self.table: NDArray[np.int32] = np.full((64, _BYTES), -1, dtype=np.int32)
        self._work_left = MAX_WORK
        self._states_left = MAX_STATES_OF_TOKEN
        self._states_before = 0
        self._ways_before = 0
        self._ways = 0
        assert self._state(frozenset()) == DEAD
        bottom = self._node(frozenset((ACCEPTED,)))
        self.start = self._closed((first, bottom) for first in program.starts[program.start_rule])

    @property
    def is_full(self) -> bool:
        """Time for another one."""
        return len(self._states) - self._states_before > MAX_STATES or self._ways - self._ways_before > MAX_WAYS

    def allow_work(self) -> None:
        """Starts counting anew, for another token."""
        self._work_left = MAX_WORK
        self._states_left = MAX_STATES_OF_TOKEN

    def is_accepted(self, state: int) -> bool:
        """Whether the text may end here."""
        return ACCEPTED in self._states[state]

    def step(self, state: int, byte: int) -> int:
        """The state after a byte.

        Raises:
            Overrun: too much work.
        """
        if not self._rows_made[state]:
            self.make_row(state)
        return int(self.table[state, byte])

    def tokens_at(self, state: int) -> dict[OneToken, list[Way]]:
        """The tokens that the grammar names here, and the ways on after each."""
        found: dict[OneToken, list[Way]] = {}
        for position, node in self._states[state]:
            symbol = self.program.symbols[position] if position >= 0 else None
            if isinstance(symbol, OneToken):
                found.setdefault(symbol, []).append((position + 1, node))
        return found

    def joined(self, ways: Iterable[Way], state: int) -> int:
        """The state in which these ways are open, and those of another state too."""
        return self._closed((*ways, *self._states[state]))

    def make_row(self, state: int) -> None:
        """Finds the state after each byte.

        Raises:
            Overrun: too much work.
        """
        if self._rows_made[state]:
            return
        by_bits: dict[int, list[Way]] = {}
        for position, node in self._states[state]:
            symbol = self.program.symbols[position] if position >= 0 else None
            if isinstance(symbol, OneByte):
                by_bits.setdefault(symbol.bits, []).append((position + 1, node))
        parts: list[tuple[int, list[int]]] = [(_ALL_BYTES, [])]
        for bits in by_bits:
            self._spend(len(parts))
            split: list[tuple[int, list[int]]] = []
            for part, chosen in parts:
                if part & bits:
                    split.append((part & bits, [*chosen, bits]))
                if part & ~bits:
                    split.append((part & ~bits, chosen))
            parts = split
        # One part after the other: the table may move while states are made.
        after = [(part, self._closed(way for bits in chosen for way in by_bits[bits])) for part, chosen in parts]
        row = self.table[state]
        for part, following in after:
            row[_are_set(part)] = following
        self._rows_made[state] = True

    @property
    def spent(self) -> int:
        """Ways looked at since `allow_work`."""
        return MAX_WORK - self._work_left

    def adopt(self, other: Automaton, state: int) -> int:
        """A state of another automaton of the same grammar, as one of this one. O(its nodes).

        Raises:
            Overrun: it stands on too much.
        """
        nodes: dict[int, int] = {}
        carried = 0
        todo = [node for _, node in other._states[state] if node >= 0]
        while todo:
            node = todo[-1]
            ways = other._nodes[node]
            missing = [inner for _, inner in ways if inner >= 0 and inner not in nodes]
            if node in nodes or not missing:
                todo.pop()
                carried += len(ways)
                if carried > MAX_CARRIED:
                    raise Overrun
                nodes.setdefault(node, self._node(frozenset((at, nodes.get(inner, -1)) for at, inner in ways)))
            else:
                todo += missing
        adopted = self._state(frozenset((at, nodes.get(node, -1)) for at, node in other._states[state]))
        self._states_before, self._ways_before = len(self._states), self._ways
        return adopted

    # States and nodes

    def _spend(self, work: int) -> None:
        self._work_left -= work
        if self._work_left < 0:
            raise Overrun

    def _node(self, ways: Ways) -> int:
        number = self._node_ids.get(ways)
        if number is None:
            number = self._node_ids[ways] = len(self._nodes)
            self._ways += len(ways)
            self._nodes.append(ways)
        return number

    def _state(self, ways: Ways) -> int:
        number = self._state_ids.get(ways)
        if number is None:
            self._states_left -= 1
            if self._states_left < 0:
                raise Overrun
            number = self._state_ids[ways] = len(self._states)
            self._ways += len(ways)
            self._states.append(ways)
            self._rows_made.append(False)
            if number >= len(self.table):
                self.table = np.concatenate((self.table, np.full_like(self.table, -1)))
        return number

    def _closed(self, ways: Iterable[Way]) -> int:
        closure = _Closure(self.program, self._nodes, self._work_left)
        closure.run(ways)
        found = self._state(closure.ways_with(self._node))
        self._work_left = closure.work_left
        return found


class _Closure:
    """From ways that stand anywhere to those that begin with a byte or a token.

    A node that only comes to be in this closure, that of a rule called here, is ``-2 - rule`` until it is complete.
    """

    def __init__(self, program: Program, nodes: list[Ways], work_left: int) -> None:
        self._program = program
        self._nodes = nodes
        self._found: set[Way] = set()
        self._calls: dict[int, set[Way]] = {}
        self._over: set[int] = set()
        self.work_left = work_left

    def run(self, ways: Iterable[Way]) -> None:
        """Follows all ways."""
        todo = list(ways)
        seen = set(todo)
        symbols = self._program.symbols
        while todo:
            self._spend(1)
            position, node = way = todo.pop()
            if way == ACCEPTED:
                self._found.add(way)
                continue
            symbol = symbols[position]
            if symbol is _END:
                new = self._returned(node)
            elif isinstance(symbol, Rule):
                new = self._called(symbol.number, (position + 1, node))
            else:
                self._found.add(way)
                continue
            for one in new:
                if one not in seen:
                    seen.add(one)
                    todo.append(one)

    def _returned(self, node: int) -> Iterable[Way]:
        if node >= 0:
            return self._nodes[node]
        rule = -2 - node
        self._over.add(rule)
        return tuple(self._calls[rule])

    def _called(self, rule: int, way_on: Way) -> Iterable[Way]:
        callers = self._calls.get(rule)
        if callers is None:
            self._calls[rule] = {way_on}
            return [(start, -2 - rule) for start in self._program.starts[rule]]
        callers.add(way_on)
        return (way_on,) if rule in self._over else ()

    def ways_with(self, node_of: Callable[[Ways], int]) -> Ways:
        """What was found, with complete nodes. Rules call each other in no circle here: there is no left recursion."""
        complete: dict[int, int] = {}
        ways_of: dict[int, Ways] = {}
        todo = [-2 - node for _, node in self._found if node < -1]
        while todo:
            rule = todo[-1]
            missing = [-2 - node for _, node in self._calls[rule] if node < -1 and -2 - node not in complete]
            if rule in complete or not missing:
                todo.pop()
                if rule not in complete:
                    ways_of[rule] = self._flat(rule, complete, ways_of)
                    complete[rule] = node_of(ways_of[rule])
            else:
                todo += missing
        return frozenset((at, complete[-2 - node] if node < -1 else node) for at, node in self._found)

    def _flat(self, rule: int, complete: dict[int, int], ways_of: dict[int, Ways]) -> Ways:
        """The ways on after a rule; where nothing is left to do in the caller, those of its caller."""
        flat: set[Way] = set()
        self._spend(len(self._calls[rule]))
        for position, node in self._calls[rule]:
            is_tail = self._program.symbols[position] is _END
            if node < -1:
                flat.update(ways_of[-2 - node] if is_tail else {(position, complete[-2 - node])})
            else:
                flat.update(self._nodes[node] if is_tail else {(position, node)})
        self._spend(len(flat))
        return frozenset(flat)

    def _spend(self, work: int) -> None:
        self.work_left -= work
        if self.work_left < 0:
            raise Overrun


def _are_set(bits: int) -> NDArray[np.intp]:
    """The numbers of the bits that are set, of 256."""
    octets = np.frombuffer(bits.to_bytes(_BYTES // 8, "little"), dtype=np.uint8)
    return np.unpackbits(octets, bitorder="little").nonzero()[0]
