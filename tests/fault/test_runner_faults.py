"""Runner processes that die, hang or lose their parent: nothing is left behind, and what remains tells the truth."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from skulk.engines.fake import FakeOptions
from skulk.errors import UnavailableError
from skulk.wire.base import encode
from skulk.wire.runner import EXIT_FAILED
from tests.support.child_processes import ROOT, await_gone, no_process_left
from tests.support.nats import NatsServer
from tests.support.runner_processes import fake_spec, gateway_on, model_spec, running
from tests.support.runners import fake_answer, generate_of

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-m", "skulk.runner"], stdin=subprocess.PIPE)
child.stdin.write(sys.stdin.buffer.readline())
child.stdin.flush()
print(child.pid, flush=True)
sys.stdin.readline()
child.stdin.close()
time.sleep(0.5)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with NatsServer() as server:
        yield server


async def test_sigkill_in_a_stream_leaves_nothing_and_the_next_runner_serves(server: NatsServer) -> None:
    spec = model_spec(server)
    with no_process_left():
        async with gateway_on(server) as gateway:
            async with running(spec) as child:
                stream = await gateway.generate(generate_of(max_tokens=400))
                await stream.read(lambda stream: len(stream.tokens) >= 3)
                assert child.pid is not None
                family = psutil.Process(child.pid).children(recursive=True)
                os.kill(child.pid, signal.SIGKILL)
                report = await asyncio.wait_for(child.exited, 30.0)
                assert report.signal_name == "SIGKILL"
                for process in family:
                    assert await asyncio.to_thread(await_gone, process.pid), "the template's worker is left"
                with pytest.raises(UnavailableError) as gone:
                    await gateway.generate(generate_of("next"))
                assert gone.value.code == "unreachable"
            async with running(spec):
                again = await gateway.generate(generate_of(attempt=2, max_tokens=5))
                assert len((await again.finish()).tokens) <= 5


async def test_a_crash_in_native_code_ends_only_the_process(server: NatsServer, tmp_path: Path) -> None:
    spec = fake_spec(tmp_path, server, FakeOptions(abort_at_step=5, step_s=0.2))
    async with gateway_on(server) as gateway, running(spec) as child:
        stream = await gateway.generate(generate_of())
        report = await asyncio.wait_for(child.exited, 30.0)
        assert report.signal_name == "SIGABRT"
        await stream.reader.close()


@pytest.mark.parametrize(
    ("options", "changes", "reason"),
    [
        (FakeOptions(fail_at_step=3, step_s=0.1), {}, "step 3"),
        (FakeOptions(hang_at_step=3), {"step_timeout_s": 1.0}, "SKULK_STEP_TIMEOUT_S"),
    ],
    ids=["fails", "hangs beyond its limit"],
)
async def test_an_engine_that_fails_or_hangs_tells_its_reason_and_ends_the_runner(
    server: NatsServer, tmp_path: Path, options: FakeOptions, changes: dict[str, float], reason: str
) -> None:
    spec = fake_spec(tmp_path, server, options, **changes)
    async with gateway_on(server) as gateway, running(spec) as child:
        stream = await (await gateway.generate(generate_of())).finish()
        assert stream.error_code == "runner_failed"
        assert len(stream.tokens) == 2
        assert (await asyncio.wait_for(child.exited, 30.0)).returncode == EXIT_FAILED
        status = await gateway.statuses.until(lambda status: status.phase == "failed")
        assert status.error is not None
        assert reason in status.error.detail


async def test_a_hanging_step_shows_as_age_and_cannot_hold_a_stop(server: NatsServer, tmp_path: Path) -> None:
    spec = fake_spec(tmp_path, server, FakeOptions(hang_at_step=3), drain_timeout_s=0.2)
    async with gateway_on(server) as gateway, running(spec) as child:
        stream = await gateway.generate(generate_of())
        await stream.read(lambda stream: len(stream.tokens) >= 2)
        async with asyncio.timeout(20.0):
            # The inbox tells nobody of an alive message.
            while stream.reader.state is None or stream.reader.state.step_age_s < 1.0:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        child.signal(signal.SIGTERM)
        assert (await stream.finish()).error_code == "draining"
        assert (await asyncio.wait_for(child.exited, 30.0)).returncode == 0


@pytest.mark.parametrize("dies", ["at once", "during the drain"])
async def test_a_dead_parent_takes_its_runner_with_it(server: NatsServer, tmp_path: Path, dies: str) -> None:
    """Without the kernel's help (a plain parent, no supervision): the end of stdin is enough, even in a stream."""
    line = encode(fake_spec(tmp_path, server, FakeOptions(step_s=0.05, answer_tokens=900)))
    parent = subprocess.Popen(  # noqa: ASYNC220 - the child watcher of asyncio would reap what others look at
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    runner = 0
    try:
        async with gateway_on(server) as gateway:
            parent.stdin.write(line + b"\n")
            parent.stdin.flush()
            runner = int(await asyncio.to_thread(parent.stdout.readline))
            await gateway.statuses.until(lambda status: status.phase == "ready")
            stream = await gateway.generate(generate_of())
            await stream.read(lambda stream: len(stream.tokens) >= 2)
            if dies == "at once":
                parent.kill()
            else:
                parent.stdin.write(b"\n")
                parent.stdin.flush()
            parent.wait()
            assert await asyncio.to_thread(await_gone, runner)
            assert (await stream.finish()).error_code == "draining"
    finally:
        parent.kill()
        parent.wait()
        parent.stdin.close()
        parent.stdout.close()
        if runner and psutil.pid_exists(runner):
            os.kill(runner, signal.SIGKILL)


async def test_a_broker_that_restarts_costs_no_token(tmp_path: Path) -> None:
    with NatsServer() as own:
        spec = fake_spec(tmp_path, own, FakeOptions(step_s=0.02, answer_tokens=200))
        async with gateway_on(own) as gateway, running(spec):
            watching = asyncio.create_task(gateway.inbox.run())
            stream = await gateway.generate(generate_of())
            await stream.read(lambda stream: len(stream.tokens) >= 10)
            own.kill()
            own.start()
            assert (await stream.finish()).text() == fake_answer(tokens=200)
            watching.cancel()
