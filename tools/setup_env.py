"""Sets up the virtual environment of this clone, from nothing or from whatever is there; quick when nothing is missing.

Order: the environment, uv, the locked packages (hashes checked), the engine, the package itself. An installed
llama-cpp-python with GPU offload is never replaced, whatever its version, and is put out of the reach of `uv sync`.
"""

from __future__ import annotations

import sys

if not (3, 11) <= sys.version_info[:2] < (3, 14):
    sys.exit(
        "Skulk needs Python 3.11, 3.12 or 3.13 and this is {}.{}. Install one: `sudo apt install python3 python3-venv` "
        "(Debian 12 or newer, Ubuntu 24.04), `sudo dnf install python3.13` (Fedora), `brew install python@3.13` "
        "(macOS).".format(*sys.version_info[:2])
    )

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from engine_guard import Engine, hold, installed_engine, is_installed_from, protect, release, site_packages
from engine_wheel import BuildError, cache_root, cached_wheel, say, wheel_for
from lock_entries import Entry, is_within, needed, normal_name, read_lock, select, tested_range

ROOT = Path(__file__).resolve().parent.parent
ENGINE = "llama-cpp-python"
# What installs the rest: locked like it, and wanted whatever the extras are.
BUILD_TOOLS = frozenset({"setuptools"})
UV_OLDEST = (0, 5)
VENV_ADVICE = (
    "This Python has no venv module. Install it and run again: `sudo apt install python3-venv` (Debian, Ubuntu); "
    "Fedora's python3 and Homebrew's python bring it with them."
)


class SetupError(Exception):
    """The set-up cannot go on; the text is one sentence that says what to do."""


class Plan(NamedTuple):
    """What this call sets up: where, with which extras, from which entries of the lock."""

    venv: Path
    extras: frozenset[str]
    entries: list[Entry]
    with_engine: bool
    fingerprint: str

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.venv / "skulk-setup.json"


def main(arguments: list[str]) -> int:
    """Set the environment up as the flags say; gives the exit status."""
    flags = parse(arguments)
    try:
        if flags.release_gpu:
            return release_gpu(flags.venv)
        plan = make_plan(flags.venv, frozenset(flags.extra), with_engine=not flags.no_engine)
        if not is_up_to_date(plan):
            set_up(plan)
    except (SetupError, BuildError) as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nset-up: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The flags of the command line."""
    parser = argparse.ArgumentParser(prog="tools/setup_env.py", description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="the environment (default: .venv)")
    parser.add_argument("--extra", action="append", default=[], choices=["demo", "dev"], help="repeatable")
    parser.add_argument("--no-engine", action="store_true", help="leave llama-cpp-python out: nothing is compiled")
    parser.add_argument(
        "--release-gpu",
        action="store_true",
        help="only: let installers replace the environment's GPU build of llama-cpp-python again",
    )
    return parser.parse_args(arguments)


def make_plan(venv: Path, extras: frozenset[str], *, with_engine: bool) -> Plan:
    """Read the project's files and decide which entries of the lock are wanted."""
    pyproject, lock = ROOT / "pyproject.toml", ROOT / "requirements.lock"
    entries = read_lock(lock)
    wanted = extras | {"llama-cpp"} if with_engine else extras
    names = frozenset(entry.name for entry in needed(entries, pyproject, wanted)) | BUILD_TOOLS
    facts = [pyproject.read_bytes(), lock.read_bytes(), Path(__file__).read_bytes()]
    fingerprint = hashlib.sha256(b"\0".join(facts)).hexdigest()
    return Plan(venv.absolute(), wanted, select(entries, names), with_engine, fingerprint)


def is_up_to_date(plan: Plan) -> bool:
    """Whether an earlier set-up did at least this and nothing it installed has gone since (a sync may prune)."""
    try:
        stamp = json.loads(plan.stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if stamp["fingerprint"] != plan.fingerprint or not plan.extras <= set(stamp["extras"]):
        return False
    return set(stamp["installed"]) <= installed_folders(plan.venv) and plan.python.exists()


def installed_folders(venv: Path) -> set[str]:
    """The metadata folders of what is installed, `name-version.dist-info` each."""
    return {folder.name for packages in site_packages(venv) for folder in packages.glob("*.dist-info")}


def set_up(plan: Plan) -> None:
    """Bring the environment to the plan.

    Raises:
        SetupError: something outside is missing; the text names it.
        BuildError: the engine could not be compiled.
    """
    make_environment(plan)
    uv = find_uv(plan)
    locked = [entry for entry in plan.entries if entry.name != ENGINE]
    say(f"Installing {len(locked)} locked packages into {plan.venv}")
    install(plan, uv, ["--require-hashes"], locked)
    if engine_that_stays(plan) is None and plan.with_engine:
        install_engine(plan, uv)
    run_installer(plan, uv, ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)])
    write_stamp(plan)


def make_environment(plan: Plan) -> None:
    """Make the virtual environment where it is missing; one whose Python is gone is never deleted unasked."""
    if not plan.python.exists():
        if plan.python.is_symlink() or site_packages(plan.venv):
            raise SetupError(f"The Python of {plan.venv} is gone. Remove that folder and run again.")
        if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
            raise SetupError(VENV_ADVICE)
        say(f"Making the virtual environment {plan.venv}")
        if call([sys.executable, "-m", "venv", str(plan.venv)]) != 0:
            shutil.rmtree(plan.venv, ignore_errors=True)
            raise SetupError(VENV_ADVICE)
    if call([str(plan.python), "-c", "import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))"]) != 0:
        raise SetupError(
            f"The Python of {plan.venv} does not run or is not 3.11 to 3.13. Remove that folder, run again."
        )


def find_uv(plan: Plan) -> str:
    """A uv to work with: the environment's, the user's, or one that pip brings into the environment, its hash checked.

    Raises:
        SetupError: there is none and pip could not bring it.
    """
    for candidate in (str(plan.venv / "bin" / "uv"), shutil.which("uv")):
        if candidate and uv_version(candidate) >= UV_OLDEST:
            return candidate
    say("Bringing in uv")
    ensure_pip(plan)
    entries = select(read_lock(ROOT / "requirements.lock"), frozenset({"uv"}))
    if pip_install(plan, ["--require-hashes"], entries) != 0:
        raise SetupError("pip could not install uv (see above). Check the network and pip's index settings, run again.")
    return str(plan.venv / "bin" / "uv")


def uv_version(uv: str) -> tuple[int, ...]:
    """The version of a uv that really runs, () of one that does not (a shim, a broken link)."""
    try:
        done = subprocess.run([uv, "--version"], check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    words = done.stdout.split()
    if done.returncode != 0 or len(words) < 2:
        return ()
    return tuple(int(part) for part in words[1].split(".")[:2] if part.isdigit())


def ensure_pip(plan: Plan) -> None:
    """An environment that uv made has no pip; Python carries one."""
    if call([str(plan.python), "-m", "pip", "--version"], quiet=True) == 0:
        return
    if call([str(plan.python), "-m", "ensurepip"], quiet=True) != 0:
        raise SetupError(VENV_ADVICE)


def engine_that_stays(plan: Plan) -> Engine | None:
    """The installed engine if nothing of ours may replace it, None if the locked CPU build is to be installed.

    Any engine with GPU offload stays, and any of foreign make that cannot be asked. Both are held (engine_guard.py).
    """
    engine = protect(plan.venv)
    if engine is None:
        return None
    low, high = tested_range(ROOT / "pyproject.toml", ENGINE)
    if engine.gpu:
        say(f"Keeping {ENGINE} {engine.version}: it has GPU offload" + (f" ({engine.error})" if engine.error else ""))
        if not is_within(engine.version, low, high):
            say(
                f"  {engine.version} is outside the tested range (>={low},<{high}): rebuild it if something looks wrong"
            )
        return engine
    if engine.error and not is_installed_from(plan.venv, cache_root()):
        # Perhaps a GPU build whose driver is away: only its owner can tell, so only its owner removes it.
        hold(plan.venv)
        say(f"Keeping {ENGINE} {engine.version} although it does not import: {engine.error}")
        say("  To get a CPU build instead: `python3 tools/setup_env.py --release-gpu`, uninstall it, run again")
        return engine
    locked = next(entry.version for entry in read_lock(ROOT / "requirements.lock") if entry.name == ENGINE)
    return engine if engine.version == locked and not engine.error else None


def install_engine(plan: Plan, uv: str) -> None:
    """Install the CPU build of the locked version, compiled now or earlier."""
    entry = next(entry for entry in plan.entries if entry.name == ENGINE)
    wheel = cached_wheel(entry)
    if wheel is None:
        ensure_pip(plan)
        wheel = wheel_for(entry, plan.python)
    run_installer(plan, uv, ["--no-deps", "--reinstall", str(wheel)])
    engine = installed_engine(plan.python)
    if engine is None or engine.error:
        raise SetupError(
            f"The compiled {ENGINE} does not import: {engine.error if engine else 'it is not there'}. "
            f"Remove {wheel.parent} and run again."
        )


def install(plan: Plan, uv: str, options: list[str], entries: list[Entry]) -> None:
    """Install pinned entries, by uv or, where uv cannot reach the index that pip's configuration names, by pip."""
    with requirements_file(entries) as path:
        command = [uv, "pip", "install", "--python", str(plan.python), "--no-deps", *options, "--requirement", path]
        if call(command) == 0:
            return
    say("uv could not install them; trying pip, which reads its own configuration")
    ensure_pip(plan)
    if pip_install(plan, options, entries) != 0:
        raise SetupError("The locked packages could not be installed (see above). Check the network and run again.")


def pip_install(plan: Plan, options: list[str], entries: list[Entry]) -> int:
    """Install pinned entries by the environment's pip; gives its exit status."""
    with requirements_file(entries) as path:
        return call([str(plan.python), "-m", "pip", "install", "--quiet", "--no-deps", *options, "--requirement", path])


def run_installer(plan: Plan, uv: str, what: list[str]) -> None:
    """Install something of our own that no lock names."""
    if call([uv, "pip", "install", "--quiet", "--python", str(plan.python), *what]) != 0:
        raise SetupError(f"uv could not install {what[-1]} (see above).")


class requirements_file:  # noqa: N801 - used like a function, as the standard library does it
    """A requirements file with these entries, for as long as the `with` lasts."""

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = entries
        self._folder = tempfile.TemporaryDirectory(prefix="skulk-setup-")

    def __enter__(self) -> str:
        path = Path(self._folder.name) / "requirements.txt"
        path.write_text("".join(entry.text for entry in self._entries), encoding="utf-8")
        return str(path)

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def call(command: list[str], *, quiet: bool = False) -> int:
    """Run a command with our output and no input; gives its exit status."""
    sink = subprocess.DEVNULL if quiet else None
    environment = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, cwd=ROOT, env=environment
    )
    return done.returncode


def write_stamp(plan: Plan) -> None:
    """Note what is installed, so that the next call can be quick."""
    names = {entry.name for entry in plan.entries} | {"skulk"}
    folders = sorted(name for name in installed_folders(plan.venv) if normal_name(name.split("-")[0]) in names)
    content = {"fingerprint": plan.fingerprint, "extras": sorted(plan.extras), "installed": folders}
    plan.stamp.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def release_gpu(venv: Path) -> int:
    """Undo the hold, on demand of the person who wants to rebuild or drop the GPU build."""
    released = release(venv)
    (venv / "skulk-setup.json").unlink(missing_ok=True)
    say(f"Released {', '.join(path.name for path in released)}" if released else "Nothing is held")
    say("Rebuild or uninstall it now: the next set-up or sync holds a GPU build again")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
