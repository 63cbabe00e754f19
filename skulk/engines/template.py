"""Renders chat templates in a process of their own (`template_worker`), which is ended when a template won't.

idle ──render──> worker running ──answer──> worker idle
                      └── over its limits: the kernel ends it; `template_failed`; the next rendering starts a new one
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from skulk.engines.template_worker import read_frame, write_frame
from skulk.errors import RequestError, ServiceError
from skulk.units import MIB, format_bytes

log = logging.getLogger(__name__)


class TemplateLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one rendering may take.

    Attributes:
        cpu_s: processor time: a busy machine doesn't make a template fail.
        wall_s: time on the clock, in case it waits for something.
        output_bytes: rendered text.
        memory_bytes: beyond what the process needs anyway (Linux only).
        start_s: for the process to come up, on a machine that is busy loading a model.
    """

    cpu_s: float = 2.0
    wall_s: float = 10.0
    output_bytes: int = 4 * MIB
    memory_bytes: int = 256 * MIB
    start_s: float = 60.0


LIMITS: Final = TemplateLimits()

# Signals by which the worker's own timers end it; SIGKILL is ours, when it didn't answer.
_TIME_SIGNALS: Final = (signal.SIGPROF, signal.SIGALRM, signal.SIGKILL)
_WALL_GRACE_S: Final = 2.0
# An idle worker ends at once when its stdin does.
_STOP_S: Final = 2.0


class TemplateRenderer:
    """One template. `render` may be called from any thread; renderings take turns."""

    def __init__(self, source: str, limits: TemplateLimits = LIMITS) -> None:
        self._source = source
        self._limits = limits
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def start(self) -> None:
        """Starts the worker ahead of the first rendering.

        Raises:
            ServiceError: ``runner_failed``: it doesn't come up.
        """
        with self._lock:
            self._ensure()

    def render(self, variables: Mapping[str, Any], nonce: str) -> str:
        """The template's text.

        Args:
            variables: JSON values.
            nonce: digits of the request's stand-ins (`skulk.engines.shield`).

        Raises:
            RequestError: ``template_failed``: it refused, raised, took too long or grew too large.
            ServiceError: ``runner_failed``: its process doesn't start.
        """
        with self._lock:
            worker = self._ensure()
            frame = self._exchange(
                worker, {"nonce": nonce, "variables": variables}, self._limits.wall_s + _WALL_GRACE_S
            )
            if frame is None:
                raise self._death(worker)
        match frame:
            case {"text": str(text)}:
                return text
            case {"refused": str(reason)}:
                raise RequestError("template_failed", f"the model's chat template refuses this conversation: {reason}")
            case {"failed": str(reason)}:
                raise RequestError("template_failed", f"the model's chat template can't be rendered: {reason}.")
            case _:
                raise AssertionError(f"an answer that no worker gives: {frame!r}")

    def close(self) -> None:
        """Ends the worker. A rendering that is under way ends first; none can follow."""
        with self._lock:
            self._is_closed = True
            self._stop()

    def _ensure(self) -> subprocess.Popen[bytes]:
        assert not self._is_closed, "the renderer was closed"
        if self._worker is not None and self._worker.poll() is None:
            return self._worker
        self._stop()
        self._worker = worker = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("template_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        setup = {
            "template": self._source,
            "max_bytes": self._limits.output_bytes,
            "memory_bytes": self._limits.memory_bytes,
            "cpu_s": self._limits.cpu_s,
            "wall_s": self._limits.wall_s,
        }
        if self._exchange(worker, setup, self._limits.start_s) is None:
            self._stop()
            raise ServiceError(
                "runner_failed", f"the process for chat templates did not start (status {worker.returncode})."
            )
        return worker

    def _exchange(self, worker: subprocess.Popen[bytes], frame: dict[str, Any], limit_s: float) -> Any:
        """Sends a frame and reads the answer; None: the process ended, or was ended at its limit."""
        assert worker.stdin is not None and worker.stdout is not None
        watchdog = threading.Timer(limit_s, worker.kill)
        watchdog.name = "template-watchdog"
        watchdog.daemon = True
        watchdog.start()
        try:
            write_frame(worker.stdin, frame)
            return read_frame(worker.stdout)
        except OSError:
            return None
        finally:
            watchdog.cancel()

    def _death(self, worker: subprocess.Popen[bytes]) -> RequestError:
        self._stop()
        ended_by = -worker.returncode
        limits = self._limits
        log.warning("a chat template's process ended with status %d", worker.returncode)
        if ended_by in _TIME_SIGNALS:
            return RequestError(
                "template_failed",
                f"the model's chat template took longer than {limits.cpu_s:g} s for this conversation and was stopped.",
            )
        return RequestError(
            "template_failed",
            f"the model's chat template ended its process (status {worker.returncode}); it may use at most "
            f"{format_bytes(limits.memory_bytes)} of memory.",
        )

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is None:
            return
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.close()
        except OSError:
            # Bytes that a dead process never took can't be flushed; the descriptor is closed all the same.
            log.debug("a dead template process left unread bytes")
        try:
            worker.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
        worker.stdout.close()
