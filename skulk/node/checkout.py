"""Which commit a node runs from, where it runs from a git checkout: read from git's own files, without git.

<root>/.git          a folder, or a file "gitdir: <folder>" (a worktree; its commondir names the repository)
HEAD                 a commit, or "ref: <name>"
<name>, packed-refs  the commit of that name
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

_COMMIT: Final = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
_MAX_BYTES: Final = 4 * 1024 * 1024


def commit_of(root: Path) -> str:
    """The commit that is checked out in ``root``, as hex digits; empty where it is no checkout or can't be read."""
    try:
        git = _git_folder(root)
        head = _text(git / "HEAD")
        name = head.removeprefix("ref: ")
        found = head if name == head else _commit_of_ref(git, name)
    except (OSError, ValueError):
        return ""
    return found if _COMMIT.fullmatch(found) else ""


def _git_folder(root: Path) -> Path:
    git = root / ".git"
    return git if git.is_dir() else root / _text(git).removeprefix("gitdir: ")


def _commit_of_ref(git: Path, name: str) -> str:
    common = git / _text(git / "commondir") if (git / "commondir").exists() else git
    for folder in (git, common):
        if (folder / name).is_file():
            return _text(folder / name)
    for line in _text(common / "packed-refs").splitlines():
        commit, _, packed = line.partition(" ")
        if packed == name:
            return commit
    return ""


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(_MAX_BYTES).decode().strip()


RUNNING_COMMIT: Final = commit_of(Path(__file__).resolve().parents[2])
"""Of the checkout that this process was started from; what is checked out later doesn't run here."""
