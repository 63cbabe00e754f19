"""A child process from its start to its last word: `ChildSpec`, `Child`, `Ready`, `ExitReport`.

| state    | entered by                             | left by                                          |
|----------|----------------------------------------|--------------------------------------------------|
| starting | `Child.start`                          | its announcement -> ready; end or time -> ended  |
| ready    | `start` returned                       | its end, `stop`, `kill` -> ended                 |
| stopping | `stop`: drain, then TERM, then KILL    | its end -> ended                                 |
| ended    | the process is reaped, its output read | never                                            |

Whoever starts a child owns it: `start` that raises or is cancelled leaves no process, and after `start` returned the
owner awaits `stop` or `exited`. Everything here runs in the event loop of the main thread; there is no lock.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Final, Protocol

import msgspec

from skulk.clock import Clock, SystemClock
from skulk.errors import StartError, error_of
from skulk.supervision.lines import LineSplitter
from skulk.supervision.log_file import DEFAULT_BYTES, RotatedLog
from skulk.supervision.process import ProcessGroup
from skulk.supervision.ready import READY_FD, READY_LIMIT, Announcement

LAST_LINES: Final = 20
OUTPUT_WAIT_S: Final = 1.0  # for the end of the output after the end of the process
_LOG_LINE: Final = "log_line:"
_LOG: Final = logging.getLogger(__name__)


class ChildSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to run and how patient to be with it.

    Attributes:
        name: for people: logs, errors, the home's list of children.
        argv: program and arguments. Never a secret: every user of the machine can read them.
        env: added to our own environment.
        cwd: its folder; None: ours.
        nice: added to our niceness.
        stdin: its specification, one line of JSON without the end of line. The pipe stays open, so that its end
            tells the child that its parent is gone. None: stdin is ``/dev/null``; ``b""``: the pipe and no line.
        log_path: where its output goes, line by line; None: only the last lines are kept, in memory.
        log_bytes: room for that file and its predecessor together.
        ready: how readiness shows: ``"fd"`` (see `skulk.supervision.ready`), ``"log_line:<regex>"`` (searched in
            each line of output; named groups become `Ready.fields`), ``""``: at once.
        ready_timeout_s: a child that isn't ready by then is killed.
        drain_s: how long `stop` lets it finish its work.
        term_s: how long `stop` then waits after SIGTERM before SIGKILL.
    """

    name: str
    argv: tuple[str, ...]
    env: dict[str, str] = {}
    cwd: Path | None = None
    nice: int = 0
    stdin: bytes | None = None
    log_path: Path | None = None
    log_bytes: int = DEFAULT_BYTES
    ready: str = "fd"
    ready_timeout_s: float = 30.0
    drain_s: float = 10.0
    term_s: float = 5.0

    def __post_init__(self) -> None:
        assert self.argv, "a child needs a program"
        assert self.ready in ("", "fd") or self.ready.startswith(_LOG_LINE), self.ready
        assert self.stdin is None or b"\n" not in self.stdin, "the specification is one line"


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """A child serves: the JSON object it announced, or the named groups of its log line."""

    fields: dict[str, object]


class ExitReport(msgspec.Struct, frozen=True, kw_only=True):
    """How a child ended.

    Attributes:
        name, pid: which.
        returncode: its exit status, or minus the signal that killed it.
        signal_name: that signal, as in ``"SIGKILL"``.
        was_stopped: its owner had called `Child.stop`: no crash.
        kill_reason: why its owner had called `Child.kill`.
        last_lines: the end of its output, at most 20 lines of at most 8 KiB.
        lived_s: from its start.
    """

    name: str
    pid: int
    returncode: int
    signal_name: str | None
    was_stopped: bool
    kill_reason: str | None
    last_lines: tuple[str, ...]
    lived_s: float

    @property
    def sentence(self) -> str:
        """What happened, for people: ``runner-1 (pid 77) was killed by SIGKILL after 3.2 s.``"""
        if self.kill_reason is not None:
            how = f"was killed: {self.kill_reason},"
        elif self.signal_name == "SIGKILL" and not self.was_stopped:
            how = "was killed by SIGKILL, by a person or by the kernel for want of memory,"
        elif self.signal_name is not None:
            how = f"was killed by {self.signal_name}"
        else:
            how = f"exited with status {self.returncode}"
        return f"{self.name} (pid {self.pid}) {how} after {self.lived_s:.1f} s."

    @property
    def last_words(self) -> str:
        """`sentence` and the last line of output that isn't blank."""
        line = next((line for line in reversed(self.last_lines) if line.strip()), None)
        return self.sentence if line is None else f"{self.sentence} Its last line: {line.strip()}"


class Ledger(Protocol):
    """Where running children are written down, for the next start (`skulk.supervision.home.ChildLedger`)."""

    def add(self, name: str, pid: int) -> None: ...

    def remove(self, pid: int) -> None: ...


class Child:
    """One life of one child process.

    Args:
        spec: what to run.
        ledger: told of its start and end.
        on_line: called with each line of output; must be quick and must not raise.
        clock: for `ExitReport.lived_s`.
    """

    def __init__(
        self,
        spec: ChildSpec,
        *,
        ledger: Ledger | None = None,
        on_line: Callable[[str], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.spec: Final = spec
        self.exit_report: ExitReport | None = None
        self._ledger = ledger
        self._on_line = on_line
        self._clock: Clock = clock or SystemClock()
        self._ready_pattern = (
            re.compile(spec.ready.removeprefix(_LOG_LINE)) if spec.ready.startswith(_LOG_LINE) else None
        )
        self._log = RotatedLog(spec.log_path, spec.log_bytes) if spec.log_path is not None else None
        self._last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._watches: list[tuple[re.Pattern[str], asyncio.Future[re.Match[str]]]] = []
        self._group: ProcessGroup | None = None
        self._stdin: asyncio.WriteTransport | None = None
        self._transports: list[asyncio.BaseTransport] = []
        self._files: list[IO[bytes]] = []  # not yet in the hands of a transport
        self._open_pipes = 0
        self._returncode: int | None = None
        self._started_at = 0.0
        self._was_stopped = False
        self._kill_reason: str | None = None
        self._ready: asyncio.Future[Ready]
        self._exited: asyncio.Future[ExitReport]

    @property
    def pid(self) -> int | None:
        """Its number once started, also after its end."""
        return None if self._group is None else self._group.pid

    @property
    def exited(self) -> asyncio.Future[ExitReport]:
        """Done when the process is reaped, its group gone and its output read. Cancelling it cancels only the wait."""
        return asyncio.shield(self._exited)

    async def start(self) -> Ready:
        """Start the process and wait until it is ready.

        Returns:
            What the child announced.

        Raises:
            StartError: ``child_failed``: it ended or wasn't ready in time; the process is gone then.
            SkulkError: the one that the child announced.
            OSError: no process or pipe could be made.
        """
        assert self._group is None, "a child has one life"
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        self._exited = loop.create_future()
        ready = None
        try:
            await self._spawn(loop)
            async with asyncio.timeout(self.spec.ready_timeout_s):
                ready = await self._ready
            return ready
        except TimeoutError as error:
            self.kill(f"it wasn't ready within {self.spec.ready_timeout_s:g} s")
            raise StartError("child_failed", (await self.exited).last_words) from error
        finally:
            if ready is None:
                self._ready.cancel()
                await self.end()

    async def stop(self, drain: Callable[[], Awaitable[object]] | None = None) -> ExitReport:
        """End the child: drain, then SIGTERM, then SIGKILL of the whole group.

        Drain, for at most ``drain_s``, is the owner's ``drain`` (returns when the work is done; then TERM follows at
        once). Without it, it is the end of the child's stdin, which a child that awaits `ready.parent_gone` takes
        as the request to finish and leave. A child without stdin, or not yet ready, goes to TERM at once.

        A second call waits with the first. When the caller is cancelled the group is killed at once.
        """
        assert self._group is not None, "not started"
        if self._was_stopped or self._exited.done():
            return await self.exited
        self._was_stopped = True
        try:
            await self._drain(drain)
            self._group.signal(signal.SIGTERM)
            # A stopped process handles TERM only when it goes on.
            self._group.signal(signal.SIGCONT)
            if not await self._ended_within(self.spec.term_s):
                self.kill()
            return await self.exited
        finally:
            await self.end()

    def kill(self, reason: str | None = None) -> None:
        """SIGKILL to the whole group, now; the end shows in `exited`.

        Args:
            reason: for `ExitReport`: why, as in "it didn't answer two pings"; the first one given counts.
        """
        if self._group is not None and self._returncode is None:
            self._kill_reason = self._kill_reason or reason
            self._group.kill_group()

    async def end(self) -> None:
        """Kill the group, if it isn't gone, and wait for its end."""
        if self._group is not None:
            self.kill()
            await self.exited

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process; nothing happens when it has ended."""
        if self._group is not None:
            self._group.signal(number)

    async def line(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """Wait for the next line of output in which ``pattern`` is found; call it before the cause of the line.

        Raises:
            TimeoutError: no such line within ``timeout_s``.
            StartError: ``child_failed``; the child ended first.
        """
        found: asyncio.Future[re.Match[str]] = asyncio.get_running_loop().create_future()
        watch = (re.compile(pattern), found)
        self._watches.append(watch)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.wait((found, self._exited), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._watches.remove(watch)
        if not found.done():
            assert self.exit_report is not None
            raise StartError("child_failed", self.exit_report.last_words)
        return found.result()

    async def _spawn(self, loop: asyncio.AbstractEventLoop) -> None:
        spec = self.spec
        env = {**os.environ, **spec.env}
        env.pop(READY_FD, None)
        self._started_at = self._clock.now()
        announcements: IO[bytes] | None = None
        if spec.ready == "fd":
            reader, writer = os.pipe()
            announcements = os.fdopen(reader, "rb", buffering=0)
            self._files.append(announcements)
            try:
                self._group = self._make_group({**env, READY_FD: str(writer)}, (writer,))
            finally:
                # Ours must be closed, or the end of the child's would never show.
                os.close(writer)
        else:
            self._group = self._make_group(env, ())
        group = self._group
        self._files += [file for file in (group.output, group.stdin) if file is not None]
        group.watch(self._on_process_end)
        if self._ledger is not None:
            self._ledger.add(spec.name, group.pid)
        await self._connect(loop, group, announcements)
        if spec.ready == "" and not self._ready.done():
            self._ready.set_result(Ready(fields={}))

    def _make_group(self, env: dict[str, str], pass_fds: tuple[int, ...]) -> ProcessGroup:
        try:
            return ProcessGroup(
                self.spec.argv,
                env=env,
                cwd=self.spec.cwd,
                nice=self.spec.nice,
                with_stdin=self.spec.stdin is not None,
                pass_fds=pass_fds,
            )
        except OSError:
            self._close_files()
            raise

    async def _connect(self, loop: asyncio.AbstractEventLoop, group: ProcessGroup, ready: IO[bytes] | None) -> None:
        if group.stdin is not None:
            self._stdin, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, group.stdin)
            self._own(self._stdin, group.stdin)
            if self.spec.stdin:
                self._stdin.write(self.spec.stdin + b"\n")
        self._open_pipes = 1 if ready is None else 2
        output, _ = await loop.connect_read_pipe(self._output_reader, group.output)
        self._own(output, group.output)
        if ready is not None:
            announcements, _ = await loop.connect_read_pipe(self._ready_reader, ready)
            self._own(announcements, ready)

    def _own(self, transport: asyncio.BaseTransport, file: IO[bytes]) -> None:
        self._transports.append(transport)
        self._files.remove(file)

    def _output_reader(self) -> _Reader:
        splitter = LineSplitter()

        def feed(part: bytes) -> None:
            for line in splitter.feed(part) if part else splitter.flush():
                self._on_output(line)

        return _Reader(feed, self._on_pipe_end)

    def _ready_reader(self) -> _Reader:
        seen = bytearray()

        def feed(part: bytes) -> None:
            if not self._ready.done():
                seen.extend(part)
                if b"\n" in part or len(seen) > READY_LIMIT:
                    self._on_announcement(bytes(seen))

        return _Reader(feed, self._on_pipe_end)

    def _on_output(self, line: bytes) -> None:
        if self._log is not None:
            self._log.write(line)
        text = line.decode(errors="replace")
        self._last_lines.append(text)
        if self._ready_pattern is not None and not self._ready.done():
            match = self._ready_pattern.search(text)
            if match is not None:
                self._ready.set_result(Ready(fields=dict(match.groupdict())))
        for pattern, found in self._watches:
            match = pattern.search(text)
            if match is not None and not found.done():
                found.set_result(match)
        if self._on_line is not None:
            self._on_line(text)

    def _on_announcement(self, line: bytes) -> None:
        try:
            message = msgspec.json.decode(line, type=Announcement)
        except msgspec.DecodeError as error:
            text = f"{self.spec.name} announced something that is no announcement: {error}."
            self._ready.set_exception(StartError("child_failed", text))
            return
        if message.error is not None:
            self._ready.set_exception(error_of(message.error.code, message.error.detail))
        else:
            self._ready.set_result(Ready(fields=message.ready or {}))

    def _on_process_end(self) -> None:
        assert self._group is not None
        self._returncode = self._group.reap()
        if self._ledger is not None:
            self._ledger.remove(self._group.pid)
        # A process that left the group may hold our pipes open for ever.
        asyncio.get_running_loop().call_later(OUTPUT_WAIT_S, self._finish)
        self._finish_if_read()

    def _on_pipe_end(self) -> None:
        self._open_pipes -= 1
        self._finish_if_read()

    def _finish_if_read(self) -> None:
        if self._returncode is not None and self._open_pipes == 0:
            self._finish()

    def _finish(self) -> None:
        if self.exit_report is not None:
            return
        assert self._group is not None and self._returncode is not None
        number = self._returncode
        self.exit_report = ExitReport(
            name=self.spec.name,
            pid=self._group.pid,
            returncode=number,
            signal_name=signal.Signals(-number).name if number < 0 else None,
            was_stopped=self._was_stopped,
            kill_reason=self._kill_reason,
            last_lines=tuple(self._last_lines),
            lived_s=self._clock.now() - self._started_at,
        )
        self._close_files()
        if not self._ready.done():
            detail = f"It ended before it was ready. {self.exit_report.last_words}"
            self._ready.set_exception(StartError("child_failed", detail))
        self._exited.set_result(self.exit_report)

    def _close_files(self) -> None:
        for transport in self._transports:
            transport.close()
        for file in self._files:
            file.close()
        self._files.clear()
        if self._log is not None:
            self._log.close()

    async def _drain(self, drain: Callable[[], Awaitable[object]] | None) -> None:
        if self._ready.cancelled() or not self._ready.done() or self._ready.exception() is not None:
            return
        if drain is None:
            if self._stdin is not None:
                self._stdin.close()
                await self._ended_within(self.spec.drain_s)
            return
        work = asyncio.ensure_future(drain())
        await asyncio.wait((work, self._exited), timeout=self.spec.drain_s, return_when=asyncio.FIRST_COMPLETED)
        work.cancel()
        # Whatever became of it, the child has to go.
        (outcome,) = await asyncio.gather(work, return_exceptions=True)
        if isinstance(outcome, Exception):
            _LOG.warning("draining %s failed: %s", self.spec.name, outcome)

    async def _ended_within(self, timeout_s: float) -> bool:
        await asyncio.wait((self._exited,), timeout=timeout_s)
        return self._exited.done()


class _Reader(asyncio.Protocol):
    """Bytes of one pipe to a function; an empty part is the end, after which ``on_end`` is called."""

    def __init__(self, feed: Callable[[bytes], None], on_end: Callable[[], None]) -> None:
        self._feed = feed
        self._on_end = on_end

    def data_received(self, data: bytes) -> None:
        self._feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._feed(b"")
        self._on_end()
