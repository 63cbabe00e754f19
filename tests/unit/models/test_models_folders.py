"""Folders: which files make up which models. Names only; the files are empty."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from skulk.models.folders import scan_folder


def place(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def ids(folder: Path) -> dict[str, tuple[str, ...]]:
    return {
        model.model_id: tuple(path.relative_to(folder).as_posix() for path in model.paths)
        for model in scan_folder(folder).models
        if model.problem is None
    }


def test_bare_files_and_repositories(tmp_path: Path) -> None:
    place(tmp_path, "tiny.gguf", "My Model.Q4_1.GGUF", "org/repo/model-Q4_K_M.gguf", "org/repo/README.md", "sub/x.gguf")
    assert ids(tmp_path) == {
        "tiny": ("tiny.gguf",),
        "My Model.Q4_1": ("My Model.Q4_1.GGUF",),
        "org/repo": ("org/repo/model-Q4_K_M.gguf",),
        "x": ("sub/x.gguf",),
    }


def test_several_quantizations_give_the_preferred_the_plain_id(tmp_path: Path) -> None:
    place(tmp_path, "o/r/m-Q8_0.gguf", "o/r/m-Q4_K_M.gguf", "o/r/m-F16.gguf")
    assert ids(tmp_path) == {
        "o/r": ("o/r/m-Q4_K_M.gguf",),
        "o/r:Q4_K_M": ("o/r/m-Q4_K_M.gguf",),
        "o/r:Q8_0": ("o/r/m-Q8_0.gguf",),
        "o/r:F16": ("o/r/m-F16.gguf",),
    }


def test_parts_are_put_together_in_order(tmp_path: Path) -> None:
    names = [f"o/r/Q4_0/m-Q4_0-0000{part}-of-00003.gguf" for part in (3, 1, 2)]
    place(tmp_path, *names, "big-00001-of-00001.gguf")
    assert ids(tmp_path) == {"o/r": tuple(sorted(names)), "big": ("big-00001-of-00001.gguf",)}


def test_projectors_are_no_models(tmp_path: Path) -> None:
    place(tmp_path, "o/r/m-Q4_0.gguf", "o/r/mmproj-m-f16.gguf", "mmproj.gguf")
    assert ids(tmp_path) == {"o/r": ("o/r/m-Q4_0.gguf",)}


@pytest.mark.parametrize(
    ("names", "model_id", "says"),
    [
        (["o/r/m-00001-of-00003.gguf", "o/r/m-00003-of-00003.gguf"], "o/r", "1 are missing (the first: 2)"),
        (["big-00002-of-99999.gguf"], "big", "99998 are missing (the first: 1)"),
        (
            ["o/r/m-00001-of-00002.gguf", "o/r/m-00002-of-00002.gguf", "o/r/m-00003-of-00002.gguf"],
            "o/r",
            "don't fit together",
        ),
        (["o/r/a-Q4_0.gguf", "o/r/b-Q4_0.gguf"], "o/r:Q4_0", "folder of its own"),
    ],
)
def test_what_makes_no_model_has_a_reason(tmp_path: Path, names: list[str], model_id: str, says: str) -> None:
    place(tmp_path, *names)
    problems = {model.model_id: model.problem for model in scan_folder(tmp_path).models if model.problem}
    assert says in problems[model_id]


def test_an_incomplete_quantization_does_not_hide_a_whole_one(tmp_path: Path) -> None:
    place(tmp_path, "o/r/m-Q4_K_M-00001-of-00002.gguf", "o/r/m-Q8_0.gguf")
    assert ids(tmp_path) == {"o/r": ("o/r/m-Q8_0.gguf",)}


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    scan = scan_folder(tmp_path / "none")
    assert (scan.models, scan.problems) == ((), ())


def test_links_are_followed_once(tmp_path: Path) -> None:
    models = place(tmp_path / "models", "o/r/m-Q4_0.gguf")
    other = place(tmp_path / "other", "r2/n-Q4_0.gguf")
    (models / "o" / "linked").symlink_to(other / "r2")
    (models / "o" / "loop").symlink_to(models)
    assert ids(models) == {"o/r": ("o/r/m-Q4_0.gguf",), "o/linked": ("o/linked/n-Q4_0.gguf",)}


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    place(tmp_path, ".cache/a/b.gguf", "._x.gguf", "o/.r/m.gguf")
    assert ids(tmp_path) == {}


def test_the_result_does_not_hang_on_the_order_of_the_disk(tmp_path: Path) -> None:
    names = ["o/r/m-Q8_0.gguf", "o/r/m-Q4_K_M.gguf", "a.gguf", "b/c/d-F16.gguf"]
    first = ids(place(tmp_path / "1", *names))
    assert ids(place(tmp_path / "2", *reversed(names))) == first


def test_a_name_that_is_no_text_is_a_problem_and_no_model(tmp_path: Path) -> None:
    """Such a name can't stand in any message: a node that told of it would tell nothing at all any more."""
    place(tmp_path, "good.gguf")
    try:
        (tmp_path / os.fsdecode(b"bad\xff.gguf")).touch()
    except OSError:
        pytest.skip("this file system takes text only")
    scan = scan_folder(tmp_path)
    assert [model.model_id for model in scan.models] == ["good"]
    ((_, reason),) = scan.problems
    assert "UTF-8" in reason
    reason.encode()
