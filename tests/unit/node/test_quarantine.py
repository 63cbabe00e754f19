"""Quarantined backends: what is offered without them, and the ways back."""

from __future__ import annotations

from pathlib import Path

import pytest

from skulk.node.quarantine import CANARY_DIR, EXPIRES_S, FILE, Quarantine, forgive, without
from skulk.telemetry.backends import Advertised

CPU, VULKAN = "llama_cpp-cpu", "llama_cpp-vulkan"
BUILD = "0123456789abcdef"
NOW = 1_700_000_000.0


def held(home: Path, backend: str = VULKAN) -> Quarantine:
    quarantine = Quarantine(home)
    quarantine.add(backend, BUILD, "it scrambled", NOW)
    return quarantine


@pytest.mark.parametrize(
    ("tags", "kept"),
    [
        (("llama_cpp", VULKAN, CPU), ("llama_cpp", CPU)),
        (("llama_cpp", VULKAN), ()),
        (("llama_cpp", VULKAN, "mlx", "mlx-metal"), ("mlx", "mlx-metal")),
        (("llama_cpp", CPU), ("llama_cpp", CPU)),
        ((), ()),
    ],
)
def test_tags_lose_the_backend_and_health_says_why(
    tmp_path: Path, tags: tuple[str, ...], kept: tuple[str, ...]
) -> None:
    offered = without(Advertised(tags, ()), held(tmp_path).all())
    assert offered.tags == kept
    assert [reason.code for reason in offered.warnings] == (["backend_quarantined"] if VULKAN in tags else [])
    if offered.warnings:
        (reason,) = offered.warnings
        assert "it scrambled" in reason.message
        assert f"--forgive {VULKAN}" in reason.remediation


@pytest.mark.parametrize(
    ("build", "later_s", "holds"),
    [(BUILD, 0.0, True), (BUILD, EXPIRES_S - 1, True), (BUILD, EXPIRES_S, False), ("another", 0.0, False)],
)
def test_it_ends_with_the_build_and_with_the_day(tmp_path: Path, build: str, later_s: float, holds: bool) -> None:
    held(tmp_path)
    again = Quarantine(tmp_path)
    assert bool(again.holding(build, NOW + later_s)) == holds


def test_one_entry_a_backend_the_newest(tmp_path: Path) -> None:
    quarantine = held(tmp_path)
    quarantine.add(VULKAN, BUILD, "it was slow", NOW + 1)
    quarantine.add(CPU, BUILD, "so was this", NOW + 2)
    assert [(one.backend, one.reason) for one in Quarantine(tmp_path).all()] == [
        (VULKAN, "it was slow"),
        (CPU, "so was this"),
    ]


def test_forgiving_reaches_a_running_node_and_forgets_what_was_recited(tmp_path: Path) -> None:
    running = held(tmp_path)
    folder = tmp_path / CANARY_DIR
    folder.mkdir()
    for name, text in (("a", f'{{"backend":"{VULKAN}"}}'), ("b", f'{{"backend":"{CPU}"}}'), ("c", "broken")):
        (folder / f"{name}.json").write_text(text)
    assert not forgive(tmp_path, CPU)
    assert forgive(tmp_path, VULKAN)
    assert running.all() == ()
    assert [path.name for path in folder.glob("*.json")] == ["b.json"]


def test_a_broken_file_quarantines_nothing(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    assert Quarantine(tmp_path).all() == ()


def test_it_holds_though_the_disk_takes_nothing(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "missing")
    quarantine.add(VULKAN, BUILD, "it scrambled", NOW)
    assert quarantine.holding(BUILD, NOW)
