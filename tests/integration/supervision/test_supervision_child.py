"""Real child processes: readiness in its three forms, output, the ladder of the end."""

from __future__ import annotations

import asyncio
import os
import sys
import textwrap
from pathlib import Path

import msgspec
import psutil
import pytest

from skulk.errors import RequestError, StartError
from skulk.supervision import child as child_module
from skulk.supervision.child import Child, ExitReport
from skulk.supervision.log_file import RotatedLog
from tests.support.child_processes import POLITE, ROOT, await_gone, python_spec

READY_THEN = "from skulk.supervision.ready import announce_ready\nimport os, signal, sys, time\n"


class MemoryLedger:
    def __init__(self) -> None:
        self.entries: list[tuple[str, str, int]] = []

    def add(self, name: str, pid: int) -> None:
        self.entries.append(("add", name, pid))

    def remove(self, pid: int) -> None:
        self.entries.append(("remove", "", pid))


async def test_a_child_gets_its_spec_announces_itself_and_leaves_at_the_end_of_stdin() -> None:
    ledger = MemoryLedger()
    child = Child(python_spec(POLITE, stdin=b'{"model": "m"}', drain_s=20.0), ledger=ledger)
    ready = await child.start()
    assert ready.fields["spec"] == '{"model": "m"}'
    assert ready.fields["pid"] == child.pid  # exec keeps the number: there is no wrapper process
    assert ready.fields["sid"] == child.pid  # a session of its own
    report = await child.stop()
    assert (report.returncode, report.signal_name, report.was_stopped) == (0, None, True)
    assert report.last_lines == ("parent gone",)
    assert child.exit_report is report and child.exited.result() is report
    assert ledger.entries == [("add", "tester", child.pid), ("remove", "", child.pid)]


async def test_a_spec_larger_than_a_pipe_arrives_whole() -> None:
    code = READY_THEN + textwrap.dedent("""
        from skulk.supervision.ready import read_spec
        announce_ready({"bytes": len(read_spec())})
        time.sleep(60)
    """)
    child = Child(python_spec(code, stdin=b"x" * 300_000, drain_s=0.0))
    assert (await child.start()).fields == {"bytes": 300_000}
    await child.stop()


async def test_a_child_without_stdin_reads_nothing_and_is_not_drained() -> None:
    code = READY_THEN + "announce_ready({'stdin': sys.stdin.read(), 'nice': os.nice(0)})\ntime.sleep(60)"
    child = Child(python_spec(code, nice=3, drain_s=60.0))
    assert (await child.start()).fields == {"stdin": "", "nice": os.nice(0) + 3}
    assert (await child.stop()).signal_name == "SIGTERM"


async def test_an_announced_error_is_raised_with_its_code() -> None:
    code = """
        from skulk.errors import RequestError
        from skulk.supervision.ready import announce_error
        announce_error(RequestError("model_file_invalid", "x.gguf is cut short: 10 of 20 bytes."))
    """
    child = Child(python_spec(textwrap.dedent(code)))
    with pytest.raises(RequestError, match="10 of 20 bytes") as caught:
        await child.start()
    assert caught.value.code == "model_file_invalid"
    assert child.exit_report is not None


@pytest.mark.parametrize("line", ["no json", "[1]", "x" * 70_000])
async def test_an_announcement_that_is_none_is_refused(line: str) -> None:
    code = f"import os, time; os.write(int(os.environ['SKULK_READY_FD']), {line!r}.encode() + b'\\n'); time.sleep(60)"
    with pytest.raises(StartError, match="no announcement"):
        await Child(python_spec(code)).start()


async def test_a_child_that_ends_before_it_is_ready_tells_its_last_line() -> None:
    child = Child(python_spec("import sys; print('cannot open /dev/kfd', file=sys.stderr); sys.exit(3)"))
    with pytest.raises(StartError, match=r"before it was ready.*exited with status 3.*cannot open /dev/kfd") as caught:
        await child.start()
    assert caught.value.code == "child_failed"


async def test_a_child_that_is_not_ready_in_time_is_killed() -> None:
    child = Child(python_spec("import time; time.sleep(60)", ready_timeout_s=0.3))
    with pytest.raises(StartError, match=r"wasn't ready within 0\.3 s"):
        await child.start()
    assert child.exit_report is not None and child.exit_report.signal_name == "SIGKILL"


@pytest.mark.parametrize("is_late", [False, True])
async def test_a_cancelled_start_leaves_no_process(is_late: bool) -> None:
    seen = asyncio.Event()
    spec = python_spec("print('here', flush=True)\nimport time; time.sleep(60)")
    child = Child(spec, on_line=lambda _: seen.set())
    start = asyncio.create_task(child.start())
    if is_late:
        await seen.wait()
    else:
        await asyncio.sleep(0)  # its first step: the process is made, its pipes aren't read yet
    assert child.pid is not None
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert child.exit_report is not None
    assert await_gone(child.exit_report.pid)


async def test_a_missing_program_is_told_by_its_name() -> None:
    spec = msgspec.structs.replace(python_spec(""), argv=("/nowhere/skulk-nothing",))
    with pytest.raises(StartError, match=r"status 127.*can't execute /nowhere/skulk-nothing: No such file"):
        await Child(spec).start()


async def test_a_missing_working_folder_leaves_nothing_open(tmp_path: Path) -> None:
    child = Child(python_spec("", cwd=tmp_path / "none"))
    with pytest.raises(FileNotFoundError):
        await child.start()
    assert child.pid is None


async def test_readiness_by_a_log_line_gives_its_named_groups(tmp_path: Path) -> None:
    code = "import time; print('starting'); print('listening on 127.0.0.1:4222', flush=True); time.sleep(60)"
    seen: list[str] = []
    spec = python_spec(code, ready=r"log_line:listening on \S+:(?P<port>\d+)", log_path=tmp_path / "logs" / "x.log")
    child = Child(spec, on_line=seen.append)
    assert (await child.start()).fields == {"port": "4222"}
    await child.stop()
    assert seen == ["starting", "listening on 127.0.0.1:4222"]
    assert await asyncio.to_thread((tmp_path / "logs" / "x.log").read_text) == "starting\nlistening on 127.0.0.1:4222\n"


async def test_output_without_end_fills_neither_memory_nor_disk(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    code = "import sys; sys.stdout.write('y' * 3_000_000); print(); [print('line', n) for n in range(20_000)]"
    child = Child(python_spec(code, ready="", log_path=log, log_bytes=50_000))
    await child.start()
    report = await child.exited
    assert report.last_lines == tuple(f"line {n}" for n in range(19_980, 20_000))
    assert sorted(os.listdir(tmp_path)) == ["x.log", "x.log.1"]
    new, old = await asyncio.to_thread(lambda: (log.read_bytes(), (tmp_path / "x.log.1").read_bytes()))
    assert len(new) + len(old) <= 50_000
    assert new.endswith(b"line 19999\n")


async def test_a_log_that_cannot_be_written_does_not_disturb_the_child() -> None:
    log = RotatedLog(Path("/dev/full"), 1_000_000)
    log.write(b"lost")
    log.close()
    assert log.dropped == 1
    child = Child(python_spec("print('spoken')", ready="", log_path=Path("/dev/full")))
    await child.start()
    assert (await child.exited).last_lines == ("spoken",)


STUBBORN = (
    READY_THEN
    + """
signal.signal(signal.SIGTERM, lambda *_: print("got TERM", flush=True))
announce_ready({})
try:
    sys.stdin.read()
    print("got the end of stdin", flush=True)
except OSError:
    pass
while True:
    time.sleep(60)
"""
)


async def test_the_ladder_goes_from_drain_to_term_to_kill() -> None:
    child = Child(python_spec(STUBBORN, stdin=b"", drain_s=2.0, term_s=2.0))
    await child.start()
    drained = asyncio.create_task(child.line("end of stdin", 20.0))
    termed = asyncio.create_task(child.line("got TERM", 20.0))
    await asyncio.sleep(0)
    report = await child.stop()
    await drained
    await termed
    assert report.last_lines == ("got the end of stdin", "got TERM")
    assert (report.signal_name, report.was_stopped) == ("SIGKILL", True)


async def test_the_owners_drain_comes_first_and_term_follows_at_once() -> None:
    child = Child(python_spec(READY_THEN + "announce_ready({})\ntime.sleep(60)", stdin=b"", drain_s=60.0))
    await child.start()
    order: list[str] = []

    async def drain() -> None:
        order.append(f"alive {child.exit_report is None}")

    report = await child.stop(drain)
    assert order == ["alive True"] and report.signal_name == "SIGTERM"


@pytest.mark.parametrize("kind", ["hangs", "fails"])
async def test_a_drain_that_hangs_or_fails_does_not_keep_the_child(kind: str) -> None:
    child = Child(python_spec(READY_THEN + "announce_ready({})\ntime.sleep(60)", drain_s=0.2))
    await child.start()

    async def drain() -> None:
        if kind == "fails":
            raise StartError("child_failed", "the bus is away")
        await asyncio.Event().wait()

    assert (await child.stop(drain)).signal_name == "SIGTERM"


async def test_a_drain_is_given_up_when_the_child_ends_meanwhile() -> None:
    child = Child(python_spec(READY_THEN + "announce_ready({})\ntime.sleep(60)", drain_s=600.0))
    await child.start()

    async def drain() -> None:
        child.kill("its last hour came")
        await asyncio.Event().wait()

    report = await child.stop(drain)
    assert report.sentence.startswith(f"tester (pid {child.pid}) was killed: its last hour came, after ")


async def test_a_frozen_child_still_takes_term() -> None:
    child = Child(python_spec(READY_THEN + "announce_ready({})\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(60)"))
    await child.start()
    assert (await child.stop()).signal_name == "SIGTERM"


async def test_two_stops_share_one_ladder_and_a_cancelled_stop_kills() -> None:
    child = Child(python_spec(STUBBORN, stdin=b"", drain_s=60.0, term_s=60.0))
    await child.start()
    first = asyncio.create_task(child.stop())
    second = asyncio.create_task(child.stop())
    await child.line("end of stdin", 20.0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert (await second).signal_name == "SIGKILL"


async def test_a_cancelled_wait_for_the_end_leaves_the_others_waiting() -> None:
    child = Child(python_spec(POLITE, stdin=b"{}"))
    await child.start()
    child.exited.cancel()
    waiting = child.exited
    child.kill()
    assert (await waiting).signal_name == "SIGKILL"


async def test_the_whole_group_dies_with_its_leader() -> None:
    code = READY_THEN + textwrap.dedent("""
        import subprocess
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        announce_ready({"grandchild": grandchild.pid})
        sys.stdin.read()
    """)
    for end in ("exits", "killed"):
        child = Child(python_spec(code, stdin=b""))
        grandchild = (await child.start()).fields["grandchild"]
        assert isinstance(grandchild, int) and psutil.pid_exists(grandchild)
        if end == "killed":
            child.kill()
            await child.exited
        else:
            assert (await child.stop()).returncode == 0
        assert await_gone(grandchild)


async def test_a_daemon_that_keeps_the_pipe_does_not_keep_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "OUTPUT_WAIT_S", 0.1)
    code = textwrap.dedent("""
        import subprocess, sys
        print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True).pid)
    """)
    child = Child(python_spec(code, ready=""))
    await child.start()
    report = await child.exited
    daemon = psutil.Process(int(report.last_lines[0]))
    assert daemon.is_running()
    daemon.kill()
    assert await_gone(daemon.pid)


async def test_waiting_for_a_line_ends_with_the_line_the_time_or_the_child() -> None:
    code = READY_THEN + "announce_ready({})\nfor word in sys.stdin: print('heard', word, flush=True)"
    child = Child(python_spec(code, stdin=b"hello"))
    await child.start()
    with pytest.raises(TimeoutError):
        await child.line("never said", 0.05)
    ended = asyncio.create_task(child.line("never said", 60.0))
    await asyncio.sleep(0)
    await child.stop()
    with pytest.raises(StartError, match="exited with status 0"):
        await ended


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
async def test_a_child_inherits_no_secret_pipe_of_a_brother() -> None:
    listing = READY_THEN + "announce_ready({'fds': sorted(os.listdir('/proc/self/fd'))})\nsys.stdin.read()"
    brother = Child(python_spec(POLITE, stdin=b"{}"))
    await brother.start()
    child = Child(python_spec(listing, stdin=b""))
    fields = (await child.start()).fields
    # 0 to 2, the ready pipe, the listing itself.
    assert isinstance(fields["fds"], list) and len(fields["fds"]) <= 5
    await asyncio.gather(child.stop(), brother.stop())


def test_the_sentences_of_an_end() -> None:
    report = ExitReport(
        name="runner-1",
        pid=7,
        returncode=-9,
        signal_name="SIGKILL",
        was_stopped=False,
        kill_reason=None,
        last_lines=("loading", " "),
        lived_s=3.21,
    )
    assert report.last_words == (
        "runner-1 (pid 7) was killed by SIGKILL, by a person or by the kernel for want of memory, after 3.2 s. "
        "Its last line: loading"
    )
    segv = msgspec.structs.replace(report, returncode=-11, signal_name="SIGSEGV", last_lines=())
    assert segv.last_words == "runner-1 (pid 7) was killed by SIGSEGV after 3.2 s."


async def test_the_childs_side_says_nothing_when_started_by_hand() -> None:
    code = READY_THEN + textwrap.dedent("""
        import asyncio
        from skulk.errors import StartError
        from skulk.supervision.ready import parent_gone, read_spec
        announce_ready({"nobody": "listens"})
        try:
            read_spec()
        except StartError as error:
            print(error.code, "skulk up" in error.detail)
        async def main():
            try:
                async with asyncio.timeout(0.05):
                    await parent_gone()
            except TimeoutError:
                print("no parent to follow")
        asyncio.run(main())
    """)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    out, _ = await process.communicate()
    assert out.decode().splitlines() == ["config_invalid True", "no parent to follow"]
    assert process.returncode == 0
