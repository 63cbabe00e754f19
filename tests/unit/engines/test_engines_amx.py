"""Which builds of llama.cpp would crash in AMX, told by the compiler that a library names."""

from __future__ import annotations

import logging
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace

import pytest

from skulk.engines.llama_cpp import amx

DEBIAN_12 = b"\0\x7fELF .. GCC: (Debian 12.2.0-14+deb12u1) 12.2.0\0"


@pytest.mark.parametrize(
    ("comment", "expected"),
    [
        (DEBIAN_12, True),
        (b"GCC: (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0", True),
        (b"GCC: (GNU) 11.5.0", False),
        (b"GCC: (GNU) 12.3.0", True),
        (b"GCC: (GNU) 12.4.0", False),
        (b"GCC: (Ubuntu 13.2.0-4ubuntu3) 13.2.0", True),
        (b"GCC: (Ubuntu 13.3.0-6ubuntu2~24.04) 13.3.0", False),
        (b"GCC: (Debian 14.2.0-19) 14.2.0", False),
        (b"GCC: (GNU) 10.2.1", False),
        (b"clang version 18.1.3", False),
        (b"GCC: (GNU) 14.2.0\0GCC: (GNU) 12.2.0", True),
        (b"", False),
    ],
)
def test_a_compiler_is_known_by_what_it_leaves_in_a_library(comment: bytes, expected: bool) -> None:
    assert amx.is_miscompiled(comment) is expected


@pytest.fixture(autouse=True)
def fresh() -> Generator[None]:
    amx.can_use_tiles.cache_clear()
    yield
    amx.can_use_tiles.cache_clear()


def installed(monkeypatch: pytest.MonkeyPatch, folder: Path, system_info: bytes, content: bytes) -> None:
    (folder / "lib").mkdir()
    (folder / "lib" / "libggml-cpu.so.0").write_bytes(content)
    # What can't be read decides nothing.
    (folder / "lib" / "libggml-cpu.so").mkdir()
    monkeypatch.setattr(amx, "library", lambda: SimpleNamespace(llama_print_system_info=lambda: system_info))
    monkeypatch.setattr(amx, "native_folder", lambda: folder / "lib")


def test_a_library_that_would_crash_is_loaded_without_tiles_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    installed(monkeypatch, tmp_path, b"CPU : AVX512 = 1 | AMX_INT8 = 1 | ", DEBIAN_12)
    with caplog.at_level(logging.WARNING):
        assert [amx.can_use_tiles(), amx.can_use_tiles()] == [False, False]
    (record,) = caplog.records
    assert "-mno-amx-tile" in record.message and "make up" in record.message


@pytest.mark.parametrize(
    ("system_info", "content"),
    [(b"CPU : AVX512 = 1 | ", DEBIAN_12), (b"AMX_INT8 = 0 |", DEBIAN_12), (b"AMX_INT8 = 1 |", b"GCC: (GNU) 14.2.0")],
)
def test_every_other_library_keeps_what_makes_it_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system_info: bytes, content: bytes
) -> None:
    installed(monkeypatch, tmp_path, system_info, content)
    assert amx.can_use_tiles()
