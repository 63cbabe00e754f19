"""The rules of other versions and of runners that hang, switched off one at a time."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from skulk.bus.replica import Replica
from skulk.bus.subjects import Channel
from skulk.cluster import election, fold
from skulk.errors import ServiceError
from skulk.node.hosting import Hosting
from skulk.wire.base import decode
from skulk.wire.state import ClusterState
from skulk.wire.unknown import joined
from tests.support.simulated_mutant import Mutant, Patches, module


class _AnyVersion:
    """Equal to every version."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = None  # type: ignore[assignment]


replace = msgspec.structs.replace
ANY_VERSION: Final = _AnyVersion()


def _fields_refused() -> Patches:
    def strict(body: bytes, kind: Any) -> Any:
        message = decode(body, kind)
        if isinstance(message, msgspec.Struct) and msgspec.json.decode(body).keys() - set(message.__struct_fields__):
            raise ServiceError("invalid_message", "there are fields that this version doesn't know")
        return message

    return ((module("tests.support.simulated_faults"), "decode", strict),)


def _unknown_lost() -> Patches:
    return ((module("skulk.wire.state"), "opened", lambda raw, kind: msgspec.convert(joined(raw), kind)),)


def _partial_leads() -> Patches:
    return ((module("skulk.master.master"), "Tick", lambda is_partial: election.Tick()),)


def _always_asks() -> Patches:
    return ((Replica, "_is_taken", lambda self, beat: False),)


def _places_anywhere() -> Patches:
    return ((module("skulk.placement.decision"), "PROTOCOL", ANY_VERSION),)


def _strangers_count() -> Patches:
    return ((module("skulk.cluster.view"), "PROTOCOL", ANY_VERSION),)


def _strangers_ask() -> Patches:
    return ((module("skulk.master.master"), "PROTOCOL", ANY_VERSION),)


def _any_version_heard() -> Patches:
    real_pattern, real_parse = Channel.pattern, Channel.parse

    def pattern(self: Any, cluster: str, **ids: str) -> str:
        return real_pattern(self, cluster, **ids).replace(".v1.", ".*.")

    def parse(self: Any, subject: str) -> Any:
        tokens = subject.split(".")
        return real_parse(self, ".".join((*tokens[:2], "v1", *tokens[3:])))

    return ((Channel, "pattern", pattern), (Channel, "parse", parse))


def hangs_on() -> Patches:
    """Nobody notices a runner that hangs."""
    return ((Hosting, "_hangs", lambda self, runner, silent_s: None),)


def _namesakes_heard() -> Patches:
    real = Hosting.heard

    def heard(self: Any, status: Any) -> None:
        real(self, replace(status, node_id=self._node_id))
        if status.runner_id in self._runners:
            runner = self._runners[status.runner_id]
            runner.status = replace(runner.status, node_id=status.node_id)

    return ((Hosting, "heard", heard),)


def _partial_stays() -> Patches:
    real = fold.fold

    def fold_as(state: ClusterState, record: Any) -> ClusterState:
        return replace(real(state, record), partial=state.partial)

    return ((module("skulk.master.ledger"), "fold", fold_as),)


KIND_MUTANTS: Final = tuple(
    Mutant(name=name, rule=rule, patches=patches, first=first)
    for name, rule, patches, first in (
        ("fields-refused", "fields that a version doesn't know are ignored", _fields_refused, 0),
        ("unknown-lost", "what a newer version wrote survives those that don't know it", _unknown_lost, 0),
        ("partial-leads", "a node with a partial state campaigns only when no complete node lives", _partial_leads, 0),
        ("partial-stays", "a state is whole again once nothing unknown is left in it", _partial_stays, 1000),
        ("always-asks", "who has the master's snapshot doesn't ask again for its digest's sake", _always_asks, 0),
        ("places-anywhere", "a node of an incompatible version takes no placements", _places_anywhere, 0),
        ("strangers-count", "it counts as no part of the cluster", _strangers_count, 0),
        ("strangers-ask", "its beats say nothing to the master", _strangers_ask, 0),
        ("any-version-heard", "the version stands in every subject", _any_version_heard, 0),
        ("hangs-on", "a runner that is silent for 10 s is killed", hangs_on, 0),
        ("namesakes-heard", "a node hears only its own runners as such", _namesakes_heard, 20),
    )
)
