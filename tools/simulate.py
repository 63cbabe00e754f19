"""Simulates the control plane through seeded faults, far more often than the test suite has time for.

tools/simulate.py --seeds 20000            on all cores; prints each seed that fails
tools/simulate.py --seed 4711 --story      that very run again, told event by event
tools/simulate.py --mutants                switches each rule off; every one must make some seed fail
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHUNK = 20
MUTANT_SEEDS = 200

sys.path.insert(0, str(ROOT))

from tests.support.simulated_faults import run  # noqa: E402 - the tests' package lies beside this folder
from tests.support.simulated_mutants import MUTANTS, Mutant  # noqa: E402
from tests.support.simulated_story import told  # noqa: E402
from tests.support.simulated_streams import run_streams  # noqa: E402

# each seed tells one of each
STORIES = {"cluster": run, "streams": run_streams}


def main(arguments: list[str]) -> int:
    """Runs what was asked for; 0 when every seed held, or every mutant was found."""
    parser = argparse.ArgumentParser(
        prog="tools/simulate.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2000, help="how many seeds (default: 2000)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default: 0)")
    parser.add_argument("--seed", type=int, help="one seed only")
    parser.add_argument("--story", action="store_true", help="with --seed: tell what happens")
    parser.add_argument("--mutants", nargs="*", metavar="NAME", help="switch rules off, these or all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    flags = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    if flags.mutants is not None:
        return run_mutants(flags.mutants, flags.jobs)
    if flags.seed is not None:
        return run_one(flags.seed, story=flags.story)
    return run_seeds(range(flags.first, flags.first + flags.seeds), flags.jobs)


def failure_of(seed: int, run: Callable[[int], None]) -> str:
    """What a seed's run fails with; empty where it holds."""
    try:
        run(seed)
    except Exception as error:  # noqa: BLE001 - whatever it is, the seed names it
        return f"{type(error).__name__}: {error}"
    return ""


def run_one(seed: int, *, story: bool) -> int:
    """One seed, with its story or only its failure."""
    try:
        with told(print if story else None):
            for run in STORIES.values():
                run(seed)
    except Exception:  # noqa: BLE001
        traceback.print_exc()
        return 1
    print(f"seed {seed} holds")
    return 0


def run_seeds(seeds: range, jobs: int) -> int:
    """Many seeds; prints the failing ones and a sum."""
    began, failed = time.monotonic(), 0
    chunks = [seeds[at : at + CHUNK] for at in range(0, len(seeds), CHUNK)]
    with multiprocessing.Pool(jobs, initializer=logging.disable, initargs=(logging.CRITICAL,)) as pool:
        for found in pool.imap_unordered(_failures, chunks):
            for seed, why in found:
                failed += 1
                print(f"seed {seed}: {why}", flush=True)
    print(f"{len(seeds)} seeds, {failed} failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def _failures(seeds: range) -> list[tuple[int, str]]:
    return [
        (seed, f"{name}: {why}") for seed in seeds for name, run in STORIES.items() if (why := failure_of(seed, run))
    ]


def run_mutants(names: list[str], jobs: int) -> int:
    """Each mutant until a seed fails; prints which seed found it."""
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    survived: list[str] = []
    with multiprocessing.Pool(jobs, initializer=logging.disable, initargs=(logging.CRITICAL,)) as pool:
        for line in pool.imap(_hunt, chosen):
            print(line, flush=True)
            if " survived " in line:
                survived.append(line)
    print(f"{len(chosen)} rules switched off, {len(chosen) - len(survived)} found, {len(survived)} not")
    return 1 if survived or not chosen else 0


def _hunt(mutant: Mutant) -> str:
    with mutant.applied():
        for seed, why in _first_failures(mutant):
            return f"{mutant.name:18} seed {seed:4}  {why[:110]}"
    return f"{mutant.name:18} survived {MUTANT_SEEDS} seeds: {mutant.rule}"


def _first_failures(mutant: Mutant) -> Iterator[tuple[int, str]]:
    for seed in range(mutant.first, mutant.first + MUTANT_SEEDS):
        if why := failure_of(seed, mutant.run):
            yield seed, why


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
