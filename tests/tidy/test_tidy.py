"""The house style, as far as a program can hold it: sizes, names, clutter, and what must not be written down.

A number is never met by padding or splitting. The one decision function of a module may be longer: it carries the
comment `# tidy: long, <why>` on its `def` line.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import lock_entries
import pytest

ROOT = Path(__file__).resolve().parents[2]
FUNCTION_LINES, FILE_LINES = 70, 500
TOP_LEVEL = {
    *(".ci", ".gitattributes", ".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile"),
    *("README.md", "SECURITY.md", "pyproject.toml", "requirements.lock"),
    *("deployment", "skulk", "subjects", "tests", "tools"),
}
BANNED_MODULES = {"common", "data", "helper", "helpers", "manager", "managers", "misc", "util", "utils"}
BANNED_CLASS = re.compile(r"(Helper|Manager|Util|Utils)$")
BANNED_FUNCTIONS = {"helper", "process"}
LONG = re.compile(r"#\s*tidy: long, \w+")
# Spelled so that this file does not find itself.
OWNERLESS = re.compile(r"\b(TO" + r"DO|FIX" + r"ME)\b(?!\([a-z])")
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(root/\w|work/\w|tmp/lab/\w|(home|Users)/(?!me\b|you\b|user\b|skulk\b)\w)")
ADDRESS = re.compile(r"://|\bfile:|^\S+ @ ")
TEXTS = {".cfg", ".in", ".json", ".lock", ".md", ".mjs", ".py", ".service", ".sh", ".toml", ".txt", ".yaml", ".yml", ""}


class Module(NamedTuple):
    """One Python file of ours, parsed."""

    path: Path
    lines: Sequence[str]
    tree: ast.Module

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))


@cache
def project_files() -> list[Path]:
    """The files that git knows or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=60)
    paths = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


@cache
def modules() -> list[Module]:
    found: list[Module] = []
    for path in project_files():
        if path.suffix == ".py":
            text = path.read_text(encoding="utf-8")
            found.append(Module(path, text.splitlines(), ast.parse(text)))
    return found


Definition = ast.FunctionDef | ast.AsyncFunctionDef


def functions(module: Module) -> Iterator[Definition]:
    return (node for node in ast.walk(module.tree) if isinstance(node, Definition))


def last_line(node: Definition) -> int:
    return node.end_lineno or node.lineno


def counted_lines(module: Module, first: int, last: int) -> int:
    """The lines from first to last (both included, from 1) that are neither blank nor part of a docstring."""
    numbers = {number for number in range(first, last + 1) if module.lines[number - 1].strip()}
    return len(numbers - docstring_lines(module))


def docstring_lines(module: Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(module.tree):
        is_home = isinstance(node, Definition | ast.ClassDef | ast.Module)
        if is_home and ast.get_docstring(node, clean=False) is not None:
            lines.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def test_the_counts_leave_out_docstrings_and_blank_lines() -> None:
    text = 'def f():\n    """Two\n    lines."""\n\n    # why\n    return 1\n'
    module = Module(ROOT / "x.py", text.splitlines(), ast.parse(text))
    assert counted_lines(module, 1, 6) == 3


def test_no_function_is_too_long_but_one_of_a_module_that_says_why() -> None:
    wrong: list[str] = []
    for module in modules():
        # most are short, blank lines and docstrings included
        tall = [node for node in functions(module) if last_line(node) - node.lineno >= FUNCTION_LINES]
        long = [node for node in tall if counted_lines(module, node.lineno, last_line(node)) > FUNCTION_LINES]
        excused = [node for node in long if LONG.search(module.lines[node.lineno - 1])]
        wrong += [f"{module.name}:{node.lineno} {node.name}" for node in long if node not in excused[:1]]
    assert not wrong, "\n".join(wrong)


def test_no_file_is_too_long() -> None:
    counts = {module.name: counted_lines(module, 1, len(module.lines)) for module in modules()}
    assert not {name: count for name, count in counts.items() if count > FILE_LINES}


def test_names_say_what_things_are() -> None:
    wrong = [module.name for module in modules() if BANNED_MODULES & {module.path.stem, module.path.parent.name}]
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef) and BANNED_CLASS.search(node.name):
                wrong.append(f"{module.name}:{node.lineno} class {node.name}")
            # A property is a thing and may bear a noun; a function is a deed and says which.
            if isinstance(node, Definition) and node.name in BANNED_FUNCTIONS and not node.decorator_list:
                wrong.append(f"{module.name}:{node.lineno} def {node.name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("pattern", [OWNERLESS, MACHINE_PATH], ids=["open-end", "machine-path"])
def test_nothing_is_written_down_that_does_not_belong_here(pattern: re.Pattern[str]) -> None:
    wrong: list[str] = []
    for path in project_files():
        if path.suffix in TEXTS:
            lines = enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
            wrong += [
                f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for number, line in lines if pattern.search(line)
            ]
    assert not wrong, "\n".join(wrong)


def test_what_does_not_belong_here_is_known_when_seen() -> None:
    assert MACHINE_PATH.search("see /ho" + "me/ada/x")
    assert not MACHINE_PATH.search("see $HOME/x, /home/user/x, skulk/home/ada")
    assert OWNERLESS.search("# TO" + "DO later")
    assert not OWNERLESS.search("# TO" + "DO(ada) later")


def test_the_root_holds_nothing_but_what_belongs_there() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in project_files()} <= TOP_LEVEL


def test_every_package_tells_what_it_is_for() -> None:
    packages = sorted(path.parent for path in (ROOT / "skulk").glob("*/__init__.py"))
    assert packages
    assert not [package.name for package in packages if not (package / "README.md").is_file()], "README.md is missing"


def test_the_lock_holds_hashes_and_no_address() -> None:
    lock = ROOT / "requirements.lock"
    assert not [line for line in lock.read_text(encoding="utf-8").splitlines() if ADDRESS.search(line)]
    entries = lock_entries.read_lock(lock)
    assert not [entry.name for entry in entries if "--hash=sha256:" not in entry.text]
    everything = frozenset({"demo", "dev", "llama-cpp"})
    assert len(lock_entries.needed(entries, ROOT / "pyproject.toml", everything)) == len(entries)


def test_uv_lock_with_its_addresses_stays_out() -> None:
    assert subprocess.run(["git", "check-ignore", "-q", "uv.lock"], cwd=ROOT, timeout=60).returncode == 0
    assert not [path for path in project_files() if path.name == "uv.lock"]


def test_every_tool_answers_help() -> None:
    tools = [module for module in modules() if module.path.parent == ROOT / "tools"]
    programs = [module.path for module in tools if 'if __name__ == "__main__":' in module.lines]
    assert programs
    for program in programs:
        done = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "usage:" in done.stdout, f"{program.name}: {done.stderr}"
