"""Compiles llama-cpp-python once, with its progress visible, and keeps the wheel for the next environment.

The wheel lies in `$XDG_CACHE_HOME/skulk/wheels/<key>/` beside its SHA-256. The key covers what the binary depends on:
version and hash of the source, system, C library, build flags, and the CPU, because llama.cpp is compiled for the CPU
it is compiled on (`-march=native`) and would die of an illegal instruction on a lesser one. Python is not in the key:
the bindings are ctypes, one wheel serves every version.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import NamedTuple

from amx_flags import flags_for
from lock_entries import Entry

STEP = re.compile(r"^\s*\[(\d+)/(\d+)\]")
BUILD_VARIABLES = ("CMAKE_ARGS", "CMAKE_GENERATOR", "CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "FORCE_CMAKE")
LOG_TAIL_LINES = 30
COMPILER_ADVICE = (
    "llama-cpp-python has to be compiled and no {missing} was found. Install a C/C++ compiler and run again: "
    "`sudo apt install build-essential` (Debian, Ubuntu), `sudo dnf install gcc gcc-c++` (Fedora), "
    "`xcode-select --install` (macOS)."
)


class BuildError(Exception):
    """The engine could not be compiled; the text says what to do."""


class Progress(NamedTuple):
    """One step of the compilation: `done` of `total` objects, `elapsed_s` since the start."""

    done: int
    total: int
    elapsed_s: float


def cache_root() -> Path:
    """The folder of this user's compiled wheels."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "skulk" / "wheels"


def cache_key(entry: Entry) -> str:
    """What the binary depends on, as a folder name that a person can still read."""
    facts = [entry.text, platform.system(), platform.machine(), *platform.libc_ver(), _cpu(), *flags_for(_cpu())]
    facts += [f"{name}={os.environ.get(name, '')}" for name in BUILD_VARIABLES]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return f"{entry.name}-{entry.version}-{platform.system().lower()}-{platform.machine()}-{digest[:16]}"


def _cpu() -> str:
    """Model and instruction sets of the CPU that compiles; the compiler specialises for exactly these."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        done = subprocess.run(
            ["sysctl", "-n", "machdep.cpu.brand_string"], check=False, capture_output=True, text=True, timeout=10
        )
        return done.stdout.strip()
    wanted = ("model name", "flags", "features", "cpu part", "cpu implementer")
    lines = (line for line in text.split("\n\n")[0].splitlines() if line.lower().startswith(wanted))
    return "\n".join(" ".join(line.split()) for line in lines)


def cached_wheel(entry: Entry) -> Path | None:
    """The whole wheel of this entry that an earlier compilation left, if there is one."""
    folder = cache_root() / cache_key(entry)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        return _whole_wheel(folder)


def wheel_for(entry: Entry, python: Path) -> Path:
    """A compiled wheel of this entry: from the cache if a whole one lies there, else compiled now.

    Compiling takes about six minutes on two cores. A second set-up that wants the same wheel waits for the first.

    Raises:
        BuildError: no compiler, or the compilation failed.
    """
    folder = cache_root() / cache_key(entry)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        wheel = _whole_wheel(folder)
        if wheel is None:
            wheel = _compile(entry, python, folder)
    return wheel


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("Another set-up is compiling this engine already: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _whole_wheel(folder: Path) -> Path | None:
    """The wheel of the folder if it is the one that was recorded; anything else is thrown away."""
    for wheel in sorted(folder.glob("*.whl")):
        record = wheel.with_name(wheel.name + ".sha256")
        if record.is_file() and record.read_text(encoding="ascii", errors="replace").strip() == _sha256(wheel):
            return wheel
        say(f"The cached wheel {wheel.name} is damaged: it is compiled again")
        wheel.unlink()
        record.unlink(missing_ok=True)
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _compile(entry: Entry, python: Path, folder: Path) -> Path:
    require_compiler()
    say(f"Compiling {entry.name} {entry.version} once (about 6 minutes on two cores); the wheel is kept in {folder}")
    fresh = folder / "fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    requirement = fresh / "requirement.txt"
    requirement.write_text(entry.text, encoding="utf-8")
    # No pip cache: a wheel it kept may have been compiled with other flags or for another CPU.
    command = [str(python), "-m", "pip", "wheel", "--verbose", "--no-cache-dir", "--no-deps", "--require-hashes"]
    command += ["--no-binary", entry.name, "--wheel-dir", str(fresh), "--requirement", str(requirement)]
    log = folder / "build.log"
    status = _run_logged(command, log, _environment())
    wheels = list(fresh.glob("*.whl"))
    if status != 0 or len(wheels) != 1:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:])
        raise BuildError(f"{tail}\n{entry.name} did not compile (status {status}). The whole log: {log}")
    target = folder / wheels[0].name
    target.with_name(target.name + ".sha256").write_text(_sha256(wheels[0]) + "\n", encoding="ascii")
    wheels[0].replace(target)
    shutil.rmtree(fresh)
    return target


def _environment() -> dict[str, str]:
    """Of the compilation: the person's own flags, and those that this compiler needs for this processor."""
    more = flags_for(_cpu())
    if not more:
        return dict(os.environ)
    say(f"This compiler compiles the processor's matrix tiles (AMX) wrongly: they are left out ({' '.join(more)})")
    flags = {name: " ".join((os.environ.get(name, ""), *more)).strip() for name in ("CFLAGS", "CXXFLAGS")}
    return {**os.environ, **flags}


def require_compiler() -> None:
    """Say at once, in one sentence, that a compiler is missing, instead of after a page of CMake's output.

    Raises:
        BuildError: `cc` or `c++` (or what CC and CXX name) is not there.
    """
    for variable, names in (("CC", ("cc", "gcc", "clang")), ("CXX", ("c++", "g++", "clang++"))):
        chosen = os.environ.get(variable, "").split()
        if not any(shutil.which(name) for name in (chosen[:1] or names)):
            raise BuildError(COMPILER_ADVICE.format(missing=chosen[0] if chosen else names[0]))


def _run_logged(command: list[str], log: Path, environment: dict[str, str]) -> int:
    """Run a build: every line to the log, the compiler's progress to the terminal; gives the exit status."""
    started = time.monotonic()
    show = ProgressLine()
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if match := STEP.match(line):
                show.step(Progress(int(match[1]), int(match[2]), time.monotonic() - started))
    show.end()
    return process.returncode


class ProgressLine:
    """Shows the progress of a build: one line that moves on a terminal, a line every twentieth elsewhere."""

    def __init__(self) -> None:
        self._shown = -1
        self._moving = sys.stdout.isatty()

    def step(self, progress: Progress) -> None:
        """Show this step if it is worth a line."""
        minutes, seconds = divmod(int(progress.elapsed_s), 60)
        text = f"  [{progress.done}/{progress.total}] compiled after {minutes} min {seconds:02d} s"
        twentieth = progress.done * 20 // max(progress.total, 1)
        if self._moving:
            sys.stdout.write(f"\r{text}\x1b[K")
            sys.stdout.flush()
        elif twentieth != self._shown:
            say(text)
        self._shown = twentieth

    def end(self) -> None:
        """Leave the moving line."""
        if self._moving and self._shown >= 0:
            say("")


def say(text: str) -> None:
    """One line to the person who waits."""
    print(text, flush=True)
