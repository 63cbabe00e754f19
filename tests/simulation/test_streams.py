"""Streams through lost messages, runners and gateways, on a clock of their own (DESIGN 6).

A failure names its seed: ``python tools/simulate.py --seed N --story`` is the same run again, told event by event.
"""

from __future__ import annotations

import pytest

from tests.support.simulated_streams import run_streams

SEEDS = 60
TOGETHER = 10


@pytest.mark.parametrize("first", range(0, SEEDS, TOGETHER))
def test_every_answer_comes_once_and_in_order_whoever_is_lost(first: int) -> None:
    for seed in range(first, first + TOGETHER):
        try:
            run_streams(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}; again: python tools/simulate.py --seed {seed} --story")
            raise
