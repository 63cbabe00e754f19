"""What is reused, played on any engine: each case asserts what was taken over, and that the answers are those alone.

The engine has four slots and windows of 256 tokens, in streams or with 512 cells for all.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Final

from skulk.batching.operations import Forget, Keep, Move, Park, Restore, Share
from skulk.batching.requests import BatchRequest
from skulk.engines.llama_cpp.engine import LlamaCppEngine
from tests.support.engine_play import PARK_BYTES, EnginePlay, asked, assert_alike, play_alone

SLOTS: Final = 4
WINDOW: Final = 256
CELLS: Final = {"streams": SLOTS * WINDOW, "unified": 2 * WINDOW}
LAYOUTS: Final = tuple(CELLS)
SETTINGS: Final[dict[str, Any]] = {"n_parallel": SLOTS, "context_length": WINDOW}
EXACT: Final[dict[str, Any]] = {"kv_type": "f32", "flash_attention": "off"}
"""With F32 weights, nothing is rounded by the shape of a batch."""


class Cases:
    """One engine, what to say to it, and how much its answers may differ (see `assert_alike`)."""

    def __init__(self, engine: LlamaCppEngine, words: Sequence[int], *, close: float, gap: float = 0.0) -> None:
        info = engine.info
        assert (info.n_parallel, info.n_ctx, info.kv_cells) == (
            SLOTS,
            WINDOW,
            CELLS["unified" if info.is_unified else "streams"],
        )
        self.engine = engine
        self.words = tuple(words)
        self.is_cut = info.reuse == "cut"
        self._rule = {"close": close, "gap": gap}

    def text(self, start: int, count: int) -> tuple[int, ...]:
        """Tokens that no other start begins with."""
        distinct = sorted(set(self.words))
        place = start * 37 % len(self.words)
        turned = self.words[place:] + self.words[:place]
        return (distinct[start % len(distinct)], *turned)[:count]

    def compare(self, played: EnginePlay, *requests: BatchRequest) -> None:
        alone = play_alone(self.engine, *requests)
        assert_alike(played, alone, **self._rule)

    # The cases

    def next_turn(self) -> None:
        """A conversation goes on from its own cells."""
        first = asked("first", self.text(1, 90), 8)
        played = EnginePlay(self.engine).add(first).play()
        turn = asked("second", (*first.prompt, *played.tokens("first"), *self.text(2, 30)), 8)
        before = played.computed
        played.add(turn).play()
        assert (played.cached("first"), played.cached("second")) == (0, 97), "the last drawn token was never computed"
        assert played.computed - before == len(turn.prompt) - 97 + 7
        self.compare(played, first, turn)

    def same_beginning(self) -> None:
        """Another request begins as one before did, up to the border of its last turn."""
        system = self.text(3, 100)
        first = asked("first", (*system, *self.text(4, 20)), border=100)
        second = asked("second", (*system, *self.text(5, 25)), border=100)
        played = EnginePlay(self.engine).add(first).play().add(second).play()
        assert played.cached("second") == 100
        self.compare(played, first, second)

    def part_of_a_beginning(self) -> None:
        """A request wants less than what is there: cut off, or shared where it can be, or computed again."""
        first = asked("first", self.text(6, 190), 2)
        half = asked("half", (*first.prompt[:80], *self.text(7, 9)))
        most = asked("most", (*first.prompt[:180], *self.text(8, 9)))
        played = EnginePlay(self.engine).add(first).play().add(half).play().add(most).play()
        assert [played.cached(name) for name in ("half", "most")] == ([80, 180] if self.is_cut else [0, 0])
        if self.is_cut:
            in_place = [one for one in played.operations if isinstance(one, Keep) and one.count == 180]
            assert (played.count(Share), len(in_place)) == ((2, 0) if self.engine.info.is_unified else (1, 1))
        self.compare(played, first, half, most)

    def concurrent(self) -> None:
        """Requests that come together share a prefill that nobody asked for before."""
        system = self.text(9, 110)
        requests = [asked(name, (*system, *self.text(10 + at, 9 + at)), 5) for at, name in enumerate("abcd")]
        played = EnginePlay(self.engine).add(*requests).play()
        assert [played.cached(name) for name in "abcd"] == [0, 110, 110, 110]
        if self.is_cut:
            assert played.computed == 110 + sum(len(one.prompt) - 110 + 4 for one in requests)
        self.compare(played, *requests)

    def choices(self) -> None:
        """The prompt of several choices is computed once, but for its last token; a short one too."""
        for name, length in (("short", 11), ("long", 70)):
            request = asked(name, self.text(15 + length, length), 5, n=3)
            played = EnginePlay(self.engine).add(request).play()
            assert played.computed == length + 2 + 3 * 4
            assert played.cached(name) == 0
            self.compare(played, request)

    def parked(self) -> None:
        """What has to leave its slot waits in host memory and comes back."""
        said = [asked(str(at), self.text(20 + at, 66), 3) for at in range(SLOTS + 1)]
        played = EnginePlay(self.engine)
        for request in said:
            played.add(request).play()
        turn = asked("turn", (*said[0].prompt, *played.tokens("0"), *self.text(30, 5)))
        played.add(turn).play()
        assert [one.slot for one in played.operations if isinstance(one, Park)][:1] == [0]
        assert played.count(Restore) == 1
        assert played.cached("turn") == 68
        self.compare(played, *said, turn)

    def moved(self) -> None:
        """Streams that end leave holes, and the last ones move into them."""
        lengths = {"a": 16, "b": 4, "c": 16, "d": 5}
        requests = [asked(name, self.text(40 + at, 20), lengths[name]) for at, name in enumerate(lengths)]
        played = EnginePlay(self.engine).add(*requests).play()
        moves = [(one.source, one.slot) for one in played.operations if isinstance(one, Move)]
        assert moves == [(3, 1), (2, 1)]
        self.compare(played, *requests)

    def preempted(self) -> None:
        """Where cells run out the newest yields, and goes on from host memory."""
        played = self._beyond_the_cells(PARK_BYTES)
        parks = [one.parked for one in played.operations if isinstance(one, Park)]
        restores = [one.parked for one in played.operations if isinstance(one, Restore)]
        assert restores == parks[:1], "what else was parked are cells of those that had ended"
        assert played.computed == 3 * (105 + 71), "nothing was computed again"

    def recomputed(self) -> None:
        """Without host memory it is computed again."""
        played = self._beyond_the_cells(0)
        assert played.count(Park) == played.count(Restore) == 0
        assert played.computed > 3 * (105 + 71) + 105

    def _beyond_the_cells(self, park_bytes: int) -> EnginePlay:
        requests = self._too_many()
        played = EnginePlay(self.engine, park_bytes=park_bytes).add(*requests).play()
        assert [played.reason(name) for name in "abc"] == ["length"] * 3
        assert [played.cached(name) for name in "abc"] == [0, 0, 0]
        assert played.most_cells >= self.engine.info.kv_cells - len(requests), "all cells were in use"
        self.compare(played, *requests)
        return played

    def _too_many(self) -> list[BatchRequest]:
        """Three that may begin side by side, and whose last tokens find no cells."""
        return [asked(name, self.text(50 + at, 105), 72) for at, name in enumerate("abc")]

    def cancelled(self) -> None:
        """A cancel takes effect at once, wherever its request is, and its cells are free or of use to others."""
        queued, decoding = asked("queued", self.text(60, 70)), asked("decoding", self.text(61, 70), 50)
        filling, others = asked("filling", self.text(62, 150)), [asked(name, self.text(63, 9), 60) for name in "xy"]
        played = EnginePlay(self.engine).add(decoding, *others)
        while not played.tokens("decoding"):
            played.step()
        played.add(filling, queued)
        played.step()
        phases = {seq.request.key.request_id: seq.phase for seq in (*played.state.running, *played.state.waiting)}
        assert phases == {"queued": "queued", "filling": "prefill", "decoding": "decode", "x": "decode", "y": "decode"}
        computed: dict[str, int] = {}
        for name in ("queued", "filling", "decoding", "x", "y"):
            drawn = len(played.tokens(name))
            computed |= {seq.request.key.request_id: seq.computed for seq in played.state.running}
            played.end(name)
            assert played.reason(name) == "cancelled"
            if not played.state.is_idle:
                played.step()
            assert len(played.tokens(name)) == drawn
        assert played.state.is_idle
        assert {len(idle.tokens) for idle in played.state.idle} == {computed["filling"], computed["decoding"]}
        again = [asked("again", filling.prompt), asked("more", (*decoding.prompt, *played.tokens("decoding")), 5)]
        played.add(*again).play()
        assert [played.cached(one.key.request_id) for one in again] == [computed["filling"], computed["decoding"]]
        for name in ("queued", "filling", "decoding", "x", "y"):
            played.drawn.pop((name, 0), None)
        self.compare(played, *again)

    def cancelled_aside(self) -> None:
        """One that yielded is cancelled while it waits: what was parked of it is gone."""
        played = EnginePlay(self.engine).add(*self._too_many())
        while not any(seq.parked for seq in played.state.waiting):
            played.step()
        played.end("c")
        assert played.reason("c") == "cancelled"
        assert isinstance(played.operations[-1], Forget)
        assert (played.state.parked, self.engine._aside) == ((), {})
        played.end("a")
        played.end("b")

    def at_random(self, seed: int) -> None:
        """Arrivals, cancels, beginnings in common, little or no host memory: whoever ends says what it says alone."""
        draw = random.Random(seed)
        play = EnginePlay(self.engine, park_bytes=draw.choice((0, self._bytes_of(200), PARK_BYTES)))
        play.idle_limit = draw.choice((None, 0, 150))
        play.runs = draw.choice((False, True))
        requests = {name: self._any_request(draw, name) for name in "abcdefgh"}
        comes = {name: draw.randrange(40) for name in requests}
        goes = {name: comes[name] + draw.randrange(40) for name in draw.sample(sorted(requests), 2)}
        for step in range(80):
            play.add(*(requests[name] for name in requests if comes[name] == step))
            for name, at in goes.items():
                if at == step:
                    play.end(name)
            if not play.state.is_idle:
                play.step()
        play.play()
        for name, request in requests.items():
            assert play.reason(name) in ("length", "cancelled") and (name in goes or play.reason(name) == "length")
            assert play.cached(name) < len(request.prompt)
        alone = play_alone(self.engine, *requests.values())
        cut_short = {key: alone.drawn[key][: len(drawn)] for key, drawn in play.drawn.items()}
        missing = {key[0] for key in alone.drawn.keys() - play.drawn.keys()}
        assert missing <= set(goes)
        alone.drawn = cut_short
        assert_alike(play, alone, **self._rule)

    def _any_request(self, draw: random.Random, name: str) -> BatchRequest:
        shared = draw.choice((0, 70, 100, 130))
        own = self.text(100 + ord(name), draw.randint(1, 60))
        return asked(
            name,
            (*self.text(90 + draw.randrange(2), shared), *own),
            draw.randint(1, 256 - shared - len(own) if draw.random() < 0.2 else 30),
            n=draw.choice((1, 1, 3)),
            border=draw.choice((0, shared)),
        )

    def _bytes_of(self, tokens: int) -> int:
        return self.engine.info.state_bytes + tokens * self.engine.info.token_bytes


def case_names(*, layout: str) -> tuple[str, ...]:
    """The cases that make sense in a layout."""
    both = ("next_turn", "same_beginning", "part_of_a_beginning", "concurrent", "choices", "parked", "cancelled")
    return (*both, "moved") if layout == "streams" else (*both, "preempted", "recomputed", "cancelled_aside")


ALL_CASES: Final = tuple((layout, name) for layout in LAYOUTS for name in case_names(layout=layout))


def run_case(cases: Cases, name: str) -> None:
    play: Any = getattr(cases, name)
    play()
