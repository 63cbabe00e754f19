"""Sixteen streams at once, compared with the same sixteen alone."""

from __future__ import annotations

from typing import Final

from skulk.engines.llama_cpp.engine import LlamaCppEngine
from tests.support.engine_play import EnginePlay, asked, assert_alike, play_alone
from tests.support.real_models import story

STREAMS: Final = 16
WINDOW: Final = 256
CELLS: Final = {"streams": STREAMS * WINDOW, "unified": STREAMS * WINDOW // 2}


def compare_streams(
    engine: LlamaCppEngine, *, shortest: int, max_tokens: int, close: float = float("inf"), gap: float = 0.0
) -> None:
    """Prompts of as many lengths, from ``shortest`` tokens on, no two of them alike; see `assert_alike`."""
    words = story(engine.tokens_of)
    requests = [asked(str(at), words[31 * at : 32 * at + shortest], max_tokens) for at in range(STREAMS)]
    assert len({one.prompt[0] for one in requests}) > 1
    played = EnginePlay(engine).add(*requests)
    played.runs = True
    most = 0
    while not played.state.is_idle:
        played.step()
        most = max(most, sum(seq.is_decoding for seq in played.state.running))
    assert most == STREAMS, "they were all drawn from in one step"
    assert_alike(played, play_alone(engine, *requests), close=close, gap=gap)
