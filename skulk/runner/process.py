"""The runner's process: its specification from stdin, its signals, its exit status.

first SIGTERM or SIGINT, or stdin ends   drain: refuse new requests, let running ones finish
any of them again                        at once
stdin ends because the parent is dead    at once: nobody is left who could deliver an answer
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from typing import Final, NoReturn

import msgspec

from skulk.bus.nats_bus import NatsBus
from skulk.clock import SystemClock
from skulk.engines.protocol import Engine, EngineInfo, LoadSpec, Progress
from skulk.engines.registry import loader_for
from skulk.errors import ServiceError, SkulkError, StartError
from skulk.logs import configure_logging
from skulk.runner.canary import listen_to
from skulk.runner.runner import Runner
from skulk.supervision.ready import announce_error, announce_ready, parent_gone, read_spec
from skulk.wire.base import decode
from skulk.wire.runner import EXIT_FAILED, EXIT_SPEC, RunnerSpec

NICENESS: Final = 5
CONNECT_S: Final = 10.0
PARENT_LOOK_S: Final = 0.1

log = logging.getLogger(__name__)


def main() -> NoReturn:
    """Runs one runner to its end; the exit status is one of `skulk.wire.runner`."""
    status = _run()
    logging.shutdown()
    if threading.active_count() > 1:
        # A thread in a native call, or in a template, must not hold the process back.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def _run() -> int:
    # Interactive work on the machine, and the node's own heartbeats, come first.
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    parent = os.getppid()
    try:
        spec = parse_spec(read_spec())
    except StartError as error:
        announce_error(error)
        print(error.detail, file=sys.stderr)  # noqa: T201 - logging isn't configured without a specification
        return EXIT_SPEC
    configure_logging(spec.log_format, spec.log_level, spec.runner_id, secrets=(spec.password,))
    return asyncio.run(serve(spec, parent))


def parse_spec(line: bytes) -> RunnerSpec:
    """The specification that a node wrote.

    Raises:
        StartError: ``config_invalid``.
    """
    try:
        return decode(line, RunnerSpec)
    except ServiceError as error:
        raise StartError(
            "config_invalid", f"a runner is started by a node, with its specification on stdin: {error.detail}"
        ) from error


def load_spec(spec: RunnerSpec) -> LoadSpec:
    """What the engine is told, from what the node told us."""
    return msgspec.convert(spec.load, LoadSpec, from_attributes=True)


async def serve(spec: RunnerSpec, parent: int) -> int:
    """Connects, serves, and follows signals and the parent. Returns the exit status."""
    bus = NatsBus(
        spec.nats_url,
        cluster=spec.cluster,
        name=f"runner {spec.runner_id}",
        user=spec.user or None,
        password=spec.password or None,
    )
    try:
        await bus.connect(CONNECT_S)
    except StartError as error:
        # Not announced as a refusal: a nats-server that restarts is there again at the next attempt.
        log.error("%s", error.detail)
        return EXIT_FAILED

    def load(progress: Progress) -> Engine:
        engine = loader_for(spec.load.backend)(load_spec(spec), progress)
        try:
            tps = listen_to(engine, spec)
            loop.call_soon_threadsafe(lambda: runner.status.note(decode_tps=round(tps, 2)))
        except BaseException:
            engine.close()
            raise
        return engine

    loop = asyncio.get_running_loop()
    runner = Runner(spec, bus, SystemClock(), load, on_ready=_announce_ready, on_refused=_announce_refusal)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, runner.stop)
    following = asyncio.create_task(_follow_parent(runner, parent), name="follow the parent")
    try:
        return await runner.run()
    finally:
        following.cancel()
        await asyncio.wait({following})
        await bus.close()


async def _follow_parent(runner: Runner, parent: int) -> None:
    await parent_gone()
    runner.stop()
    # A process that dies closes its pipes before its children get another parent; and it may die during the drain.
    while os.getppid() == parent:  # noqa: ASYNC110 - the kernel tells nobody
        await asyncio.sleep(PARENT_LOOK_S)
    log.warning("the node that started this runner is gone: stopping at once")
    runner.stop()


def _announce_ready(info: EngineInfo) -> None:
    announce_ready({"engine": info.engine, "version": info.version, "n_ctx": info.n_ctx, "n_parallel": info.n_parallel})


def _announce_refusal(error: SkulkError) -> None:
    log.error("%s", error.detail)
    announce_error(error)
