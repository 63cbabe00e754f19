"""Nodes of other versions in a simulated cluster.

    newer     a later minor version: one more field in every message, a colour of each instance in the state, and an
              event that sets it; the others don't know any of that
    foreign   another major version: a whole control plane on subjects of its own, and a beat on ours, by which it is
              shown; what that beat says of master, position and runners is of a world that is none of ours

Which version a callback belongs to stands in the context variable `VERSION`, as its owner does in `OWNER`.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Generator
from typing import Any, Final, Literal, TypeAlias
from unittest import mock

import msgspec

from skulk.bus import core, services
from skulk.bus.memory_bus import MemoryBus
from skulk.bus.port import Subscription
from skulk.bus.transport import Raw, Receive
from skulk.cluster import fold, follow
from skulk.errors import SkulkError
from skulk.master import ledger, master, rounds
from skulk.wire.base import PROTOCOL, Wire, decode
from skulk.wire.events import EventRecord
from skulk.wire.state import ClusterState, Position
from skulk.wire.unknown import joined
from tests.support.tomorrow import tomorrow

Version: TypeAlias = Literal["", "newer", "foreign"]
VERSION: Final[contextvars.ContextVar[Version]] = contextvars.ContextVar("version", default="")
FOREIGN: Final = PROTOCOL + 1
replace = msgspec.structs.replace
_hash_of: Final = fold.StateHash.of


class InstancePainted(Wire, frozen=True, kw_only=True, tag="instance_painted"):
    """An event of tomorrow: an instance has this colour from now on."""

    instance_id: str
    colour: str


class PaintedRecord(Wire, frozen=True, kw_only=True):
    """It, at its place in the log."""

    position: Position
    at: float
    event: InstancePainted


def read(body: bytes, kind: Any) -> Any:
    """A message as one reads it who knows every version's events."""
    is_painted = kind is EventRecord and b'"instance_painted"' in body
    return msgspec.json.decode(body, type=PaintedRecord) if is_painted else decode(body, kind)


def whole(state: ClusterState) -> ClusterState:
    """A state as the newer version has it: colours are nothing unknown, and one that nobody set is none."""
    found: dict[str, Any] = {
        name: {"colour": rest["colour"]}
        for name, rest in state.unknown.get("instances", {}).items()
        if rest.get("colour") and name in state.instances
    }
    others = {name: value for name, value in state.unknown.items() if name != "instances"}
    return replace(state, partial=False, unknown={**others, "instances": found} if found else others)


def colours_of(state: ClusterState) -> dict[str, str]:
    """The colours of the instances of a state, whoever holds it."""
    return {name: rest["colour"] for name, rest in whole(state).unknown.get("instances", {}).items()}


def known_hash(state: ClusterState) -> str:
    """The digest of what every version knows of a state."""
    return _hash_of(fold.StateHash(), replace(state, partial=False, unknown={}))


def opened(body: bytes) -> ClusterState:
    """A state out of its bytes, as the present version has it."""
    state = ClusterState.opened(msgspec.json.decode(body))
    return whole(state) if VERSION.get() == "newer" else state


def packed(state: ClusterState) -> bytes:
    """A state's bytes, as the present version writes them."""
    plain = msgspec.json.encode(state)
    return plain if VERSION.get() != "newer" else msgspec.json.encode(_state_of_tomorrow(msgspec.json.decode(plain)))


def _state_of_tomorrow(raw: dict[str, Any]) -> dict[str, Any]:
    state = joined(raw)
    instances = {name: {"colour": "", **found} for name, found in state["instances"].items()}
    return {**state, "partial": False, "instances": instances}


def _encoder(real: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    def encode(message: Any) -> bytes:
        body = real(message)
        if VERSION.get() != "newer":
            return body
        raw = msgspec.json.decode(body)
        state = raw.pop("state", None) if isinstance(getattr(message, "state", None), ClusterState) else None
        added = tomorrow(raw)
        return msgspec.json.encode(added if state is None else {**added, "state": _state_of_tomorrow(state)})

    return encode


def _decoder(real: Callable[[bytes, Any], Any]) -> Callable[[bytes, Any], Any]:
    def decode_as(body: bytes, kind: Any) -> Any:
        if VERSION.get() != "newer":
            return real(body, kind)
        if kind is EventRecord:
            return read(body, kind)
        message = real(body, kind)
        state = getattr(message, "state", None)
        return replace(message, state=whole(state)) if isinstance(state, ClusterState) else message

    return decode_as


def _folder(real: Callable[[ClusterState, Any], ClusterState]) -> Callable[[ClusterState, Any], ClusterState]:
    def fold_as(state: ClusterState, record: Any) -> ClusterState:
        if not isinstance(record.event, InstancePainted):
            folded = real(state, record)
            # colours are nothing unknown to it
            return replace(folded, partial=False) if VERSION.get() == "newer" else folded
        name, instance = record.event.instance_id, state.instances.get(record.event.instance_id)
        if instance is None:
            return replace(state, position=record.position)
        painted = {**state.instances, name: replace(instance, position=record.position)}
        colours = {**state.unknown.get("instances", {}), name: {"colour": record.event.colour}}
        return replace(
            state, position=record.position, instances=painted, unknown={**state.unknown, "instances": colours}
        )

    return fold_as


def _merger(
    real: Callable[[ClusterState, ClusterState], ClusterState],
) -> Callable[[ClusterState, ClusterState], ClusterState]:
    def merge(a: ClusterState, b: ClusterState) -> ClusterState:
        merged = real(a, b)
        return whole(merged) if VERSION.get() == "newer" else merged

    return merge


def _salted(real: Callable[[fold.StateHash, ClusterState], str]) -> Callable[[fold.StateHash, ClusterState], str]:
    """A version with one more field in its records has another digest of every state."""

    def of(self: fold.StateHash, state: ClusterState) -> str:
        digest = real(self, state)
        return f"{int(digest or '0', 16) ^ 1:016x}" if VERSION.get() == "newer" else digest

    return of


def _subjects(real: Callable[[Any], dict[str, str]]) -> Callable[[Any], dict[str, str]]:
    def event_ids(event: Any) -> dict[str, str]:
        is_known = not isinstance(event, InstancePainted)
        return real(event) if is_known else {"kind": "instance_painted", "subject": event.instance_id}

    return event_ids


@contextlib.contextmanager
def newer_versions() -> Generator[None]:
    """Inside, whatever runs as the version ``newer`` is of it."""
    patches: tuple[tuple[object, str, Callable[[Any], Any]], ...] = (
        (core, "encode", _encoder),
        (core, "decode", _decoder),
        (services, "encode", _encoder),
        (services, "decode", _decoder),
        (follow, "fold", _folder),
        (ledger, "fold", _folder),
        (rounds, "merge", _merger),
        (master, "merge", _merger),
        (ledger, "_event_ids", _subjects),
        (fold.StateHash, "of", _salted),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, wrap in patches:
            stack.enter_context(mock.patch.object(owner, name, wrap(getattr(owner, name))))
        yield


def paint(leader: Any, context: contextvars.Context, instance_id: str, colour: str) -> bool:
    """A master of the newer version writes its event; False: it may not write any more."""
    event: Any = InstancePainted(instance_id=instance_id, colour=colour)
    try:
        context.run(leader._ledger.append, event)
    except SkulkError:
        return False
    return True


class ForeignBus(MemoryBus):
    """The bus as another major version speaks on it.

    ``claims``: what its beats on our subjects say beside what they must.
    """

    claims: dict[str, Any]

    async def send(self, message: Raw) -> None:
        if ".beat.node." in message.subject:
            beat = {**msgspec.json.decode(message.body), "protocol": FOREIGN, "version": "9.0", **self.claims}
            await super().send(replace(message, body=msgspec.json.encode(tomorrow(beat))))
        await super().send(replace(message, subject=_moved(message.subject, PROTOCOL, FOREIGN)))

    async def listen(self, subject: str, receive: Receive, *, queue: str = "") -> Subscription:
        def receive_ours(message: Raw) -> None:
            receive(replace(message, subject=_moved(message.subject, FOREIGN, PROTOCOL)))

        return await super().listen(_moved(subject, PROTOCOL, FOREIGN), receive_ours, queue=queue)


def _moved(subject: str, before: int, after: int) -> str:
    tokens = subject.split(".")
    is_ours = len(tokens) > 3 and tokens[0] == "skulk" and tokens[2] == f"v{before}"
    return ".".join((*tokens[:2], f"v{after}", *tokens[3:])) if is_ours else subject
