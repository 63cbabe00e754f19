"""``skulk up``: starts a node, says where it answers, serves until it is told to stop.

first SIGINT or SIGTERM    graceful: running answers may end, then all processes stop; so does SIGHUP
a second one               at once
stdin closes               as the first, where another program of Skulk started this one (`skulk chat`)
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from typing import Final, Protocol

from skulk import __version__
from skulk.cli.chat import ask_aloud
from skulk.cli.client import connect
from skulk.cli.context import Context, note
from skulk.cli.interruptible import SIGNALS
from skulk.cli.placing import wait_for_instance, wait_ready
from skulk.errors import SkulkError, StartError
from skulk.logs import configure_logging
from skulk.settings import Settings
from skulk.settings_load import is_loopback
from skulk.settings_options import secrets_of
from skulk.supervision.ready import READY_FD, announce_error, announce_ready, parent_gone
from skulk.wire.commands import PlacementReply

log = logging.getLogger("skulk.cli")

GREETING: Final = "Name three rivers."
GREETING_LIMIT: Final = 128
PLACE_WAIT_S: Final = 60.0
HURRY_S: Final = 0.2
RESTARTING: Final = -1
"""What `up` returns where the node was asked to start again; no exit status."""


class Running(Protocol):
    """A started node."""

    node_id: str
    api_url: str
    placed: tuple[PlacementReply, ...]
    is_restarting: bool

    @property
    def nats_sub_line(self) -> str: ...

    def stop(self) -> None:
        """Has `wait` return."""
        ...

    async def wait(self) -> None:
        """Returns when the node was asked to stop; raises when it can't go on."""
        ...


Launch = Callable[[Settings], AbstractAsyncContextManager[Running]]


def run(context: Context) -> int:
    """Runs a node to its end."""
    settings = context.settings
    greet = bool(context.arguments.greet)
    if greet and (not settings.place or not settings.api):
        raise StartError("config_invalid", "--greet asks a model through the API: give --place MODEL, and no --no-api.")
    configure_logging(settings.log_format, settings.log_level, "node", secrets=secrets_of(settings))
    try:
        launch: Launch = import_module("skulk.cli.launcher").launch
        status = asyncio.run(up(settings, launch, greet=greet))
    except SkulkError as error:
        announce_error(error)
        raise
    if status == RESTARTING:
        _start_again()
    return status


def _start_again() -> None:
    """Becomes a new process of the same command line and id; returns never, or raises.

    Raises:
        StartError: ``child_failed``: this Python is gone.
    """
    note("starting again")
    sys.stdout.flush()
    command = [sys.executable, "-m", "skulk", *sys.argv[1:]]
    try:
        os.execv(sys.executable, command)
    except OSError as error:
        raise StartError("child_failed", f"The node has stopped, and can't start again: {error}.") from error


async def up(settings: Settings, launch: Launch, *, greet: bool = False) -> int:
    """Starts the node and stays until it ends.

    Returns:
        0 after a stop that was asked for, `RESTARTING` where it is to start again;
        128 + the signal where it came before the node was up, or came twice.

    Raises:
        SkulkError: the node could not start, or could not go on.
    """
    status = 0
    has_parent = READY_FD in os.environ
    signals = _Signals()
    try:
        async with launch(settings) as running:
            signals.running = running
            announce_ready({"api_url": running.api_url, "node_id": running.node_id})
            _say_started(settings, running)
            beside = [asyncio.create_task(_follow_parent(running), name="parent")] if has_parent else []
            beside.append(asyncio.create_task(_introduce(settings, running, greet=greet), name="introduction"))
            try:
                await running.wait()
                if running.is_restarting:
                    status = RESTARTING
            finally:
                for task in beside:
                    task.cancel()
                for outcome in await asyncio.gather(*beside, return_exceptions=True):
                    if isinstance(outcome, Exception):
                        log.error("the node served on, but this failed", exc_info=outcome)
                if signals.received:
                    note("stopping; a second Ctrl-C stops at once")
    except asyncio.CancelledError:
        if not signals.received:
            raise
        return 128 + signals.received[0]
    finally:
        signals.close()
    return 0 if signals.received else status


class _Signals:
    """What signals do to the task that made this: see the table above."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.running: Running | None = None
        self.received: list[int] = []
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._next: asyncio.TimerHandle | None = None
        for number in (*SIGNALS, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup's wish
            self._loop.add_signal_handler(number, self._on_signal, number)

    def close(self) -> None:
        """Ends the hurry; the handlers go with the loop."""
        if self._next is not None:
            self._next.cancel()

    def _on_signal(self, number: int) -> None:
        self.received.append(number)
        if self.running is not None and len(self.received) == 1:
            self.running.stop()
        elif self._next is None:
            self._hurry()

    def _hurry(self) -> None:
        # A cancelled wait for a child kills it; there is one such wait for each child, one after another.
        self._task.cancel()
        if len(self.received) > 1:
            self._next = self._loop.call_later(HURRY_S, self._hurry)


async def _follow_parent(running: Running) -> None:
    await parent_gone()
    running.stop()


def _say_started(settings: Settings, running: Running) -> None:
    where = f"API {running.api_url}" if running.api_url else "no API"
    print(f"skulk {__version__}: node {running.node_id} of the cluster {settings.cluster} is up, {where}", flush=True)
    if settings.api and not is_loopback(settings.api_host) and not settings.api_keys:
        note(
            f"the API listens on {settings.api_host} and trusts its network: whoever reaches this machine may use it. "
            "--local keeps it on this machine, SKULK_API_KEYS asks for keys, SKULK_CLUSTER_TOKEN guards the bus."
        )
    elif not settings.local and not settings.nats_url and not settings.cluster_token:
        note(
            "the bus is open to the network: whoever reaches this machine's route port may join the cluster. "
            "--local keeps it on this machine, SKULK_CLUSTER_TOKEN guards it."
        )
    for reply in running.placed:
        if reply.decision.outcome != "placed":
            note(reply.decision.reason)


async def _introduce(settings: Settings, running: Running, *, greet: bool) -> None:
    """The greeting, then what to type next. A greeting that fails is told and ends nothing: the node serves."""
    if greet:
        try:
            await _greet(settings, running.api_url)
        except SkulkError as error:
            note(error.detail)
    for line in next_steps(settings, running):
        print(line, flush=True)


async def _greet(settings: Settings, url: str) -> None:
    model_id = settings.place[0]
    async with connect(settings, url=url) as client:
        instances = await wait_for_instance(client, model_id, timeout_s=PLACE_WAIT_S)
        await wait_ready(client, instances, note)
        print(f"\n> {GREETING}", flush=True)
        await ask_aloud(client, model_id, GREETING, limit=GREETING_LIMIT)
        print(flush=True)


def next_steps(settings: Settings, running: Running) -> tuple[str, ...]:
    """Lines to copy: the API's address, a ``curl`` call, and how to see the bus."""
    lines: list[str] = []
    if running.api_url:
        lines.append(f"API    {running.api_url}")
        if settings.place:
            body = {
                "model": settings.place[0],
                "stream": True,
                "messages": [{"role": "user", "content": GREETING}],
            }
            key = ' -H "Authorization: Bearer $KEY"' if settings.api_keys else ""
            text = json.dumps(body, ensure_ascii=False, separators=(",", ":")).replace("'", "'\\''")
            call = f"curl -sN {running.api_url}/v1/chat/completions -H 'Content-Type: application/json'{key}"
            lines.append(f"ask    {call} -d '{text}'")
    lines.append(f"watch  {running.nats_sub_line}")
    return tuple(lines)
