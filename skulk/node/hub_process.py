"""The child process that talks to the hub and to neighbours: its task on stdin, lines of JSON on stdout, then its end.

huggingface_hub blocks inside its calls, so only a process can be cancelled or killed and mean it. The end of stdin and
every signal end it at once: whatever it leaves is resumed by the next one.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import msgspec

from skulk.errors import ServiceError, SkulkError, StartError
from skulk.logs import configure_logging
from skulk.models.tasks import HubTask, Line, run_task
from skulk.supervision.ready import announce_error, announce_ready, read_spec
from skulk.wire.base import decode


def main() -> int:
    """Does one task; returns the exit status."""
    try:
        told = decode(read_spec(), HubTask)
    except SkulkError as error:
        refused = error if not isinstance(error, ServiceError) else StartError("config_invalid", error.detail)
        announce_error(refused)
        return refused.exit_status
    configure_logging(told.log_format, told.log_level, "hub", secrets=(told.token,) if told.token else ())
    threading.Thread(target=_leave_with_the_parent, name="parent", daemon=True).start()
    announce_ready({})
    return 0 if run_task(told, _say) else 1


_SPEAKING = threading.Lock()


def _say(line: Line) -> None:
    body = msgspec.json.encode(line) + b"\n"
    with _SPEAKING:
        sys.stdout.buffer.write(body)
        sys.stdout.buffer.flush()


def _leave_with_the_parent() -> None:
    """Ends this process when its parent closes stdin: a thread that waits in a socket can't be asked to."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
