"""One process group of ours: made, signalled and reaped without ever touching a stranger's process.

A process that ended stays a zombie, and its number stays taken, until it is reaped. So a thread waits for the end
*without* reaping (`wait_for_exit`), the event loop then kills what is left of the group and reaps
(`ProcessGroup.reap`): every signal is sent from the loop, before the reaping, to a number that is certainly ours.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Final, cast

_TRAMPOLINE: Final = Path(__file__).with_name("trampoline.py")


class ProcessGroup:
    """A child in its own session, which makes it the leader of its own process group.

    Must be made on the main thread: on Linux the kernel kills the child when the *thread* that made it ends.

    Args:
        argv: the program and its arguments; found on PATH where it names no folder.
        env: the whole environment.
        cwd: its folder; None: ours.
        nice: added to our niceness.
        with_stdin: a pipe whose end tells the child that we are gone; else ``/dev/null``.
        pass_fds: descriptors it inherits beside 0 to 2.

    Attributes:
        pid: number of the leader and of the group.
        stdin, output: our ends; `output` carries stdout and stderr in the order they were written.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path | None = None,
        nice: int = 0,
        with_stdin: bool = False,
        pass_fds: Sequence[int] = (),
    ) -> None:
        assert threading.current_thread() is threading.main_thread(), "a child dies with the thread that starts it"
        assert argv and sys.executable
        trampoline = [sys.executable, "-I", "-S", str(_TRAMPOLINE), str(os.getpid()), str(nice), "--"]
        self._popen = subprocess.Popen(
            [*trampoline, *argv],
            stdin=subprocess.PIPE if with_stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            cwd=cwd,
            env=dict(env),
            pass_fds=pass_fds,
            start_new_session=True,
        )
        self.pid: Final = self._popen.pid
        self.stdin: Final = cast("IO[bytes] | None", self._popen.stdin)
        self.output: Final = cast("IO[bytes]", self._popen.stdout)
        self._is_reaped = False

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the leader; nothing happens when it is gone."""
        if not self._is_reaped:
            # By number and not by Popen.send_signal, which would poll, and so reap, first.
            os.kill(self.pid, number)

    def kill_group(self) -> None:
        """SIGKILL to the leader and to everything it started that stayed in its group."""
        if not self._is_reaped:
            # A group of nothing but the zombie leader is refused by macOS (EPERM) and taken by Linux.
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> int:
        """End the rest of the group and free the number; only after `wait_for_exit` reported.

        Returns:
            The exit status, or minus the signal that killed it.
        """
        self.kill_group()
        returncode = self._popen.wait()
        self._is_reaped = True
        return returncode

    def watch(self, on_exit: Callable[[], None]) -> None:
        """Call ``on_exit`` once in the running event loop when the leader ended; costs one sleeping thread."""
        loop = asyncio.get_running_loop()

        def wait() -> None:
            wait_for_exit(self.pid)
            # The loop may be closed by now; then nobody is left to tell.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(on_exit)

        threading.Thread(target=wait, name=f"wait-{self.pid}", daemon=True).start()


if sys.platform == "darwin":
    import select

    def wait_for_exit(pid: int) -> None:
        """Block until the child ``pid`` ended, and leave it to be reaped."""
        queue = select.kqueue()
        event = select.kevent(
            pid,
            filter=select.KQ_FILTER_PROC,
            flags=select.KQ_EV_ADD | select.KQ_EV_ONESHOT,
            fflags=select.KQ_NOTE_EXIT,
        )
        # An unreaped child that has ended already can't be watched any more: that is an answer as well.
        with suppress(ProcessLookupError):
            queue.control([event], 1)
        queue.close()

else:

    def wait_for_exit(pid: int) -> None:
        """Block until the child ``pid`` ended, and leave it to be reaped."""
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
