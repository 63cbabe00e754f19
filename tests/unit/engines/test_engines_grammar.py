"""Grammars: what is read, what is refused and why, what may follow, and that nothing costs without a bound."""

from __future__ import annotations

import gc
import itertools
import re
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.engines.grammar import automaton as automaton_module
from skulk.engines.grammar.automaton import MAX_STATES, Automaton, Program
from skulk.engines.grammar.characters import MAX_CHARACTER, byte_sequences, complement, merged
from skulk.engines.grammar.constraint import Follower, Grammar, Grammars, PieceTree, Tokens
from skulk.engines.grammar.reader import MAX_NESTING, MAX_SYMBOLS, read_grammar
from skulk.errors import RequestError

WORDS = (b"ab", b"ba", b"abc", b"yes", b"no", b'":', b"\xc3\xb6", b"\xe6\x9d", b"  ")
THINK, END, OTHER_END = 256 + len(WORDS), 257 + len(WORDS), 258 + len(WORDS)
PIECES = (*(bytes([byte]) for byte in range(256)), *WORDS, b"", b"", b"")
NAMED = {"<think>": THINK, "<|end|>": END}
TOKENS = Tokens(PIECES, frozenset((END, OTHER_END)), NAMED.get)
TREE = PieceTree(PIECES)
JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws ( value ("," ws value)* )? "]" ws
string ::= "\"" ( [^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws     ::= | " " | "\n" [ \t]{0,20}   # no more
"""


def grammar_of(text: str) -> Grammar:
    return Grammar(text, TOKENS, TREE)


def takes(grammar: Grammar, text: str | bytes) -> str:
    """``no``; ``more``: it must go on; ``done``: it may end here."""
    follower = Follower(grammar)
    for byte in text.encode() if isinstance(text, str) else text:
        if not follower.accepts(byte):
            return "no"
    return "done" if follower.accepts(END) else "more"


def refused(text: str) -> str:
    with pytest.raises(RequestError) as caught:
        grammar_of(text)
    assert (caught.value.code, caught.value.param) == ("invalid_request", "grammar")
    return caught.value.detail


class TestCharacters:
    @given(
        st.lists(
            st.tuples(st.integers(0, MAX_CHARACTER), st.integers(0, 3000)).map(
                lambda one: (one[0], min(sum(one), MAX_CHARACTER))
            ),
            min_size=1,
            max_size=3,
        )
    )
    def test_sequences_are_the_utf_8_of_the_characters(self, ranges: list[tuple[int, int]]) -> None:
        characters = {char for low, high in ranges for char in range(low, high + 1) if not 0xD800 <= char <= 0xDFFF}
        encoded = [
            bytes(one)
            for parts in byte_sequences(merged(ranges))
            for one in itertools.product(*(range(low, high + 1) for low, high in parts))
        ]
        assert sorted(encoded) == sorted(chr(char).encode() for char in characters)

    @given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 90)), max_size=4))
    def test_a_complement_is_all_the_others(self, found: list[tuple[int, int]]) -> None:
        ranges = [(low, low + more) for low, more in found]
        inside = {char for low, high in ranges for char in range(low, high + 1)}
        outside = {char for low, high in complement(ranges) for char in range(low, min(high, 500) + 1)}
        assert outside == set(range(1, 501)) - inside

    def test_all_characters_are_nine_sequences(self) -> None:
        assert len(byte_sequences(merged([(0, MAX_CHARACTER)]))) == 9


class TestReading:
    @pytest.mark.parametrize(
        ("grammar", "done", "wrong"),
        [
            ('root ::= "yes" | "no"', ["yes", "no"], ["y", "yesno", "nope", ""]),
            ('root ::= "a"* "b"+ "c"?', ["b", "aab", "bbc"], ["a", "acb", "bcc"]),
            ('root ::= ("ab" | "c"){2,3}', ["abab", "cc", "cabc"], ["ab", "cccc", "aba"]),
            ('root ::= "ab"{2}', ["abab"], ["ab", "abb", "ababab"]),
            ('root ::= "a"{2,}', ["aa", "aaaaa"], ["a", ""]),
            ('root ::= "x" "a"{ 0 , 2 } "y"{0}', ["x", "xa", "xaa"], ["xaaa", "xy"]),
            ('root ::= [a-c_-] [^a-c"]', ["ad", "_ö", "-🦊", "b\n"], ["da", "aa", 'a"']),
            ("root ::= [\\]\\[\\-\\\\]+", ["]", "[-\\"], ["a"]),
            ('root ::= "\\x41\\u00f6\\U0001F98A\\t\\n\\r\\"\\\\"', ['Aö🦊\t\n\r"\\'], ["A"]),
            ("root ::= .", ["a", "\n", "東", "🦊"], ["", "ab"]),
            (
                'root ::= a\na ::= "1" b |\n  "2" # remark\n\n# more\nb ::= (\n "3"\n|\n"4" )\r\n',
                ["13", "14", "2"],
                ["1"],
            ),
            ('root ::= ""', [""], ["a"]),
            ('root ::= "(" root ")" | "x"', ["x", "((x))"], ["(x", "x)", "()"]),
            ('root ::= e e "a" e\ne ::= | "b"', ["a", "bba", "ab"], ["bbba", "b"]),
            ('root ::= "one"\nroot ::= "two"', ["two"], ["one"]),
            # The rule y has the number 2, and the byte 1 is the bit 2.
            ('x ::= "z"\nroot ::= "\\x01" "a" | y "b"\ny ::= "c"', ["\1a", "cb"], ["\1b", "ca"]),
        ],
    )
    def test_notation(self, grammar: str, done: list[str], wrong: list[str]) -> None:
        made = grammar_of(grammar)
        assert [takes(made, text) for text in done] == ["done"] * len(done)
        assert all(takes(made, text) != "done" for text in wrong)

    @pytest.mark.parametrize(
        ("grammar", "words"),
        [
            ("", "no rule named root"),
            ('yes ::= "a"', "no rule named root"),
            ("root ::= other", "other is used and nowhere defined"),
            ('root := "a"', "line 1, column 6, before ':= \"a\"': expected '::='"),
            ('root ::= "a"\n\nnext ::= "b', "line 3, column 12, at its end: expected '\"'"),
            ('root ::= "a"\n| "b"', "line 2, column 1"),
            ("root ::= [a-", "expected a character"),
            ("root ::= [z-a]", "from the lower character to the higher"),
            ("root ::= []", "a class of no characters"),
            ("root ::= [^]", "a class of no characters"),
            ("root ::= [\\ud800-\\udfff]", "a class of no characters"),
            ('root ::= "\\ud800"', "surrogate"),
            ('root ::= "\\q"', "no such escape"),
            ('root ::= "\\x4"', "2 hexadecimal digits"),
            ('root ::= "\\U00110000"', "U\\+10FFFF"),
            ("root ::= *", "nothing stands before a repetition"),
            ('root ::= "a" | ?', "nothing stands before a repetition"),
            ('root ::= "a"{3,2}', "at least 3 and at most 2"),
            ('root ::= "a"{,2}', "expected a number"),
            ('root ::= "a"{2', "expected '}'"),
            ('root ::= ("a"', "expected '\\)'"),
            ('root ::= "a")', "or the line's end"),
            ("root ::= <think", "expected '>'"),
            ("root ::= <nothing>", "no single token"),
            (f"root ::= <[{len(PIECES)}]>", f"tokens 0 to {len(PIECES) - 1}"),
            ("root ::= !think", "expected '<'"),
            ("root ::= my_rule", "or the line's end"),
            ('root ::= "a"\0', "or the line's end"),
        ],
    )
    def test_what_is_wrong_is_told_with_its_place(self, grammar: str, words: str) -> None:
        assert re.search(words, refused(grammar))

    @pytest.mark.parametrize(
        "grammar",
        [
            'root ::= root "a" | "a"',
            'root ::= a\na ::= b "x"\nb ::= a | "y"',
            'root ::= e root "a" | "a"\ne ::= "b"?',
            'root ::= ("a"?)*',
            'root ::= "x" (("a" | "b"*) ""){2,}',
        ],
    )
    def test_left_recursion_in_every_disguise(self, grammar: str) -> None:
        assert "left recursion" in refused(grammar)

    def test_what_was_visited_twice_is_no_recursion(self) -> None:
        assert takes(grammar_of('root ::= b | a\na ::= b "x" b\nb ::= "y"'), "yxy") == "done"

    @pytest.mark.parametrize(
        ("grammar", "words"),
        [
            ("root ::= " + "(" * 60_000, f"more than {MAX_NESTING} deep"),
            ('root ::= "a"{100000}', "a repetition of 100000"),
            (f'root ::= "a"{{{"9" * 60_000}}}', "a repetition of 9999"),
            ('root ::= "abc"{40000} "abc"{40000}', f"more than {MAX_SYMBOLS} symbols"),
            ('root ::= ("a"{1,20000} | "b"){1,20000}', f"more than {MAX_SYMBOLS} symbols"),
            (
                "root ::= " + " | ".join(f"[^{chr(0x400 + at)}]" for at in range(5000)),
                f"more than {MAX_SYMBOLS} symbols",
            ),
        ],
    )
    def test_what_would_take_too_much_is_refused_at_once(self, grammar: str, words: str) -> None:
        assert words in refused(grammar)

    def test_parentheses_may_be_as_deep_as_the_bound(self) -> None:
        deep = f'root ::= {"(" * MAX_NESTING}"a"{")" * MAX_NESTING} ("b")'
        assert takes(grammar_of(deep), "ab") == "done"


# A regular expression over a and b, and the same in GBNF.
EXPRESSIONS = st.recursive(
    st.sampled_from([("a", '"a"'), ("b", '"b"'), ("[ab]", "[ab]"), ("ab", '"ab"'), ("[^a]", "[^ac-\\U0010FFFF]")]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda two: (two[0][0] + two[1][0], f"{two[0][1]} {two[1][1]}")),
        st.tuples(inner, inner).map(lambda two: (f"(?:{two[0][0]}|{two[1][0]})", f"({two[0][1]} | {two[1][1]})")),
        inner.map(lambda one: (f"(?:{one[0]})?", f"({one[1]})?")),
        inner.map(lambda one: (f"(?:{one[0]}){{1,3}}", f"({one[1]}){{1,3}}")),
        inner.map(lambda one: (f"(?:b{one[0]})*", f'("b" {one[1]})*')),
    ),
    max_leaves=8,
)
SHORT = ["".join(one) for count in range(6) for one in itertools.product("ab", repeat=count)]


SYMBOLS = {"a": "a", "b": '"b"', "<": "<think>"}
NAMES = st.lists(st.text("ab<", max_size=4), min_size=1, max_size=8)


class TestFollowing:
    @given(EXPRESSIONS)
    def test_it_takes_what_the_same_regular_expression_takes(self, pair: tuple[str, str]) -> None:
        expression, grammar = re.compile(pair[0]), grammar_of(f"root ::= {pair[1]}")
        for text in SHORT:
            assert (takes(grammar, text) == "done") == (expression.fullmatch(text) is not None), text

    @given(NAMES)
    def test_one_of_several_names_whatever_they_begin_with(self, names: list[str]) -> None:
        """Of rules, bytes and tokens: the three kinds of symbols."""
        made = grammar_of(
            'a ::= "a"\nroot ::= ' + " | ".join(" ".join(SYMBOLS[char] for char in name) for name in names)
        )
        for text in {*names, *SHORT}:
            follower = Follower(made)
            is_taken = all(follower.accepts(THINK if char == "<" else ord(char)) for char in text)
            assert (is_taken and follower.accepts(END)) == (text in names), text

    @pytest.mark.parametrize("grammar", [JSON, 'root ::= ("yes" | "no" .)* <think> !<think> [^"]+', "root ::= .*"])
    @pytest.mark.parametrize("seed", range(4))
    def test_the_tokens_allowed_are_those_accepted(self, grammar: str, seed: int) -> None:
        chance = np.random.default_rng(seed)
        made = grammar_of(grammar)
        accepted: list[int] = []
        for _ in range(12):
            allowed = Follower(made, accepted).allowed()
            one_by_one = [Follower(made, accepted).accepts(token) for token in range(len(PIECES))]
            assert allowed.tolist() == one_by_one, accepted
            going_on = [token for token in np.flatnonzero(allowed).tolist() if token not in TOKENS.ends]
            if not going_on:
                break
            accepted.append(int(chance.choice(going_on)))

    def test_json_and_nothing_else(self) -> None:
        made = grammar_of(JSON)
        text = '{"name": "Köln 東京 🦊", "list": [1, -2.5e3, {"a": null}], "s": "\\n\\u00e9"}'
        assert takes(made, text) == "done"
        assert {takes(made, text[:cut]) for cut in range(len(text))} == {"more"}
        assert takes(made, '{"a": 01}') == takes(made, '{"a" "b"}') == takes(made, '{"a": "\n"}') == "no"

    def test_characters_cut_by_tokens(self) -> None:
        made = grammar_of('root ::= "東" | "ö"')
        follower = Follower(made)
        assert set(np.flatnonzero(follower.allowed())) == {
            0xE6,
            0xC3,
            PIECES.index(b"\xe6\x9d"),
            PIECES.index("ö".encode()),
        }
        assert follower.accepts(PIECES.index(b"\xe6\x9d")) and not follower.accepts(0xB2) and not follower.accepts(END)
        assert follower.accepts(0xB1) and follower.accepts(END)

    def test_a_complete_answer_has_nothing_but_its_end(self) -> None:
        follower = Follower(grammar_of('root ::= "yes"'))
        assert follower.accepts(PIECES.index(b"yes"))
        for _ in range(2):
            assert np.flatnonzero(follower.allowed()).tolist() == [END, OTHER_END]
            assert follower.accepts(OTHER_END) and not follower.accepts(ord("y"))

    def test_tokens_by_name(self) -> None:
        made = grammar_of('root ::= <think> (!<[97]> | "ab" "c") "!"')
        assert np.flatnonzero(Follower(made).allowed()).tolist() == [THINK]
        allowed = Follower(made, [THINK]).allowed()
        # by its letters 97 may begin "ab" although it isn't the token that is wanted here
        assert np.flatnonzero(~allowed).tolist() == [END, OTHER_END]
        assert not Follower(made, [THINK, 97]).accepts(ord("!"))
        assert Follower(made, [THINK, ord("b")]).accepts(ord("!"))
        assert Follower(made, [THINK, PIECES.index(b"abc")]).accepts(ord("!"))
        assert Follower(made, [THINK, THINK]).accepts(ord("!"))

    def test_an_answer_of_another_grammar_is_not_gone_on_with(self) -> None:
        with pytest.raises(RequestError, match=r"token 1 of the answer .* 98,") as caught:
            Follower(grammar_of('root ::= "a" "c"'), [ord("a"), ord("b")])
        assert caught.value.param == "grammar"


AMBIGUOUS = (
    "root ::= a0\n" + "".join(f"a{at} ::= a{at + 1} a{at + 1} | a{at + 1}\n" for at in range(40)) + 'a40 ::= "a"'
)


class TestBounds:
    def test_ambiguity_does_not_double(self) -> None:
        """2**40 ways to read the first one, and as many as there are binary trees to read the second."""
        assert takes(grammar_of(AMBIGUOUS), "a" * 50) == "done"
        assert takes(grammar_of('root ::= s\ns ::= "a" | "a" s s'), "a" * 51) == "done"

    def test_a_thousand_names_that_begin_alike_are_little_work(self) -> None:
        names = [f"src/skulk/engines/grammar/{at}.py" for at in range(1000)]
        made = grammar_of("root ::= (" + " | ".join(f'"{name}"' for name in names) + ")+")
        for cut in (0, 5, 24, 26):
            allowed = Follower(made, names[321][:cut].encode()).allowed()
            assert allowed[ord(names[321][cut])] and not allowed[ord("x")]
        assert made.automaton._ways < 10_000

    @pytest.mark.parametrize("grammar", ['root ::= ("a"?){0,16000}', 'root ::= "a" ("b"? "a"?){0,12000}'])
    def test_too_much_work_is_refused(self, grammar: str) -> None:
        with pytest.raises(RequestError, match="too many ways"):
            follower = Follower(grammar_of(grammar))
            for _ in range(2000):
                assert follower.accepts(ord("a"))
                assert follower.allowed()[ord("a")]

    def test_what_an_answer_stands_on_is_bounded(self) -> None:
        """Each parenthesis leaves 2,000 ways open for its end."""
        made = grammar_of('root ::= (a?){0,2000}\na ::= "(" root ")"')
        follower = Follower(made)
        with pytest.raises(RequestError, match="too many ways"):
            for _ in range(1000):
                assert follower.accepts(ord("("))
        assert made.automaton._ways < automaton_module.MAX_CARRIED + 2 * automaton_module.MAX_WAYS

    def test_following_an_answer_again_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = grammar_of('root ::= ("a"? "b"?){0,500}')
        text = [ord("a")] * 50
        Follower(made, text)
        monkeypatch.setattr("skulk.engines.grammar.constraint.MAX_REPLAY", 1000)
        with pytest.raises(RequestError, match="too many ways"):
            Follower(grammar_of('root ::= ("a"? "b"?){0,500}'), text)

    def test_a_long_answer_begins_new_automata_and_goes_on_as_it_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = grammar_of('root ::= "(" root ")" | "[" root "]" | "x"')
        text = b"([" * 2000 + b"x" + b"])" * 2000
        whole, automata = Follower(made), set[int]()
        first = made.automaton
        monkeypatch.setattr(automaton_module, "MAX_STATES", 100)
        for byte in text:
            assert whole.accepts(byte)
            automata.add(id(made.automaton))
        assert made.automaton is not first and len(automata) > 2
        assert whole.accepts(END) and not whole.accepts(ord(")"))

    def test_one_that_waited_goes_on_in_the_new_automaton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made = grammar_of('root ::= "(" root ")" | "x"')
        waited, other = Follower(made, b"((("), Follower(made)
        monkeypatch.setattr(automaton_module, "MAX_STATES", 20)
        assert all(other.accepts(byte) for byte in b"(" * 200)
        assert [waited.accepts(byte) for byte in b"x))))"] == [True, True, True, True, False]
        assert np.flatnonzero(waited.allowed()).tolist() == [END, OTHER_END]

    def test_states_are_few_where_an_answer_goes_in_circles(self) -> None:
        made = grammar_of(JSON)
        text = b'{"a": [' + b'{"b": "some text", "c": [1, 2, 3]}, ' * 500 + b"1]}"
        assert takes(made, text) == "done"
        assert len(made.automaton._states) < 300 < MAX_STATES

    def test_masks_are_remembered(self) -> None:
        made = grammar_of(JSON)
        follower = Follower(made, b'{"')
        first = follower.allowed()
        states = len(made.automaton._states)
        assert (Follower(made, b'{"abc').allowed() == first).all()
        for depth in range(50):
            Follower(made, b'{"a": ' + b"[" * depth).allowed()
        assert len(made._masks) == 32 and len(made.automaton._states) > states
        assert (follower.allowed() == first).all()


def test_grammars_are_read_once_and_few_are_kept() -> None:
    calls: list[int] = []

    def tokens() -> Tokens:
        calls.append(1)
        return TOKENS

    kept = Grammars(tokens)
    first = kept.get(JSON)
    assert kept.get(JSON) is first and len(calls) == 1
    with pytest.raises(RequestError):
        kept.get("rot")
    others = [kept.get(f'root ::= "{at}"') for at in range(4)]
    assert kept.get('root ::= "3"') is others[3]
    assert kept.get(JSON) is not first and len(calls) == 1


def test_of_a_thousand_grammars_four_stay() -> None:
    kept, alive = Grammars(lambda: TOKENS), weakref.WeakSet[Grammar]()
    followers: list[Follower] = []
    for at in range(1000):
        made = kept.get(f'root ::= "{at}"')
        alive.add(made)
        followers = [*followers[-2:], Follower(made)]
    followers.clear()
    gc.collect()
    assert len(alive) == 4


def test_grammars_are_asked_for_by_several_threads() -> None:
    kept, found = Grammars(lambda: TOKENS), list[Grammar]()
    threads = [threading.Thread(target=lambda: found.append(kept.get(JSON))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, found))) == 1


def test_a_state_is_the_same_in_another_automaton() -> None:
    program = Program(read_grammar(JSON, NAMED.get, len(PIECES)))
    first, second = Automaton(program), Automaton(program)

    def after(automaton: Automaton, state: int, text: Sequence[int]) -> int:
        for byte in text:
            state = automaton.step(state, byte)
        return state

    beginning = b'{"a": [{"b": [1, '
    adopted = second.adopt(first, after(first, first.start, beginning))
    assert adopted == after(second, second.start, beginning)
