"""The home folder belongs to one `skulk up` at a time, and knows which children that one has.

    <home>/lock            flock held while the launcher lives; holds its process id, for people
    <home>/children.json   name, pid and start time of every running child

On Linux the kernel ends the children with their launcher (`skulk.supervision.trampoline`). Elsewhere the next start
ends what ``children.json`` names, and nothing else: a number that went to another process has another start time.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

import msgspec
import psutil

from skulk.errors import SkulkError, StartError
from skulk.files import disk_full_error, is_disk_full, write_atomic

# Start times are computed from the time of boot, which a corrected clock moves a little. No system hands out a process
# number twice within a second.
START_TOLERANCE_S: Final = 1.0
_LOG: Final = logging.getLogger(__name__)


class HomeLock:
    """Holds ``<home>/lock`` from `acquire` to `release` or the end of the process, however it ends.

    Args:
        home: the state folder; made, readable by its owner only, where it is missing.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._file: int | None = None

    def __enter__(self) -> HomeLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock or say who has it; never waits.

        Raises:
            StartError: ``home_in_use``, ``home_not_writable``.
            ServiceError: ``disk_full``.
        """
        assert self._file is None, "already held"
        try:
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Not inherited by children: a child that outlived us would keep the home locked.
            file = os.open(self._home / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _home_error(self._home, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(file, 32, 0).decode(errors="replace").strip()
            os.close(file)
            who = f"process {holder}" if holder.isdecimal() else "another process"
            raise StartError(
                "home_in_use",
                f"The home folder {self._home} is in use by {who}. Stop that one (kill {holder or 'it'}), "
                "or start this node with a folder of its own: --home DIR.",
            ) from error
        except OSError as error:
            os.close(file)
            raise _home_error(self._home, error) from error
        self._file = file

    def release(self) -> None:
        """Give the lock back; the file stays, as removing it would let two processes hold two locks."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


class ChildEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One running child; ``started_at`` in seconds since the epoch, as the system tells it."""

    name: str
    pid: int
    started_at: float


class _Children(msgspec.Struct, frozen=True, kw_only=True):
    children: tuple[ChildEntry, ...] = ()


class ChildLedger:
    """Writes ``<home>/children.json``; only for the holder of the home's lock, after `reap_leftovers`.

    A list that can't be written is told in the log and stops nothing: it matters only if this launcher is killed on a
    system that leaves children behind.
    """

    def __init__(self, home: Path) -> None:
        self._path = home / "children.json"
        self._entries: dict[int, ChildEntry] = {}

    def add(self, name: str, pid: int) -> None:
        """Note a child that was just started and not reaped yet."""
        with suppress(psutil.Error):
            self._entries[pid] = ChildEntry(name=name, pid=pid, started_at=psutil.Process(pid).create_time())
            self._write()

    def remove(self, pid: int) -> None:
        """Forget a child that ended."""
        if self._entries.pop(pid, None) is not None:
            self._write()

    def _write(self) -> None:
        try:
            # No fsync: a power cut ends the children as well.
            _write_children(self._path, tuple(self._entries.values()), fsync=False)
        except (OSError, SkulkError) as error:
            _LOG.warning("the list of children isn't written: %s", error)


def reap_leftovers(home: Path, grace_s: float = 3.0) -> tuple[ChildEntry, ...]:
    """End the children that a launcher killed earlier left behind: SIGTERM, then SIGKILL to the group.

    For the holder of the home's lock. Blocks a little longer than ``grace_s`` at most, and not at all where
    none is left.

    Returns:
        Those that were still running.

    Raises:
        StartError: ``home_not_writable``.
        ServiceError: ``disk_full``.
    """
    path = home / "children.json"
    try:
        listed = msgspec.json.decode(path.read_bytes(), type=_Children).children
    except FileNotFoundError:
        return ()
    except msgspec.DecodeError as error:
        _LOG.warning("%s isn't readable and is started anew: %s", path, error)
        listed = ()
    except OSError as error:
        raise _home_error(home, error) from error
    left = [(entry, process) for entry in listed if (process := _same_process(entry)) is not None]
    for entry, process in left:
        _LOG.warning("%s (pid %d) was left by an earlier start and is ended", entry.name, entry.pid)
        with suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs([process for _, process in left], timeout=grace_s)
    for process in alive:
        _kill_group(process)
    psutil.wait_procs(alive, timeout=1.0)
    try:
        _write_children(path, (), fsync=False)
    except OSError as error:
        raise _home_error(home, error) from error
    return tuple(entry for entry, _ in left)


def _same_process(entry: ChildEntry) -> psutil.Process | None:
    """The process that the entry means, if it still runs."""
    # 0 and 1 would be whole groups or the system itself; a file that somebody edited must not get us there.
    if entry.pid <= 1 or entry.pid == os.getpid():
        return None
    try:
        process = psutil.Process(entry.pid)
        is_same = abs(process.create_time() - entry.started_at) <= START_TOLERANCE_S
        return process if is_same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _kill_group(process: psutil.Process) -> None:
    with suppress(psutil.Error, ProcessLookupError, PermissionError):
        # psutil compares the start time once more before it lets a signal go.
        if process.is_running() and os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _write_children(path: Path, entries: tuple[ChildEntry, ...], *, fsync: bool) -> None:
    write_atomic(path, msgspec.json.encode(_Children(children=entries)) + b"\n", fsync=fsync)


def _home_error(home: Path, error: OSError) -> SkulkError:
    if is_disk_full(error):
        return disk_full_error(home / "lock", error)
    return StartError(
        "home_not_writable",
        f"The home folder {home} can't be used: {error.strerror or error}. "
        "Make it a folder that this user may write to, or choose another one with --home DIR.",
    )
