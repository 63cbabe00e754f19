"""A runner from its load to its exit status, by every way out."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from skulk.bus.subjects import RUNNER_GENERATE
from skulk.engines.fake import FakeOptions
from skulk.engines.protocol import Engine, LoadSpec, Progress
from skulk.errors import ServiceError, StartError, UnavailableError
from skulk.runner.process import load_spec, parse_spec
from skulk.runner.runner import shape_of
from skulk.wire.base import encode
from skulk.wire.generation import Usage
from skulk.wire.runner import EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, RunnerLoad, RunnerSpec
from tests.support.runners import RUNNER, RunnerWorld, fake_answer, generate_of, runner_world, spec_of


async def refused_code(world: RunnerWorld) -> str:
    with pytest.raises(UnavailableError) as refused:
        await world.ask(generate_of("refused"))
    return refused.value.code


async def test_it_loads_warms_up_and_is_ready(tmp_path: Path) -> None:
    async with runner_world(tmp_path, restarts=3, reserved_bytes=77) as world:
        status = world.statuses.all[-1]
        assert world.statuses.phases[-1] == "ready"
        assert set(world.statuses.phases) <= {"loading", "warming", "ready"}
        assert (status.runner_id, status.instance_id, status.epoch, status.restarts) == (RUNNER, "inst", 1, 3)
        assert (status.n_ctx, status.reserved_bytes, status.progress) == (1024, 77, 1.0)
        assert [info.engine for info in world.ready] == ["fake"]


async def test_it_says_at_least_once_a_second_that_it_is_there(tmp_path: Path) -> None:
    async with runner_world(tmp_path) as world:
        count = len(world.statuses.all)
        await world.statuses.until(lambda _: len(world.statuses.all) >= count + 2)
        assert world.statuses.all[-1].memory_bytes > 0


async def test_before_it_is_ready_requests_are_refused_and_progress_is_told(tmp_path: Path) -> None:
    async with runner_world(tmp_path, options=FakeOptions(load_s=1.0), wait_ready=False) as world:
        await world.statuses.until(lambda status: status.phase == "loading")
        assert await refused_code(world) == "instance_not_ready"
        for _ in range(5):
            world.gate.let(1)
        await world.statuses.until(lambda status: status.phase == "loading" and 0.0 < status.progress < 1.0)
        for _ in range(5):
            world.gate.let(1)
        await world.statuses.until(lambda status: status.phase == "ready")
        assert (await (await world.generate(generate_of())).finish()).text() == fake_answer()


async def test_a_model_that_cannot_be_loaded_is_refused_for_good(tmp_path: Path) -> None:
    async with runner_world(tmp_path, options=FakeOptions(load_error="cut short"), wait_ready=False) as world:
        assert await world.exit_status() == EXIT_REFUSED
        status = world.statuses.all[-1]
        assert status.phase == "failed"
        assert status.error is not None
        assert (status.error.code, status.error.detail) == ("model_file_invalid", "cut short")
        assert [error.code for error in world.refused] == ["model_file_invalid"]
        assert world.ready == []


@pytest.mark.parametrize(
    ("error", "exit_status", "code"),
    [
        (ServiceError("runner_failed", "not enough memory"), EXIT_FAILED, "runner_failed"),
        (StartError("engine_missing", "install it"), EXIT_REFUSED, "engine_missing"),
        (ZeroDivisionError("oops"), EXIT_FAILED, "runner_failed"),
    ],
)
async def test_the_exit_status_says_whether_a_new_start_may_help(
    tmp_path: Path, error: Exception, exit_status: int, code: str
) -> None:
    def fail(_: Engine) -> Engine:
        raise error

    async with runner_world(tmp_path, wrap=fail, wait_ready=False) as world:
        assert await world.exit_status() == exit_status
        assert world.statuses.all[-1].error is not None
        assert world.statuses.all[-1].error.code == code


async def test_a_failing_engine_ends_every_stream_and_the_process(tmp_path: Path) -> None:
    options = FakeOptions(fail_at_step=3)
    async with runner_world(tmp_path, gated=True, options=options, n_parallel=1) as world:
        running = await world.generate(generate_of("a"))
        waiting = await world.generate(generate_of("b"))
        world.gate.open()
        await running.finish()
        await waiting.finish()
        assert (running.error_code, waiting.error_code) == ("runner_failed", "runner_failed")
        assert running.end.error is not None
        assert running.end.error.retryable
        assert running.end.usage == Usage(prompt_tokens=6, completion_tokens=2)
        assert await refused_code(world) == "instance_not_ready"
        assert await world.exit_status() == EXIT_FAILED
        assert world.statuses.all[-1].phase == "failed"
        assert world.statuses.all[-1].error is not None
        assert "step 3" in world.statuses.all[-1].error.detail


async def test_a_polite_stop_lets_running_streams_finish(tmp_path: Path) -> None:
    async with runner_world(tmp_path, gated=True) as world:
        stream = await world.generate(generate_of())
        await world.gate.arrived(1)
        world.runner.stop()
        await world.statuses.until(lambda status: status.phase == "draining")
        assert await refused_code(world) == "draining"
        world.gate.open()
        assert (await stream.finish()).text() == fake_answer()
        assert await world.exit_status() == EXIT_STOPPED
        assert world.statuses.all[-1].phase == "stopped"


async def test_a_second_stop_ends_them_at_once(tmp_path: Path) -> None:
    async with runner_world(tmp_path, gated=True) as world:
        stream = await world.generate(generate_of())
        await world.gate.arrived(1)
        world.runner.stop()
        world.runner.stop()
        await world.statuses.until(lambda status: status.phase == "draining")
        world.gate.let(1)
        await stream.finish()
        assert stream.error_code == "draining"
        assert await world.exit_status() == EXIT_STOPPED


async def test_the_drain_has_an_end_and_an_engine_in_a_long_step_cannot_hold_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skulk.runner.runner.ENDING_S", 0.1)
    async with runner_world(tmp_path, gated=True, drain_timeout_s=0.05) as world:
        stream = await world.generate(generate_of())
        await world.gate.arrived(1)
        world.runner.stop()
        await stream.finish()
        assert stream.error_code == "draining"
        assert await world.exit_status() == EXIT_STOPPED


async def test_a_stop_cancels_the_load(tmp_path: Path) -> None:
    async with runner_world(tmp_path, options=FakeOptions(load_s=1.0), wait_ready=False) as world:
        await world.statuses.until(lambda status: status.phase == "loading")
        world.runner.stop()
        world.gate.let(1)
        assert await world.exit_status() == EXIT_STOPPED
        assert world.ready == []
        assert world.statuses.all[-1].phase == "stopped"


async def test_an_idle_runner_stops_without_waiting(tmp_path: Path) -> None:
    async with runner_world(tmp_path, drain_timeout_s=600.0) as world:
        world.runner.stop()
        assert await world.exit_status() == EXIT_STOPPED
        with pytest.raises(UnavailableError) as gone:
            await world.bus.request(RUNNER_GENERATE, generate_of(), timeout_s=5.0, runner=RUNNER)
        assert gone.value.code == "unreachable"


async def test_more_reports_than_may_be_ahead_hold_the_engine_back_not_the_loop(tmp_path: Path) -> None:
    async with runner_world(tmp_path, options=FakeOptions(answer_tokens=400)) as world:
        names = [str(number) for number in range(4)]
        streams = await asyncio.gather(*(world.generate(generate_of(name)) for name in names))
        for stream in streams:
            assert len((await stream.finish()).tokens) == 401


def test_the_load_is_told_to_the_engine_field_by_field() -> None:
    assert RunnerLoad.__struct_fields__ == LoadSpec.__struct_fields__
    spec = spec_of("/x", n_threads=3, kv_type="q8_0", sha256="ab")
    assert msgspec.structs.asdict(load_spec(spec)) == msgspec.structs.asdict(spec.load)


def test_a_specification_survives_its_line_and_a_wrong_one_is_refused() -> None:
    spec = spec_of("/x", password="secret")
    line = encode(spec)
    assert b"\n" not in line
    assert parse_spec(line) == spec
    for wrong in (b"", b"{}", b"[1]", b'{"runner_id": 3}'):
        with pytest.raises(StartError) as refused:
            parse_spec(wrong)
        assert refused.value.code == "config_invalid"


def info_of(spec: RunnerSpec, **changes: object) -> object:
    from skulk.engines.protocol import EngineInfo

    info = EngineInfo(
        engine="fake",
        version="1",
        backend="fake-cpu",
        architecture="fake",
        n_ctx=spec.load.context_length,
        n_parallel=spec.load.n_parallel,
        n_batch=spec.load.n_batch,
        vocabulary_size=10,
        has_template=True,
        kv_cells=spec.load.kv_cells // 256 * 256,
    )
    return msgspec.structs.replace(info, **changes)


def test_the_shape_follows_what_was_really_loaded() -> None:
    whole = spec_of("/x", context_length=1000, n_parallel=4, kv_cells=4000)
    shape = shape_of(info_of(whole, n_ctx=768, kv_cells=4 * 768), whole)  # type: ignore[arg-type]
    assert (shape.n_ctx, shape.kv_cells, shape.n_parallel) == (768, 4 * 768, 4)
    shared = spec_of("/x", context_length=1000, n_parallel=16, kv_cells=3000)
    shape = shape_of(info_of(shared), shared)  # type: ignore[arg-type]
    assert shape.kv_cells == 2816, "what engines round down to"
    tiny = spec_of("/x", context_length=8, n_parallel=4, kv_cells=32, n_batch=4, n_ubatch=512)
    shape = shape_of(info_of(tiny), tiny)  # type: ignore[arg-type]
    assert (shape.n_parallel, shape.n_batch, shape.n_ubatch) == (3, 4, 4)


async def test_the_engine_thread_hears_of_a_stop_at_each_progress() -> None:
    from skulk.clock import SystemClock
    from skulk.engines.protocol import LoadCancelled
    from skulk.runner.engine_thread import EngineThread
    from skulk.runner.reports import Loading, Report, Stopped

    reports: list[Report] = []
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()

    def post(report: Report) -> None:
        reports.append(report)
        if isinstance(report, Stopped):
            loop.call_soon_threadsafe(ended.set)

    def load(progress: Progress) -> Engine:
        for part in range(1000):
            if not progress(part / 1000):
                raise LoadCancelled
            if part == 5:
                thread.stop()
        raise AssertionError("the load was not cancelled")

    thread = EngineThread(load, lambda _: pytest.fail("nothing was loaded"), post, SystemClock())
    thread.start()
    async with asyncio.timeout(20.0):
        await ended.wait()
    assert [report.progress for report in reports if isinstance(report, Loading)] == [0.0], "told in steps of 1 %"


async def test_the_engine_thread_is_at_most_so_many_reports_ahead() -> None:
    from skulk.clock import SystemClock
    from skulk.engines.protocol import LoadCancelled
    from skulk.runner.engine_thread import REPORTS_AHEAD, EngineThread
    from skulk.runner.reports import Report, Stopped

    loop = asyncio.get_running_loop()
    reports: asyncio.Queue[Report] = asyncio.Queue()
    told = 0

    def load(progress: Progress) -> Engine:
        nonlocal told
        for told in range(100):
            if not progress(told / 50):
                raise LoadCancelled
        raise LoadCancelled

    def post(report: Report) -> None:
        loop.call_soon_threadsafe(reports.put_nowait, report)

    thread = EngineThread(load, lambda _: pytest.fail("nothing was loaded"), post, SystemClock())
    thread.start()
    async with asyncio.timeout(20.0):
        for _ in range(REPORTS_AHEAD):
            await reports.get()
        for more in range(3):
            # the next one waits for room: nothing comes, however long it has
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reports.get(), 0.05)
            assert told == REPORTS_AHEAD + more
            thread.taken()
            await reports.get()
        while not isinstance(await _taken(thread, reports), Stopped):
            pass
    assert told == 99


async def _taken(thread: Any, reports: asyncio.Queue[Any]) -> Any:
    thread.taken()
    return await reports.get()


async def test_a_defect_while_a_request_is_taken_ends_that_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with runner_world(tmp_path) as world:
        with monkeypatch.context() as patched:
            patched.setattr("skulk.bus.streams.Outbox.open", lambda *_: 1 / 0)
            with pytest.raises(ServiceError, match="ZeroDivisionError") as failed:
                await world.ask(generate_of("a"))
        assert failed.value.code == "internal"
        assert "could not be taken" in caplog.text
        assert (await (await world.generate(generate_of("a"))).finish()).text() == fake_answer()


async def test_a_status_that_the_bus_did_not_take_is_said_again(tmp_path: Path) -> None:
    async with runner_world(tmp_path, options=FakeOptions(load_s=1.0), wait_ready=False) as world:
        await world.statuses.until(lambda status: status.phase == "loading")
        world.hub.disconnect(world.runner_bus)
        world.gate.open()
        async with asyncio.timeout(20.0):
            while not world.ready:  # noqa: ASYNC110 - it can't tell while it is disconnected
                await asyncio.sleep(0.01)
        assert world.statuses.all[-1].phase != "ready"
        world.hub.reconnect(world.runner_bus)
        await world.statuses.until(lambda status: status.phase == "ready")
        assert (await (await world.generate(generate_of())).finish()).text() == fake_answer()
