"""The lock of the home folder and the list of its children, with real processes."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

from skulk.errors import ServiceError, SkulkError, StartError
from skulk.supervision.home import ChildEntry, ChildLedger, HomeLock, reap_leftovers
from tests.support.child_processes import ROOT, await_gone

SLEEPER = (sys.executable, "-c", "import time; time.sleep(60)")
DEAF = (
    *(sys.executable, "-c"),
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)",
)


def started(argv: tuple[str, ...] = SLEEPER) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True)


def finish(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def read(home: Path) -> list[dict[str, object]]:
    return msgspec.json.decode((home / "children.json").read_bytes())["children"]


def write(home: Path, *entries: ChildEntry) -> None:
    (home / "children.json").write_bytes(msgspec.json.encode({"children": entries}))


def entry_of(pid: int, shift_s: float = 0.0) -> ChildEntry:
    return ChildEntry(name="runner-1", pid=pid, started_at=psutil.Process(pid).create_time() + shift_s)


def test_a_new_home_is_the_owners_alone_and_can_be_taken_again(tmp_path: Path) -> None:
    home = tmp_path / "deep" / "home"
    with HomeLock(home):
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert (home / "lock").read_text() == f"{os.getpid()}\n"
    with HomeLock(home):
        pass


def test_a_second_start_on_the_same_home_names_the_first_and_the_way_out(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from skulk.supervision.home import HomeLock\n"
        f"HomeLock(Path({str(tmp_path)!r})).acquire(); print('held', flush=True); sys.stdin.read()"
    )
    first = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        with pytest.raises(StartError, match=rf"in use by process {first.pid}.*--home DIR") as caught:
            HomeLock(tmp_path).acquire()
        assert (caught.value.code, caught.value.exit_status) == ("home_in_use", 75)
        assert (tmp_path / "lock").read_text() == f"{first.pid}\n"  # the one that lost didn't overwrite it
    finally:
        finish(first)
    with HomeLock(tmp_path):  # SIGKILL freed it
        pass


def test_a_lock_without_a_name_in_it_is_still_a_lock(tmp_path: Path) -> None:
    with HomeLock(tmp_path):
        (tmp_path / "lock").write_text("")
        with pytest.raises(StartError, match="in use by another process"):
            HomeLock(tmp_path).acquire()


def test_a_lock_is_not_inherited_by_children(tmp_path: Path) -> None:
    lock = HomeLock(tmp_path)
    lock.acquire()
    child = started()
    try:
        lock.release()
        with HomeLock(tmp_path):
            pass
    finally:
        finish(child)


def test_a_home_that_is_a_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    with pytest.raises(StartError, match=r"File exists.*--home DIR") as caught:
        HomeLock(tmp_path / "home").acquire()
    assert caught.value.code == "home_not_writable"
    with pytest.raises(StartError, match="Not a directory"):
        HomeLock(tmp_path / "home" / "below").acquire()


@pytest.mark.parametrize("call", ["open", "flock", "pwrite", "mkdir"])
@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EACCES, "home_not_writable"), (errno.EROFS, "home_not_writable"), (errno.ENOSPC, "disk_full")],
)
def test_a_home_that_cannot_be_written_is_told_by_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, code: str
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock" if call == "flock" else f"os.{call}", fail)
        with pytest.raises(SkulkError) as caught:
            HomeLock(tmp_path / "new" / "home").acquire()
    assert caught.value.code == code and str(tmp_path) in caught.value.detail
    with HomeLock(tmp_path / "new" / "home"):  # nothing stayed open or locked
        pass


def test_a_read_only_home_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(StartError, match="Permission denied"):
        HomeLock(tmp_path).acquire()
    tmp_path.chmod(0o700)


def test_the_ledger_holds_the_running_children(tmp_path: Path) -> None:
    ledger, first, second = ChildLedger(tmp_path), started(), started()
    try:
        ledger.add("nats-server", first.pid)
        ledger.add("runner-1", second.pid)
        assert [(entry["name"], entry["pid"]) for entry in read(tmp_path)] == [
            ("nats-server", first.pid),
            ("runner-1", second.pid),
        ]
        ledger.remove(first.pid)
        ledger.remove(first.pid)
        assert [entry["pid"] for entry in read(tmp_path)] == [second.pid]
    finally:
        finish(first)
        finish(second)


def test_a_ledger_on_a_full_disk_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    ledger = ChildLedger(tmp_path)
    monkeypatch.setattr(os, "write", full)
    ledger.add("me", os.getpid())
    ledger.remove(os.getpid())
    assert caplog.text.count("No room left on the disk") == 2


@pytest.mark.parametrize("argv", [SLEEPER, DEAF], ids=["polite", "deaf"])
def test_what_an_earlier_launcher_left_is_ended_by_the_next_start(tmp_path: Path, argv: tuple[str, ...]) -> None:
    child = started(argv)
    try:
        if argv is DEAF:
            assert child.stdout is not None and child.stdout.readline() == b"deaf\n"
        entry = entry_of(child.pid)
        write(tmp_path, entry)
        assert reap_leftovers(tmp_path, grace_s=5.0 if argv is SLEEPER else 0.1) == (entry,)
        assert await_gone(child.pid)
        assert read(tmp_path) == []
        assert reap_leftovers(tmp_path) == ()
    finally:
        finish(child)


def test_the_group_of_a_deaf_leftover_goes_with_it(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid, flush=True); time.sleep(60)"
    )
    child = started((sys.executable, "-c", code))
    try:
        assert child.stdout is not None
        grandchild = int(child.stdout.readline())
        write(tmp_path, entry_of(child.pid))
        reap_leftovers(tmp_path, grace_s=0.1)
        assert await_gone(grandchild)
    finally:
        finish(child)


def test_a_stranger_with_the_same_number_is_left_alone(tmp_path: Path) -> None:
    stranger = started()
    try:
        write(tmp_path, entry_of(stranger.pid, shift_s=5.0), entry_of(os.getpid()), entry_of(1))
        assert reap_leftovers(tmp_path) == ()
        assert stranger.poll() is None
        assert read(tmp_path) == []
    finally:
        finish(stranger)


@pytest.mark.parametrize("body", [b"", b"{", b'{"children": [{"name": 1}]}', b"\xff"])
def test_a_damaged_list_ends_nobody_and_is_started_anew(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "children.json").write_bytes(body)
    assert reap_leftovers(tmp_path) == ()
    assert read(tmp_path) == []


def test_a_list_that_cannot_be_written_back_is_the_homes_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    for number, kind in ((errno.EROFS, StartError), (errno.ENOSPC, ServiceError)):

        def fail(*_: object, number: int = number) -> int:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", fail)
            with pytest.raises(kind):
                reap_leftovers(tmp_path)
