"""Runs the test suites one after another, each within its share of the time, and prints what each of them took.

The shares add up to less than 15 minutes on two cores, and two tests of a suite run at a time, each in a worker of its
own (pytest-xdist). A suite that runs past its share is stopped and has failed; while coverage is measured it may take
twice its share.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET  # reads only what pytest wrote a moment ago
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build" / "reports"
SHARES_S = {"tidy": 30, "unit": 60, "contract": 60, "integration": 300, "simulation": 180, "fault": 240}
COVERAGE_SLOWER = 2
# The shares are for two cores. More workers would only make the tests that start whole nodes wait for each other.
WORKERS = 2
# Too short to gain by it: a worker takes a second to start, and each collects all the tests.
ALONE = frozenset({"tidy"})
STOP_GRACE_S = 10


class Result(NamedTuple):
    """What one suite did; `note` says in a word why it counts as it does."""

    suite: str
    passed: int
    failed: int
    skipped: int
    elapsed_s: float
    note: str


def main(arguments: list[str]) -> int:
    """Run the chosen suites; gives 0 when something ran and nothing failed."""
    parser = argparse.ArgumentParser(prog="tools/run_suites.py", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SHARES_S)} (default: all)")
    parser.add_argument("--coverage", action="store_true", help="measure the coverage of branches, which takes longer")
    flags = parser.parse_args(arguments)
    unknown = sorted(set(flags.suites) - set(SHARES_S))
    if unknown:
        parser.error(f"no suite is called {', '.join(unknown)}; there are {', '.join(SHARES_S)}")
    REPORTS.mkdir(parents=True, exist_ok=True)
    results = [run_suite(suite, with_coverage=flags.coverage) for suite in flags.suites or SHARES_S]
    print_table(results)
    passed, failed = sum(result.passed for result in results), sum(result.failed for result in results)
    skipped = sum(result.skipped for result in results)
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 0 if failed == 0 and passed > 0 else 1


def run_suite(suite: str, *, with_coverage: bool) -> Result:
    """Run one suite in a pytest of its own."""
    folder = ROOT / "tests" / suite
    if not any(folder.rglob("test_*.py")):
        return Result(suite, 0, 0, 0, 0.0, "has no tests yet")
    limit_s = SHARES_S[suite] * (COVERAGE_SLOWER if with_coverage else 1)
    print(f"\n== {suite} (at most {limit_s} s)", flush=True)
    report = REPORTS / f"{suite}.xml"
    report.unlink(missing_ok=True)
    runner = ["-m", "coverage", "run", "-m", "pytest"] if with_coverage else ["-m", "pytest"]
    # A worker that has nothing left steals from the other, so that a file mostly stays with the fixtures it shares.
    workers = [] if suite in ALONE else [f"--numprocesses={WORKERS}", "--dist=worksteal"]
    command = [sys.executable, *runner, "-q", *workers, f"--junitxml={report}", str(folder)]
    started = time.monotonic()
    status = run_limited(command, limit_s)
    elapsed_s = time.monotonic() - started
    passed, failed, skipped = counts(report)
    if status is None:
        return Result(suite, passed, failed + 1, skipped, elapsed_s, "ran past its share")
    if status != 0 and failed == 0:
        return Result(suite, passed, 1, skipped, elapsed_s, f"pytest ended with status {status}")
    return Result(suite, passed, failed, skipped, elapsed_s, "failed" if failed else "")


def run_limited(command: list[str], limit_s: float) -> int | None:
    """Run a command in a session of its own; gives its status, None when the limit ended it with all its group."""
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        # First the interrupt: pytest then tells where it stood and the fixtures end their processes.
        stop(process, signal.SIGINT)
        return None
    except KeyboardInterrupt:
        stop(process, signal.SIGINT)
        raise


def stop(process: subprocess.Popen[bytes], first: signal.Signals) -> None:
    """End a process group: a signal, a grace, then SIGKILL."""
    for number in (first, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_GRACE_S)
            if number == signal.SIGKILL:
                return


def counts(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests of a JUnit report; zeros when pytest wrote none."""
    try:
        suite = ET.parse(report).getroot().find("testsuite")  # noqa: S314
    except (OSError, ET.ParseError):
        return 0, 0, 0
    assert suite is not None
    tests, failures, errors, skipped = (
        int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")
    )
    failed = failures + errors
    return max(tests - failed - skipped, 0), failed, skipped


def print_table(results: list[Result]) -> None:
    """One line a suite: what it ran, what it took, what it might have taken."""
    print(f"\n{'suite':<12} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8} {'share':>6}")
    for result in results:
        row = f"{result.suite:<12} {result.passed:>7} {result.failed:>7} {result.skipped:>8} {result.elapsed_s:>8.1f}"
        print(f"{row} {SHARES_S[result.suite]:>6}  {result.note}".rstrip())
    total_s = sum(result.elapsed_s for result in results)
    print(f"{'together':<12} {total_s:>33.1f} {sum(SHARES_S.values()):>6}")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
