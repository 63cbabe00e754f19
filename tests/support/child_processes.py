"""Small programs to supervise, and the proof that nothing of them stays."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil

from skulk.supervision.child import ChildSpec

ROOT = Path(__file__).resolve().parents[2]
GONE_S = 10.0

# A whole well-behaved child: takes its spec, announces it, leaves when its parent is gone.
POLITE = """
import asyncio, os
from skulk.supervision.ready import announce_ready, parent_gone, read_spec
spec = read_spec()
async def main():
    announce_ready({"spec": spec.decode(), "pid": os.getpid(), "sid": os.getsid(0)})
    await parent_gone()
    print("parent gone", flush=True)
asyncio.run(main())
"""


def python_spec(code: str, **changes: object) -> ChildSpec:
    """A child that runs ``code`` in a fresh interpreter that can import the project."""
    fields: dict[str, object] = {
        "name": "tester",
        "argv": (sys.executable, "-c", code),
        "env": {"PYTHONPATH": str(ROOT)},
        "ready_timeout_s": 20.0,
        **changes,
    }
    return ChildSpec(**fields)  # pyright: ignore[reportArgumentType]


def await_gone(pid: int, timeout_s: float = GONE_S) -> bool:
    """Whether the process ``pid``, whoever's child it is, ended (a zombie has) within ``timeout_s``."""
    try:
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            process.wait(timeout_s)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


@contextmanager
def no_process_left() -> Generator[None]:
    """Fail when the block leaves a process that it started; kills it first."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    left = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    lines = [f"{process.pid} {' '.join(process.cmdline())} ({process.status()})" for process in left]
    for process in left:
        process.kill()
        process.wait(GONE_S)
    assert not lines, "left running:\n" + "\n".join(lines)
