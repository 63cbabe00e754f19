"""The commit of a checkout is that which git tells; a folder that is none has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from skulk.node.checkout import commit_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = COMMIT[::-1]


def in_git(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / ".git" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    "files",
    [
        {"HEAD": f"{COMMIT}\n"},
        {
            "HEAD": "ref: refs/heads/main\n",
            "refs/heads/main": f"{COMMIT}\n",
            "packed-refs": f"{OTHER} refs/heads/main\n",
        },
        {
            "HEAD": "ref: refs/heads/main\n",
            "packed-refs": f"# pack-refs\n{OTHER} refs/heads/mai\n{COMMIT} refs/heads/main\n",
        },
    ],
    ids=["detached", "loose", "packed"],
)
def test_the_commit_of_a_checkout(tmp_path: Path, files: dict[str, str]) -> None:
    assert commit_of(in_git(tmp_path, files)) == COMMIT


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"HEAD": "ref: refs/heads/main\n"},
        {"HEAD": "ref: refs/heads/main\n", "packed-refs": f"{COMMIT} refs/heads/other\n"},
        {"HEAD": "nonsense\n"},
        {"HEAD": "ref: a\x00b\n"},
    ],
    ids=["no checkout", "no commit yet", "another name", "nonsense", "no name"],
)
def test_where_there_is_none_it_is_empty(tmp_path: Path, files: dict[str, str]) -> None:
    assert commit_of(in_git(tmp_path, files)) == ""


def test_the_commit_of_a_worktree(tmp_path: Path) -> None:
    in_git(tmp_path, {"refs/heads/side": COMMIT, "worktrees/side/HEAD": "ref: refs/heads/side\n"})
    in_git(tmp_path, {"worktrees/side/commondir": "../..\n"})
    side = tmp_path / "side"
    side.mkdir()
    (side / ".git").write_text(f"gitdir: {tmp_path / '.git' / 'worktrees' / 'side'}\n")
    assert commit_of(side) == COMMIT
