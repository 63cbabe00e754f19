"""The whole control plane through every fault that the simulation knows, on a clock of its own.

A failure names its seed: ``python tools/simulate.py --seed N --story`` is the same run again, told event by event.
"""

from __future__ import annotations

import pytest

from tests.support.simulated_faults import run

SEEDS = 160
TOGETHER = 10


@pytest.mark.parametrize("first", range(0, SEEDS, TOGETHER))
def test_the_cluster_comes_together_and_loses_nothing(first: int) -> None:
    for seed in range(first, first + TOGETHER):
        try:
            run(seed)
        except BaseException as error:
            error.add_note(f"seed {seed}; again: python tools/simulate.py --seed {seed} --story")
            raise
