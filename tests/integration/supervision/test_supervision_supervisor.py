"""One supervised child: its crashes, its refusals, its end, with real processes and short back-offs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from skulk.errors import RequestError, SkulkError, StartError, UnavailableError
from skulk.supervision.child import Child, ChildSpec, ExitReport, Ready
from skulk.supervision.restarts import GiveUp, RestartAfter, RestartPolicy
from skulk.supervision.supervisor import Crash, Supervised
from tests.support.child_processes import POLITE, await_gone, python_spec

QUICK = RestartPolicy(first_s=0.01, longest_s=0.02, budget=3, advice="Read the log.")
SLEEPER = "from skulk.supervision.ready import announce_ready\nimport time\nannounce_ready({})\ntime.sleep(60)"
CRASHER = "import sys; print('no such device'); sys.exit(4)"
REFUSER = """
from skulk.errors import {kind}
from skulk.supervision.ready import announce_error
announce_error({kind}({code!r}, "It is so."))
"""


def polite() -> ChildSpec:
    return python_spec(POLITE, stdin=b"{}")


@asynccontextmanager
async def running(supervised: Supervised) -> AsyncGenerator[asyncio.Task[GiveUp | None]]:
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(60.0):
        task = tasks.create_task(supervised.run(), name=supervised.name)
        yield task
        await supervised.stop()
        await task


async def test_a_child_that_is_killed_comes_back_and_both_are_told() -> None:
    lives: asyncio.Queue[tuple[Child, Ready]] = asyncio.Queue(10)
    crashes: list[Crash] = []
    supervised = Supervised(
        "echo",
        polite,
        policy=QUICK,
        on_ready=lambda child, ready: lives.put_nowait((child, ready)),
        on_exit=crashes.append,
    )
    assert supervised.pid is None
    async with running(supervised) as task:
        first, ready = await lives.get()
        assert await supervised.wait_ready() is first and ready.fields["pid"] == first.pid == supervised.pid
        assert first.pid is not None
        psutil.Process(first.pid).kill()
        second, _ = await lives.get()
        assert second.pid != first.pid and supervised.child is second and supervised.restarts == 1
        assert [(crash.code, crash.was_ready, crash.decision) for crash in crashes] == [
            ("child_failed", True, RestartAfter(delay_s=0.01))
        ]
        assert crashes[0].report is not None and crashes[0].report.signal_name == "SIGKILL"
    assert task.result() is None
    assert second.exit_report is not None and second.exit_report.was_stopped
    assert supervised.pid is None and len(crashes) == 1


async def test_a_child_that_never_gets_ready_is_given_up_with_its_last_line() -> None:
    crashes: list[Crash] = []
    supervised = Supervised("bad", lambda: python_spec(CRASHER), policy=QUICK, on_exit=crashes.append)
    async with running(supervised) as task:
        with pytest.raises(StartError, match=r"no such device.*3 crashes within 10 min.*Read the log\.") as caught:
            await supervised.wait_ready()
        assert caught.value.code == "child_failed"
        decision = await task
        assert isinstance(decision, GiveUp) and decision.detail == caught.value.detail
    assert [crash.was_ready for crash in crashes] == [False] * 3
    assert crashes[-1].decision == decision


@pytest.mark.parametrize("kind", [RequestError, UnavailableError])
async def test_a_refusal_is_final_unless_it_may_pass(kind: type[SkulkError]) -> None:
    code = "model_file_invalid" if kind is RequestError else "overloaded"
    crashes: list[Crash] = []
    program = REFUSER.format(kind=kind.__name__, code=code)
    supervised = Supervised("runner", lambda: python_spec(program), policy=QUICK, on_exit=crashes.append)
    async with running(supervised):
        with pytest.raises(SkulkError, match=r"It is so\.") as caught:
            await supervised.wait_ready()
    if kind is RequestError:
        assert caught.value.code == code and len(crashes) == 1
    else:
        assert caught.value.code == "child_failed" and [crash.code for crash in crashes] == [code] * 3


async def test_a_spec_that_cannot_be_made_is_a_refusal() -> None:
    def no_spec() -> ChildSpec:
        raise StartError("config_invalid", "no weights")

    supervised = Supervised("runner", no_spec)
    async with running(supervised):
        with pytest.raises(StartError, match="no weights"):
            await supervised.wait_ready()


async def test_a_start_that_the_system_refuses_counts_as_a_crash(tmp_path: Path) -> None:
    supervised = Supervised("runner", lambda: python_spec("", cwd=tmp_path / "none"), policy=QUICK)
    async with running(supervised):
        with pytest.raises(StartError, match=r"runner can't start: .*none.*3 crashes"):
            await supervised.wait_ready()


async def test_the_owner_may_explain_a_failed_start() -> None:
    def explain(error: SkulkError, report: ExitReport | None) -> SkulkError:
        assert error.code == "child_failed" and report is not None
        return StartError("port_in_use", f"read in its output: {report.last_lines[-1]}")

    supervised = Supervised("server", lambda: python_spec(CRASHER), policy=QUICK, explain=explain)
    async with running(supervised):
        with pytest.raises(StartError, match="read in its output: no such device") as caught:
            await supervised.wait_ready()
    assert caught.value.code == "port_in_use" and supervised.restarts == 0


@pytest.mark.parametrize("moment", ["before", "starting", "waiting"])
async def test_it_can_be_stopped_at_any_moment(moment: str) -> None:
    slow = RestartPolicy(first_s=3600.0, longest_s=3600.0)
    crashed = asyncio.Event()
    seen = asyncio.Event()
    code = CRASHER if moment == "waiting" else "print('loading', flush=True)\nimport time; time.sleep(60)"
    supervised = Supervised(
        "slow",
        lambda: python_spec(code, stdin=b"", drain_s=3600.0),
        policy=slow,
        on_exit=lambda _: crashed.set(),
        on_line=lambda _: seen.set(),
    )
    if moment == "before":
        await supervised.stop()
    async with running(supervised) as task:
        if moment == "starting":
            await seen.wait()
        elif moment == "waiting":
            await crashed.wait()
        await supervised.stop()
        assert await task is None
        with pytest.raises(StartError, match="was stopped"):
            await supervised.wait_ready()


async def test_a_stop_drains_only_a_child_that_serves() -> None:
    drained: list[str] = []

    async def drain() -> None:
        drained.append("drained")

    supervised = Supervised("runner", lambda: python_spec(SLEEPER))
    async with running(supervised):
        child = await supervised.wait_ready()
        await supervised.stop(drain)
    assert drained == ["drained"]
    assert child.exit_report is not None and child.exit_report.signal_name == "SIGTERM"


async def test_a_cancelled_run_kills_its_child() -> None:
    supervised = Supervised("runner", polite)
    task = asyncio.create_task(supervised.run())
    child = await supervised.wait_ready()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert child.pid is not None and await_gone(child.pid)


async def test_an_owner_whose_callback_fails_gets_the_failure_and_no_orphan() -> None:
    def on_ready(child: Child, _: Ready) -> None:
        raise ZeroDivisionError(str(child.pid))

    with pytest.raises(ZeroDivisionError) as caught:
        await Supervised("runner", polite, on_ready=on_ready).run()
    assert await_gone(int(str(caught.value)))
