"""Atomic replacement of files, and a full disk in one sentence."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from skulk.errors import ServiceError
from skulk.files import disk_full_error, is_disk_full, write_atomic


def test_the_new_content_replaces_the_old_with_the_mode_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "node.json"
    path.write_bytes(b"old")
    path.chmod(0o644)
    write_atomic(path, b"new" * 100_000)
    assert path.read_bytes() == b"new" * 100_000
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_atomic(path, b"", mode=0o640, fsync=False)
    assert path.read_bytes() == b"" and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [file.name for file in tmp_path.iterdir()] == ["node.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open"])
def test_a_full_disk_keeps_the_old_file_and_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    path = tmp_path / "node.json"
    path.write_bytes(b"old")

    def full(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(ServiceError, match=rf"No room left on the disk for {path}.*free") as caught:
            write_atomic(path, b"new")
    assert caught.value.code == "disk_full" and isinstance(caught.value.__cause__, OSError)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["node.json"]


def test_short_writes_are_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda file, body: real_write(file, bytes(body[:3])))
    write_atomic(tmp_path / "x", b"0123456789")
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_what_is_no_full_disk_stays_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "none" / "x", b"")


def test_a_write_cut_off_by_a_size_limit_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    code = f"""
from pathlib import Path; from skulk.files import write_atomic
write_atomic(Path({str(tmp_path / "x")!r}), b"n" * 5000)
"""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=root, preexec_fn=limit, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "File too large" in done.stderr
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["x"]


def test_the_real_full_device_is_a_full_disk() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")
    assert is_disk_full(caught.value)
    assert "quota" not in disk_full_error(Path("/dev/full"), caught.value).detail
    assert not is_disk_full(PermissionError(errno.EACCES, "no"))


def test_the_free_space_of_a_folder_that_went_away_is_unknown(tmp_path: Path) -> None:
    error = disk_full_error(tmp_path / "none" / "x", OSError(errno.EDQUOT, "quota"))
    assert "free space unknown (the user's quota is used up)" in error.detail
