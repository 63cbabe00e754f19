"""Every subject of the bus, once: template, payload, who speaks. Equal to ``subjects/subjects.toml`` by test.

Grammar: ``skulk.<cluster>.v1.<plane>.<noun>.<id>…``; every token matches ``[a-z0-9_-]+``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from skulk.errors import RequestError
from skulk.ids import is_token
from skulk.wire.base import PROTOCOL, Wire
from skulk.wire.beats import GatewayBeat, MasterBeat, NodeBeat, RunnerStatus
from skulk.wire.commands import (
    DeleteInstance,
    DeleteReply,
    DrainNode,
    DrainReply,
    Gather,
    Gathered,
    History,
    HistoryRequest,
    PlacementReply,
    PlaceModel,
    PreviewPlacement,
    PreVote,
    PreVoted,
    RestartNode,
    RestartReply,
    Snapshot,
    SnapshotRequest,
)
from skulk.wire.embedding import Detokenize, Detokenized, Embed, Embedded, Tokenize, Tokenized
from skulk.wire.events import EventRecord
from skulk.wire.generation import Accepted, Alive, Cancel, Cancelled, Chunk, Generate, Resend, Resent, Retire, Retired
from skulk.wire.model import ModelCard
from skulk.wire.placement import PlacementDecision
from skulk.wire.store import (
    AddModel,
    CancelPull,
    DownloadStatus,
    FoundModels,
    PullModel,
    RemovedModel,
    RemoveModel,
    ResolveModel,
    SearchModels,
    VerifiedModel,
    VerifyModel,
)
from skulk.wire.transfer import PartRequest

PREFIX: Final = "skulk"

M = TypeVar("M")
Q = TypeVar("Q")
R = TypeVar("R")


class Template:
    """One subject template; the same text publishes, subscribes and parses.

    Args:
        text: the part after ``skulk.<cluster>.v1.``, ids in braces: ``beat.node.{node}``.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.full = f"{PREFIX}.{{cluster}}.v{PROTOCOL}.{text}"
        self.ids: tuple[str, ...] = tuple(re.findall(r"\{(\w+)\}", text))
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[a-z0-9_-]+)", re.escape(self.full))
        self._pattern = re.compile(pattern)

    def subject(self, cluster: str, **ids: str) -> str:
        """The subject for these ids, all of them.

        Raises:
            RequestError: ``invalid_request``: an id is no subject token (``[a-z0-9_-]+``).
        """
        assert set(ids) == set(self.ids), f"{self.text} takes {self.ids}, not {tuple(ids)}"
        for name, value in (("cluster", cluster), *ids.items()):
            if not is_token(value):
                raise RequestError(
                    "invalid_request",
                    f"{name} {value!r} can't stand in a subject: use only a-z, 0-9, _ and -",
                    param=name,
                )
        return self.full.format(cluster=cluster, **ids)

    def pattern(self, cluster: str, **ids: str) -> str:
        """What to subscribe to: ids that are not given become ``*``."""
        assert set(ids) <= set(self.ids), f"{self.text} takes {self.ids}, not {tuple(ids)}"
        return self.full.format(cluster=cluster, **{name: ids.get(name, "*") for name in self.ids})

    def parse(self, subject: str) -> dict[str, str] | None:
        """The ids of a subject (with ``cluster``); None where it isn't of this template."""
        match = self._pattern.fullmatch(subject)
        return None if match is None else match.groupdict()


class Channel(Template, Generic[M]):
    """A subject that is published and subscribed to.

    Args:
        name: as in ``subjects.toml``.
        payload: type of its messages.
        message_id: of a message, for a stream that keeps them and must not keep one twice; None: they aren't kept.
    """

    def __init__(self, name: str, text: str, payload: type[M], *, message_id: Callable[[M], str] | None = None) -> None:
        super().__init__(text)
        self.name = name
        self.payload = payload
        self.message_id = message_id


class Endpoint(Template, Generic[Q, R]):
    """A subject that is requested and answered; an endpoint of a NATS service.

    The endpoints of one service share plane and ids and differ in the noun: all calls to one instance of a service come
    in on one wildcard subscription, so that they are handled in the order they were sent.

    Args:
        service: name of the service it belongs to.
        reply: type of the answer; ``bytes`` for raw ones.
        queue_group: ``""``: every listener gets every call.
    """

    def __init__(
        self,
        name: str,
        text: str,
        request: type[Q],
        reply: type[R],
        *,
        service: str,
        queue_group: str = "",
    ) -> None:
        super().__init__(text)
        self.name = name
        self.request = request
        self.reply = reply
        self.service = service
        self.queue_group = queue_group

    @property
    def plane(self) -> str:
        return self.text.split(".")[0]

    @property
    def noun(self) -> str:
        return self.text.split(".")[1]


def _event_id(record: EventRecord) -> str:
    """``<term>-<seq>``: the whole term, as two masters can share its number."""
    term = record.position.term
    return f"{term.number}.{term.node_id}.{term.incarnation}-{record.position.seq}"


NODE_BEAT: Final = Channel("node_beat", "beat.node.{node}", NodeBeat)
MASTER_BEAT: Final = Channel("master_beat", "beat.master.{node}", MasterBeat)
GATEWAY_BEAT: Final = Channel("gateway_beat", "beat.gateway.{gateway}", GatewayBeat)
EVENT: Final = Channel("event", "event.{kind}.{subject}", EventRecord, message_id=_event_id)
RUNNER_STATUS: Final = Channel("runner_status", "status.runner.{runner}", RunnerStatus)
STREAM: Final = Channel("stream", "stream.{gateway}.{request}.{attempt}", Chunk)
ALIVE: Final = Channel("alive", "alive.{gateway}.{runner}", Alive)

MASTER_PLACE: Final = Endpoint("place", "master.place.{node}", PlaceModel, PlacementReply, service="master")
MASTER_PREVIEW: Final = Endpoint(
    "preview", "master.preview.{node}", PreviewPlacement, PlacementDecision, service="master"
)
MASTER_DELETE: Final = Endpoint("delete", "master.delete.{node}", DeleteInstance, DeleteReply, service="master")
MASTER_DRAIN: Final = Endpoint("drain", "master.drain.{node}", DrainNode, DrainReply, service="master")
ELECTION_PREVOTE: Final = Endpoint("prevote", "election.prevote.{node}", PreVote, PreVoted, service="election")
ELECTION_GATHER: Final = Endpoint("gather", "election.gather.{node}", Gather, Gathered, service="election")
NODE_RESTART: Final = Endpoint("restart", "node.restart.{node}", RestartNode, RestartReply, service="node")
NODE_SNAPSHOT: Final = Endpoint("snapshot", "node.snapshot.{node}", SnapshotRequest, Snapshot, service="node")
EVENTS_HISTORY: Final = Endpoint(
    "history", "events.history", HistoryRequest, History, service="events", queue_group="nodes"
)
STORE_RESOLVE: Final = Endpoint("resolve", "store.resolve.{node}", ResolveModel, ModelCard, service="store")
STORE_SEARCH: Final = Endpoint("search", "store.search.{node}", SearchModels, FoundModels, service="store")
STORE_ADD: Final = Endpoint("add", "store.add.{node}", AddModel, ModelCard, service="store")
STORE_PULL: Final = Endpoint("pull", "store.pull.{node}", PullModel, DownloadStatus, service="store")
STORE_STOP: Final = Endpoint("stop", "store.stop.{node}", CancelPull, DownloadStatus, service="store")
STORE_REMOVE: Final = Endpoint("remove", "store.remove.{node}", RemoveModel, RemovedModel, service="store")
STORE_VERIFY: Final = Endpoint("verify", "store.verify.{node}", VerifyModel, VerifiedModel, service="store")
RUNNER_GENERATE: Final = Endpoint("generate", "runner.generate.{runner}", Generate, Accepted, service="runner")
RUNNER_CANCEL: Final = Endpoint("cancel", "runner.cancel.{runner}", Cancel, Cancelled, service="runner")
RUNNER_RESEND: Final = Endpoint("resend", "runner.resend.{runner}", Resend, Resent, service="runner")
RUNNER_RETIRE: Final = Endpoint("retire", "runner.retire.{runner}", Retire, Retired, service="runner")
RUNNER_EMBED: Final = Endpoint("embed", "runner.embed.{runner}", Embed, Embedded, service="runner")
RUNNER_TOKENIZE: Final = Endpoint("tokenize", "runner.tokenize.{runner}", Tokenize, Tokenized, service="runner")
RUNNER_DETOKENIZE: Final = Endpoint(
    "detokenize", "runner.detokenize.{runner}", Detokenize, Detokenized, service="runner"
)
TRANSFER_PART: Final = Endpoint("part", "transfer.part.{owner}", PartRequest, bytes, service="transfer")

CHANNELS: Final[tuple[Channel[Any], ...]] = (NODE_BEAT, MASTER_BEAT, GATEWAY_BEAT, EVENT, RUNNER_STATUS, STREAM, ALIVE)
ENDPOINTS: Final[tuple[Endpoint[Any, Any], ...]] = (
    MASTER_PLACE,
    MASTER_PREVIEW,
    MASTER_DELETE,
    MASTER_DRAIN,
    ELECTION_PREVOTE,
    ELECTION_GATHER,
    NODE_RESTART,
    NODE_SNAPSHOT,
    EVENTS_HISTORY,
    STORE_RESOLVE,
    STORE_SEARCH,
    STORE_ADD,
    STORE_PULL,
    STORE_STOP,
    STORE_REMOVE,
    STORE_VERIFY,
    RUNNER_GENERATE,
    RUNNER_CANCEL,
    RUNNER_RESEND,
    RUNNER_RETIRE,
    RUNNER_EMBED,
    RUNNER_TOKENIZE,
    RUNNER_DETOKENIZE,
    TRANSFER_PART,
)


def is_message_type(kind: type[Any]) -> bool:
    """Whether a payload type is a record of ours (and not raw bytes)."""
    return issubclass(kind, Wire)
