"""The first thing a child executes: bind its life to its parent's, then become the real program.

Run by path as ``python -I -S trampoline.py <expected parent pid> <nice> -- <argv...>``; it imports nothing of Skulk.
A program in another language (nats-server) can't ask the kernel for the signal itself, and a hook between fork and
exec in the parent isn't safe beside threads; a process that asks for itself and then calls exec is.

Linux ties the signal to the *thread* that forked, which is why `skulk.supervision.child` starts children from the
main thread only.
"""

from __future__ import annotations

import os
import signal
import sys

PR_SET_PDEATHSIG = 1
NOT_FOUND = 127
NOT_EXECUTABLE = 126


def die_with_parent(expected_parent: int) -> None:
    """Have the kernel kill this process when the thread that made it ends; Linux only, else nothing happens."""
    if not sys.platform.startswith("linux"):
        return
    try:
        import ctypes  # some Pythons are built without it, and a child without the bond is better than none

        if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            _say(f"prctl(PR_SET_PDEATHSIG) failed: {os.strerror(ctypes.get_errno())}")
    except (ImportError, OSError, AttributeError) as error:
        _say(f"this child isn't bound to its parent: {error}")
    # The parent may have died before the call above, and then no signal comes any more.
    if os.getppid() != expected_parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def main(argv: list[str]) -> int:
    """Never returns but with the exit status of a failed exec: 127 not found, 126 not executable."""
    parent, nice, dashes, *command = argv
    assert dashes == "--", argv
    die_with_parent(int(parent))
    if int(nice):
        os.nice(int(nice))
    # Python ignores these two, and a signal that is ignored stays ignored over exec.
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        _say(f"can't execute {command[0]}: {error.strerror}")
        return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
