"""``skulk events [-f]``: what the master decided, a line an event; ``--json``: a JSON object a line.

The API has no stream of events, so ``-f`` asks each half second for those after the last one it saw.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any, Final, cast

import msgspec

from skulk.cli.client import ApiClient, connect
from skulk.cli.context import Context, note, printable
from skulk.cli.interruptible import run_interruptible
from skulk.errors import SkulkError

POLL_S: Final = 0.5
# While following, a node that restarts or a broken connection is waited for, this long at most.
PATIENCE_S: Final = 60.0


class _Term(msgspec.Struct, frozen=True):
    number: int = 0


class _Position(msgspec.Struct, frozen=True):
    seq: int
    term: _Term = _Term()


class EventLine(msgspec.Struct, frozen=True, kw_only=True):
    """An event as the API tells it; ``event`` stays open, for kinds that this version doesn't know."""

    position: _Position
    at: float
    event: dict[str, Any]


def run(context: Context) -> int:
    """Prints the events."""
    return run_interruptible(_events(context))


async def _events(context: Context) -> int:
    async with connect(context.settings) as client:
        seen = await _show_after(client, 0, is_json=context.is_json)
        if not context.arguments.follow:
            return 0
        loop = asyncio.get_running_loop()
        heard_at = loop.time()
        while True:
            await asyncio.sleep(POLL_S)
            try:
                seen = await _show_after(client, seen, is_json=context.is_json)
            except SkulkError as error:
                if error.exit_status != 1 or loop.time() - heard_at > PATIENCE_S:
                    raise
                continue
            heard_at = loop.time()


async def _show_after(client: ApiClient, seen: int, *, is_json: bool) -> int:
    """Prints what comes after ``seen``; returns the newest position seen."""
    raw = await client.get("/events", list[msgspec.Raw], query={"since": str(seen)})
    for body in raw:
        event = msgspec.json.decode(body, type=EventLine)
        if seen and event.position.seq > seen + 1:
            note(f"{event.position.seq - seen - 1} events came faster than they could be asked for and are not shown")
        seen = max(seen, event.position.seq)
        line = json.dumps(msgspec.json.decode(body), ensure_ascii=False) if is_json else event_line(event)
        sys.stdout.write(line + "\n")
    sys.stdout.flush()
    return seen


def event_line(event: EventLine) -> str:
    """``seq  term  local time  kind  what it is about``."""
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at))
    kind = str(event.event.get("type", "?"))
    about = " ".join(f"{name}={printable(str(value))}" for name, value in _facts(event.event).items())
    return f"{event.position.seq:>6}  {event.position.term.number:>4}  {at}  {kind:<20}  {about}".rstrip()


def _facts(event: dict[str, Any]) -> dict[str, Any]:
    """The few fields that tell what an event is about, wherever its kind has them."""
    instance = _inside(event, "instance")
    assignment = _inside(event, "assignment")
    found = {
        "instance": event.get("instance_id") or instance.get("instance_id"),
        "model": _inside(_inside(instance, "request"), "card").get("model_id"),
        "node": assignment.get("node_id") or event.get("node_id") or _inside(event, "drain").get("node_id"),
        "backend": assignment.get("backend"),
        "epoch": assignment.get("epoch"),
        "instances": len(state["instances"]) if "instances" in (state := _inside(event, "state")) else None,
        "reason": event.get("reason"),
    }
    return {name: value for name, value in found.items() if value not in (None, "")}


def _inside(body: dict[str, Any], name: str) -> dict[str, Any]:
    value = body.get(name)
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
