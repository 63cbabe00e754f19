"""Feeds the reader of GGUF headers with hostile files made by hypothesis, and says what it withstood.

The short form runs with the unit tests; this one takes minutes.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Final

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.support.hostile_gguf import check, random_script  # noqa: E402

SIZES: Final = (0, 0, 0, 0, 0, 0, 0, 2**20, 2**40)
BATCH: Final = 20


def main(arguments: list[str]) -> int:
    """Runs until so many inputs went through, or one broke the reader: then its script is printed."""
    parser = argparse.ArgumentParser(prog="tools/fuzz_gguf.py", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="how many (default: 100,000)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of chance (default: the time)")
    flags = parser.parse_args(arguments)
    counts = {"inputs": 0, "taken": 0}

    @seed(flags.seed)
    @settings(
        max_examples=-(-flags.inputs // BATCH),
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.large_base_example),
    )
    @given(chance=st.integers(0, 2**63))
    def fuzz(chance: int) -> None:
        # hypothesis is slower than the reader: it gives the beginning, and many files follow from that
        dice = random.Random(chance)
        for _ in range(BATCH):
            script, claimed_bytes = random_script(dice), dice.choice(SIZES)
            counts["inputs"] += 1
            try:
                counts["taken"] += check(script, claimed_bytes)
            except BaseException as error:
                raise AssertionError(f"check({script!r}, {claimed_bytes})") from error

    print(f"seed {flags.seed}", flush=True)
    began = time.monotonic()
    fuzz()
    elapsed = time.monotonic() - began
    refused = counts["inputs"] - counts["taken"]
    print(
        f"{counts['inputs']:,} inputs in {elapsed:.0f} s: {refused:,} refused, {counts['taken']:,} taken, none broke it"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
