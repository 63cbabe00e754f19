r"""Reads GBNF (llama.cpp's ``grammars/README.md``) into numbered rules.

    root ::= "yes" | "no" tail?      # what is in quotes stands as it is; | parts alternatives; # a remark
    tail ::= [a-z]{1,8} (" " .)*     # one of a class, repeated; a group; any character
    call ::= <tool_call> !<[7]>      # a token by its text; any token but the one of that number

A line begins a rule; within parentheses, and after ``::=`` and ``|``, lines may be broken. Escapes: ``\n \r \t \ \"``
``\[ \] \-``, ``\xHH``, ``\uHHHH``, ``\UHHHHHHHH``. Everything that llama.cpp reads is read, but bounded: it crashes on
deep nesting, and turns a repetition that it finds too often into an endless one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple, TypeAlias

from skulk.engines.grammar.characters import MAX_CHARACTER, Range, byte_sequences, complement, merged
from skulk.errors import RequestError

START_RULE: Final = "root"
MAX_NESTING: Final = 64
MAX_SYMBOLS: Final = 50_000
"""Of all alternatives together, after repetitions were unfolded and characters became bytes."""

_ESCAPES: Final = {"t": "\t", "r": "\r", "n": "\n", "\\": "\\", '"': '"', "[": "[", "]": "]", "-": "-"}
_HEX_DIGITS: Final = {"x": 2, "u": 4, "U": 8}
_WORD: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-")
_DIGITS: Final = frozenset("0123456789")
_HEX: Final = frozenset("0123456789abcdefABCDEF")
_ANY: Final = ((1, MAX_CHARACTER),)
_SHOWN: Final = 24


class OneByte(NamedTuple):
    """One of some bytes; bit b of ``bits``: byte b."""

    bits: int


class Rule(NamedTuple):
    """Whatever the rule of this number allows."""

    number: int


class OneToken(NamedTuple):
    """This token, whatever its text; ``is_other``: any token but this one."""

    token: int
    is_other: bool


Symbol: TypeAlias = OneByte | Rule | OneToken
Alternatives: TypeAlias = list[list[Symbol]]


class Rules(NamedTuple):
    """A grammar: ``alternatives[number]`` of each rule. No rule comes to itself before something was read."""

    alternatives: list[Alternatives]
    start: int


def read_grammar(text: str, token_of: Callable[[str], int | None], vocabulary_size: int) -> Rules:
    """The rules of a grammar. O(its length after unfolding).

    Args:
        text: GBNF with a rule named ``root``.
        token_of: the id of a token's own text, ``<think>``; None: it is no single token.
        vocabulary_size: ids are below it.

    Raises:
        RequestError: ``invalid_request``: where it is wrong, and what was expected there.
    """
    reader = _Reader(text, token_of, vocabulary_size)
    reader.read()
    names = reader.names
    for name, number in names.items():
        if number not in reader.rules:
            raise refusal(f"the rule {_shown(name)} is used and nowhere defined; add a line `{_shown(name)} ::= ...`")
    start = names.get(START_RULE)
    if start is None:
        raise refusal(f"it has no rule named {START_RULE}, with which an answer begins; add one")
    alternatives = [reader.rules[number] for number in range(reader.count)]
    _check_left_recursion(alternatives, {number: name for name, number in names.items()})
    return Rules(alternatives, start)


def refusal(detail: str) -> RequestError:
    """The refusal of a grammar."""
    return RequestError("invalid_request", f"grammar: {detail}", param="grammar")


class _Reader:
    """One pass over the text; what it reads goes to ``rules``."""

    def __init__(self, text: str, token_of: Callable[[str], int | None], vocabulary_size: int) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._symbols = 0
        self._token_of = token_of
        self._vocabulary_size = vocabulary_size
        self._classes: dict[tuple[Range, ...], Symbol] = {}
        self.names: dict[str, int] = {}
        self.rules: dict[int, Alternatives] = {}
        self.count = 0

    def read(self) -> None:
        self._skip(lines=True)
        while self._at < len(self._text):
            self._rule()

    # Where it is

    def _peek(self, offset: int = 0) -> str:
        at = self._at + offset
        return self._text[at] if at < len(self._text) else ""

    def _skip(self, *, lines: bool) -> None:
        """Over blanks and remarks, and over line ends too where a rule may go on after them."""
        blanks = " \t\r\n" if lines else " \t"
        while char := self._peek():
            if char == "#":
                while self._peek() not in ("", "\r", "\n"):
                    self._at += 1
            elif char in blanks:
                self._at += 1
            else:
                return

    def _wrong(self, detail: str, at: int | None = None) -> RequestError:
        at = self._at if at is None else at
        line = self._text.count("\n", 0, at) + 1
        column = at - (self._text.rfind("\n", 0, at) + 1) + 1
        rest = self._text[at : at + _SHOWN].split("\n")[0]
        place = f"before {rest!r}" if rest else "at its end" if at >= len(self._text) else "at the end of the line"
        return refusal(f"line {line}, column {column}, {place}: {detail}")

    def _expect(self, char: str, why: str) -> None:
        if self._peek() != char:
            raise self._wrong(f"expected {char!r}, {why}")
        self._at += 1

    # What it makes

    def _new_rule(self, alternatives: Alternatives | None = None) -> int:
        number = self.count
        self.count += 1
        if alternatives is not None:
            self.rules[number] = alternatives
        return number

    def _count(self, more: int) -> None:
        self._symbols += more
        if self._symbols > MAX_SYMBOLS:
            raise self._wrong(
                f"it unfolds to more than {MAX_SYMBOLS} symbols; use fewer or smaller repetitions like {{m,n}}, or "
                "an open one, {m,}"
            )

    def _named(self, name: str) -> int:
        if name not in self.names:
            self.names[name] = self._new_rule()
        return self.names[name]

    # The notation

    def _word(self, what: str) -> str:
        start = self._at
        while self._peek() in _WORD:
            self._at += 1
        if start == self._at:
            raise self._wrong(f"expected {what}")
        return self._text[start : self._at]

    def _rule(self) -> None:
        name = self._word("the name of a rule (letters, digits and hyphens)")
        self._skip(lines=False)
        if not self._text.startswith("::=", self._at):
            raise self._wrong(f"expected '::=' after the name {_shown(name)}")
        self._at += 3
        self._skip(lines=True)
        number = self._named(name)
        # Of two rules with one name the last one counts, as in llama.cpp.
        self.rules[number] = self._alternatives(is_nested=False)
        if self._peek() not in ("", "\r", "\n"):
            raise self._wrong("expected a text in quotes, a class in brackets, a rule's name, '|' or the line's end")
        self._skip(lines=True)

    def _alternatives(self, *, is_nested: bool) -> Alternatives:
        found = [self._sequence(is_nested=is_nested)]
        while self._peek() == "|":
            self._at += 1
            self._skip(lines=True)
            found.append(self._sequence(is_nested=is_nested))
        return found

    def _sequence(self, *, is_nested: bool) -> list[Symbol]:
        found: list[Symbol] = []
        item: list[Symbol] | None = None
        while True:
            after = self._item(self._peek())
            if after is None:
                counts = self._counts()
                if counts is None:
                    return found + (item or [])
                if not item:
                    raise self._wrong("nothing stands before a repetition that it could repeat", self._at - 1)
                after = self._repeated(item, *counts)
            else:
                found += item or []
                self._count(len(after))
            item = after
            self._skip(lines=is_nested)

    def _item(self, char: str) -> list[Symbol] | None:
        """What begins with this character; None: nothing does."""
        match char:
            case '"':
                return self._literal()
            case "[":
                return [self._class()]
            case "(":
                return [self._group()]
            case "<" | "!":
                return [self._token()]
            case ".":
                self._at += 1
                return [self._one_of(_ANY)]
            case _:
                return [Rule(self._named(self._word("a name")))] if char in _WORD else None

    def _literal(self) -> list[Symbol]:
        self._at += 1
        found: list[Symbol] = []
        while self._peek() not in ('"', ""):
            start = self._at
            character = self._character()
            try:
                found += (OneByte(1 << byte) for byte in character.encode())
            except UnicodeEncodeError as error:
                raise self._wrong("half of a surrogate pair is no character", start) from error
        self._expect('"', "the end of a text in quotes")
        return found

    def _class(self) -> Symbol:
        start = self._at
        self._at += 1
        is_other = self._peek() == "^"
        self._at += is_other
        ranges: list[Range] = []
        while self._peek() not in ("]", ""):
            low = high = ord(self._character())
            if self._peek() == "-" and self._peek(1) != "]":
                self._at += 1
                high = ord(self._character())
            if high < low:
                raise self._wrong("a range goes from the lower character to the higher one", start)
            ranges.append((low, high))
        self._expect("]", "the end of a class of characters")
        kept = merged(complement(ranges) if is_other else ranges)
        if not ranges or not kept:
            raise self._wrong("a class of no characters", start)
        return self._one_of(kept)

    def _one_of(self, ranges: tuple[Range, ...]) -> Symbol:
        """One character, as a byte or as a rule of its byte sequences; the same class is made once."""
        found = self._classes.get(ranges)
        if found is None:
            sequences = byte_sequences(ranges)
            single = sum(_bits(*one[0]) for one in sequences if len(one) == 1)
            longer: Alternatives = [[OneByte(_bits(*part)) for part in one] for one in sequences if len(one) > 1]
            self._count(sum(map(len, longer)))
            if longer:
                found = Rule(self._new_rule([[OneByte(single)], *longer] if single else longer))
            else:
                found = OneByte(single)
            self._classes[ranges] = found
        return found

    def _character(self) -> str:
        char = self._peek()
        self._at += 1
        if char != "\\":
            if not char:
                raise self._wrong("expected a character")
            return char
        kind = self._peek()
        self._at += 1
        if kind in _ESCAPES:
            return _ESCAPES[kind]
        count = _HEX_DIGITS.get(kind)
        if count is None:
            raise self._wrong('no such escape; \\n \\r \\t \\\\ \\" \\[ \\] \\- \\x \\u \\U are known', self._at - 2)
        digits = self._text[self._at : self._at + count]
        if len(digits) < count or not _HEX.issuperset(digits):
            raise self._wrong(f"expected {count} hexadecimal digits after \\{kind}")
        if int(digits, 16) > MAX_CHARACTER:
            raise self._wrong("no such character: the last one is U+10FFFF")
        self._at += count
        return chr(int(digits, 16))

    def _group(self) -> Symbol:
        self._at += 1
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise self._wrong(f"parentheses more than {MAX_NESTING} deep; name the inner parts as rules of their own")
        self._skip(lines=True)
        number = self._new_rule(self._alternatives(is_nested=True))
        self._expect(")", "the end of a group")
        self._depth -= 1
        return Rule(number)

    def _token(self) -> Symbol:
        start = self._at
        is_other = self._peek() == "!"
        self._at += is_other
        self._expect("<", "a token like <think> or <[7]>")
        end = self._text.find(">", self._at)
        if end < 0:
            raise self._wrong("expected '>' at the end of a token", start)
        text = self._text[self._at - 1 : end + 1]
        self._at = end + 1
        number = text[2:-2]
        if text[1] == "[" and text[-2] == "]" and number and _DIGITS.issuperset(number):
            if len(number) > len(str(self._vocabulary_size)) or int(number) >= self._vocabulary_size:
                raise self._wrong(f"this model has tokens 0 to {self._vocabulary_size - 1}", start)
            return OneToken(int(number), is_other)
        token = self._token_of(text)
        if token is None:
            raise self._wrong("that is no single token of this model", start)
        return OneToken(token, is_other)

    def _counts(self) -> tuple[int, int | None] | None:
        """How often the item before may stand; None in place of the second number: without end."""
        match self._peek():
            case "*":
                counts = (0, None)
            case "+":
                counts = (1, None)
            case "?":
                counts = (0, 1)
            case "{":
                return self._braces()
            case _:
                return None
        self._at += 1
        return counts

    def _braces(self) -> tuple[int, int | None]:
        start = self._at
        self._at += 1
        self._skip(lines=False)
        least = self._number()
        most: int | None = least
        self._skip(lines=False)
        if self._peek() == ",":
            self._at += 1
            self._skip(lines=False)
            most = self._number() if self._peek() in _DIGITS else None
            self._skip(lines=False)
        self._expect("}", "the end of a repetition {m}, {m,} or {m,n}")
        if most is not None and most < least:
            raise self._wrong(f"a repetition of at least {least} and at most {most}", start)
        return least, most

    def _number(self) -> int:
        start = self._at
        while self._peek() in _DIGITS:
            self._at += 1
        digits = self._text[start : self._at]
        if not digits:
            raise self._wrong("expected a number")
        # So long a number is too great anyway, and converting a longer one takes its time.
        number = int(digits) if len(digits) < _SHOWN else MAX_SYMBOLS
        if number >= MAX_SYMBOLS:
            raise self._wrong(
                f"a repetition of {digits[:_SHOWN]}; the most is {MAX_SYMBOLS - 1}, or none: {{m,}}", start
            )
        return number

    def _repeated(self, item: list[Symbol], least: int, most: int | None) -> list[Symbol]:
        """S{m,n} is m times S, and then a chain of rules: each is S and the next, or nothing."""
        once: Symbol = item[0] if len(item) == 1 else Rule(self._new_rule([item]))
        self._count(least + 2 * (most - least if most is not None else 1))
        found = [once] * least
        if most is None:
            number = self._new_rule()
            self.rules[number] = [[once, Rule(number)], []]
            return [*found, Rule(number)]
        last: int | None = None
        for _ in range(most - least):
            last = self._new_rule([[once] if last is None else [once, Rule(last)], []])
        return found if last is None else [*found, Rule(last)]


def _bits(low: int, high: int) -> int:
    """The bits of bytes ``low`` to ``high``."""
    return (1 << (high + 1)) - (1 << low)


def _shown(name: str) -> str:
    return name if len(name) <= _SHOWN else name[:_SHOWN] + "..."


def _may_be_empty(alternatives: list[Alternatives]) -> list[bool]:
    """Of each rule, whether it allows nothing at all. O(symbols)."""
    empty = [False] * len(alternatives)
    # Where a rule stands among nothing but rules: in which alternative; and what it still waits for.
    uses: list[list[int]] = [[] for _ in alternatives]
    owners: list[int] = []
    missing: list[int] = []
    todo: list[int] = []
    for number, rule in enumerate(alternatives):
        for one in rule:
            if not one:
                todo.append(number)
            elif all(isinstance(symbol, Rule) for symbol in one):
                for symbol in one:
                    assert isinstance(symbol, Rule)
                    uses[symbol.number].append(len(owners))
                owners.append(number)
                missing.append(len(one))
    while todo:
        number = todo.pop()
        if empty[number]:
            continue
        empty[number] = True
        for use in uses[number]:
            missing[use] -= 1
            if missing[use] == 0:
                todo.append(owners[use])
    return empty


def _first_rules(rule: Alternatives, empty: list[bool]) -> Iterable[int]:
    """The rules that this one may come to before anything was read."""
    for one in rule:
        for symbol in one:
            if not isinstance(symbol, Rule):
                break
            yield symbol.number
            if not empty[symbol.number]:
                break


def _check_left_recursion(alternatives: list[Alternatives], names: dict[int, str]) -> None:
    """Goes through what each rule comes to first, depth first, without recursion of its own."""
    empty = _may_be_empty(alternatives)
    is_done = [False] * len(alternatives)
    is_open = [False] * len(alternatives)
    for root in range(len(alternatives)):
        if is_done[root]:
            continue
        path = [(root, iter(_first_rules(alternatives[root], empty)))]
        is_open[root] = True
        while path:
            number, ahead = path[-1]
            following = next(ahead, None)
            if following is None:
                is_open[number], is_done[number] = False, True
                path.pop()
            elif is_open[following]:
                own = next((names[one] for one, _ in reversed(path) if one in names), START_RULE)
                raise refusal(
                    f"in the rule {_shown(own)} something comes to itself before it reads a character (left "
                    "recursion, or a repetition of what may be empty); write it as `a ::= b a | b`, or `b*` with a b "
                    "that is never empty"
                )
            elif not is_done[following]:
                is_open[following] = True
                path.append((following, iter(_first_rules(alternatives[following], empty))))
