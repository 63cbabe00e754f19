"""One term of a master: commands become events, and the placements are kept up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from skulk.bus.port import Bus
from skulk.bus.replica import Replica
from skulk.clock import Clock
from skulk.cluster.view import ClusterView, followers_of, liveness_of, peers_of, with_state
from skulk.errors import RequestError, ServiceError, SkulkError, UnavailableError
from skulk.ids import commanded_instance_id, ensured_instance_id, is_token, new_id
from skulk.master.drains import drained_node
from skulk.master.ledger import Ledger
from skulk.master.replicas import instances_of_parts, joined, parts_of, which_failed
from skulk.master.retiring import Retiring
from skulk.master.upkeep import (
    Rules,
    Upkeep,
    assigned_by,
    decision_on,
    next_event,
    refused_by,
    with_barred,
    with_missing,
    without_expired,
)
from skulk.master.waiting import Waiting
from skulk.placement.decision import place
from skulk.wire.beats import RunnerStatus
from skulk.wire.commands import (
    DeleteInstance,
    DeleteReply,
    DrainNode,
    DrainReply,
    PlacementReply,
    PlaceModel,
)
from skulk.wire.events import InstanceCreated, InstanceDeleted, InstanceKept, InstanceUnassigned
from skulk.wire.placement import PlacementDecision, PlacementRequest
from skulk.wire.state import Assignment, ClusterState, Instance, Position, Term

log = logging.getLogger("skulk.master")

FACTS_WAIT_S: Final = 15.0
ACCEPT_WAIT_S: Final = 5.0
STOP_WAIT_S: Final = 10.0
SETTLE_S: Final = 5.0
UPKEEP_S: Final = 0.5

Persist = Callable[[], Awaitable[bool]]
"""Puts what the own node knows on its disk; False: it could not."""


class Leader:
    """What the master does during one term; made when the term begins, dropped when it ends."""

    def __init__(
        self,
        bus: Bus,
        replica: Replica,
        clock: Clock,
        term: Term,
        rules: Rules,
        waiting: Waiting | None = None,
        *,
        may_write: Callable[[], bool] = lambda: True,
        persist: Persist | None = None,
    ) -> None:
        self._node_id = term.node_id
        self._persist = persist
        self._waiting = Waiting(clock) if waiting is None else waiting
        self._replica = replica
        self._clock = clock
        self._rules = rules
        self._ledger = Ledger(
            bus,
            clock,
            replica.view.state,
            term,
            replica.write,
            lambda: followers_of(replica.view, term.node_id),
            may_write,
        )
        self._upkeep = Upkeep(settles_at=clock.now() + SETTLE_S)
        self._placing: set[str] = set()
        self._retiring = Retiring(
            bus,
            replica,
            clock,
            self._ledger,
            view=lambda: self.view,
            waited=self._waiting.models,
            idle_ttl_s=rules.idle_ttl_s,
            default_parallel=rules.default_parallel,
            is_busy=self._placing.__contains__,
        )

    @property
    def state(self) -> ClusterState:
        """The authoritative state."""
        return self._ledger.state

    @property
    def view(self) -> ClusterView:
        """The authoritative state with what beats say."""
        return with_state(self._replica.view, self._ledger.state)

    async def run(self) -> None:
        """Publishes the log and keeps placements up, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._ledger.run(), name="ledger")
            tasks.create_task(self._keep_up(), name="upkeep")
            tasks.create_task(self._retiring.run(), name="retiring")

    def close(self) -> None:
        """Ends the term: what still runs can't write any more."""
        self._ledger.close()

    def preview(self, request: PlacementRequest) -> PlacementDecision:
        """What `place` would decide now."""
        return place(self.view, request, self._clock.now(), default_parallel=self._rules.default_parallel)

    async def place(self, command: PlaceModel) -> PlacementReply:
        """Places one more instance, or several, and waits until a node has accepted each; all of them, or none.

        Raises:
            RequestError: ``unplaceable``, with every node's reason; ``invalid_request``: a taken id, or none at all.
            UnavailableError: ``facts_pending``: no node has spoken within 15 s.
            ServiceError: ``deadline_exceeded``: the chosen node doesn't answer.
        """
        parts = parts_of(command)
        replies: list[PlacementReply] = []
        for part in parts:
            try:
                replies.append(await self._place_one(part))
            except SkulkError as error:
                if len(parts) == 1:
                    raise
                await self._take_back(parts)
                raise which_failed(error, len(replies) + 1, len(parts)) from error
        return joined(command, replies)

    async def _take_back(self, parts: tuple[PlaceModel, ...]) -> None:
        """Deletes what some of several replicas have left, and waits until their memory is free again."""
        for name in instances_of_parts(parts):
            if name in self.state.instances:
                try:
                    await self.delete(DeleteInstance(command_id=new_id(), instance_id=name))
                except SkulkError as error:
                    log.warning("the replica %s can't be taken back in order: %s", name, error)

    async def _place_one(self, command: PlaceModel) -> PlacementReply:
        if (begun := self._begun(command)) is not None:
            return await self._find_node(command, begun)
        request = command.request
        if command.ensure and (known := self._known(request.card.model_id)) is not None:
            return self._existing(command, known)
        if commanded_instance_id(command.command_id) in self.state.tombstones:
            raise _deleted_meanwhile(commanded_instance_id(command.command_id))
        decision = await self._decide(request)
        if decision.outcome == "pending":
            raise UnavailableError("facts_pending", decision.reason, retry_after_s=5)
        # room that idle models can make goes before force
        is_short = decision.outcome == "unplaceable" or bool(decision.warnings)
        if is_short and await self._retiring.make_room(msgspec.structs.replace(request, force=False)):
            decision = self.preview(request)
        if decision.outcome == "unplaceable" and not _stays_pending(command):
            raise RequestError("unplaceable", decision.reason)
        if command.ensure and (known := self._known(request.card.model_id)) is not None:
            return self._existing(command, known)
        instance = Instance(
            instance_id=_instance_id(command),
            request=request,
            reason=decision.reason if decision.outcome == "unplaceable" else "",
            created_at=self._clock.wall(),
            on_demand=command.on_demand,
            kept=_stays_pending(command),
        )
        if instance.instance_id in self.state.instances:
            raise RequestError(
                "invalid_request", f"there is an instance {instance.instance_id} already; delete it first"
            )
        if not is_token(instance.instance_id):
            raise RequestError(
                "invalid_request",
                f"{instance.instance_id!r} is no instance id; take a-z, 0-9, _ and -",
                param="instance_id",
            )
        self._ledger.append(InstanceCreated(instance=instance, command_id=command.command_id))
        return await self._find_node(command, instance.instance_id, decision)

    async def delete(self, command: DeleteInstance) -> DeleteReply:
        """Deletes an instance and waits until its runner is gone or, where its node is away, the deletion is safe.

        Raises:
            RequestError: ``instance_not_found``.
            ServiceError: ``disk_full``: this node is alone and can't write the deletion down.
        """
        instance = self.state.instances.get(command.instance_id)
        tombstone = self.state.tombstones.get(command.instance_id)
        if instance is None and tombstone is not None and tombstone.command_id == command.command_id:
            # an earlier master did it and could not answer any more
            return self._deleted(command)
        if instance is None:
            raise RequestError("instance_not_found", f"there is no instance {command.instance_id}; see GET /state")
        event = InstanceDeleted(
            instance_id=command.instance_id, deleted_at=self._clock.wall(), command_id=command.command_id
        )
        position = self._ledger.append(event)
        assignment = instance.assignment
        if assignment is not None and assignment.node_id in peers_of(self._replica.view):
            runner = assignment.runner_id
            await self._replica.wait_until(lambda view: _is_gone(view.runners.get(runner)), STOP_WAIT_S)
        else:
            await self._make_safe(position)
        return self._deleted(command)

    async def _make_safe(self, position: Position) -> None:
        """Returns when another node has what was written, or, where there is none, the own disk."""
        own = self._node_id

        def is_elsewhere(view: ClusterView) -> bool:
            return any(view.nodes[name].beat.position >= position for name in peers_of(view) - {own})

        if peers_of(self._replica.view) - {own} and await self._replica.wait_until(is_elsewhere, STOP_WAIT_S):
            return
        if self._persist is not None and not await self._persist():
            raise ServiceError("disk_full", "the deletion is not on this node's disk; free some space and ask again")

    async def drain(self, command: DrainNode) -> DrainReply:
        """Begins or ends a drain; the upkeep moves the instances from now on.

        Raises:
            RequestError: ``node_not_found``.
        """
        node_id, event = drained_node(self.view, command, self._clock.wall())
        if event is not None:
            self._ledger.append(event)
        here = tuple(
            sorted(
                name
                for name, found in self.state.instances.items()
                if found.assignment is not None and found.assignment.node_id == node_id
            )
        )
        return DrainReply(
            command_id=command.command_id, node_id=node_id, instance_ids=here, position=self.state.position
        )

    def _deleted(self, command: DeleteInstance) -> DeleteReply:
        return DeleteReply(command_id=command.command_id, instance_id=command.instance_id, position=self.state.position)

    def _begun(self, command: PlaceModel) -> str | None:
        """The instance that this command made under an earlier master who could not answer any more."""
        found = (name for name, known in self.state.instances.items() if known.command_id == command.command_id)
        return next(found, None)

    def _known(self, model_id: str) -> Instance | None:
        """An instance of the model, whoever asked for it: what ``ensure`` needs to be there."""
        return next((found for found in self.state.instances.values() if found.model_id == model_id), None)

    async def _decide(self, request: PlacementRequest) -> PlacementDecision:
        """Decides as soon as the facts are there, at the latest after `FACTS_WAIT_S`."""

        def has_facts(_view: ClusterView) -> bool:
            return self.preview(request).outcome != "pending"

        await self._replica.wait_until(has_facts, FACTS_WAIT_S)
        return self.preview(request)

    async def _find_node(
        self, command: PlaceModel, instance_id: str, decision: PlacementDecision | None = None
    ) -> PlacementReply:
        """Tries node after node until one accepts an instance that stands in the state."""
        refusal, is_refused = "" if decision is None else decision.reason, False
        self._placing.add(instance_id)
        try:
            while True:
                assignment, made = self._assign(instance_id)
                if assignment is None:
                    # what fitted a moment ago may have been given to another command meanwhile
                    refusal = made.reason if made is not None and not is_refused else refusal
                    break
                decision = made or decision
                answer = await self._answer_of(assignment)
                refused = self._refusal_in(assignment, answer)
                if refused is None:
                    break
                refusal, is_refused = self._refused(instance_id, assignment, refused, is_silent=answer is None), True
        finally:
            self._placing.discard(instance_id)
        placed = self.state.instances.get(instance_id)
        if placed is None:
            raise _deleted_meanwhile(instance_id)
        if placed.assignment is None and placed.kept and not _stays_pending(command):
            raise RequestError(
                "unplaceable", f"{refusal}; the instance {instance_id}, wanted by others too, stays pending"
            )
        if placed.assignment is None and not _stays_pending(command):
            self._ledger.append(InstanceDeleted(instance_id=instance_id, deleted_at=self._clock.wall()))
            raise RequestError("unplaceable", refusal or f"no node takes the instance {instance_id}")
        if _answer_missing(self.view, placed) and not _stays_pending(command):
            raise ServiceError(
                "deadline_exceeded",
                f"the node has not answered for {ACCEPT_WAIT_S:.0f} s; the instance {instance_id} stays and is started "
                "when it does: see GET /state",
            )
        return self._reply(command, placed, existed=False, decision=decision)

    def _assign(self, instance_id: str) -> tuple[Assignment | None, PlacementDecision | None]:
        """The assignment of an instance, made now where it has none; None where nothing fits, or it is deleted.

        Beside it the decision, where one was made now.
        """
        instance = self.state.instances.get(instance_id)
        if instance is None or instance.assignment is not None:
            return None if instance is None else instance.assignment, None
        decision = decision_on(self._upkeep, self.view, instance, self._clock.now(), self._rules)
        event = assigned_by(decision, instance)
        if event is None:
            return None, decision
        self._ledger.append(event)
        return event.assignment, decision

    async def _answer_of(self, assignment: Assignment) -> RunnerStatus | None:
        """What the node says, as soon as it has made up its mind: before that, a runner is ``starting``."""
        runner = assignment.runner_id

        def has_decided(view: ClusterView) -> bool:
            status = view.runners.get(runner)
            return (status is not None and status.phase != "starting") or not self._is_live(assignment.node_id)

        await self._replica.wait_until(has_decided, ACCEPT_WAIT_S)
        return self._replica.view.runners.get(runner)

    def _is_live(self, node_id: str) -> bool:
        return liveness_of(self._replica.view, node_id, self._clock.now()) == "live"

    def _refusal_in(self, assignment: Assignment, answer: RunnerStatus | None) -> str | None:
        """Why the node won't run it: by its own word, or because it fell silent before it said anything."""
        if answer is not None and answer.phase == "refused":
            return "refused without a reason" if answer.error is None else answer.error.detail
        if answer is None and not self._is_live(assignment.node_id):
            return f"node {assignment.node_id} fell silent before it took the instance"
        return None

    def _refused(self, instance_id: str, assignment: Assignment, reason: str, *, is_silent: bool) -> str:
        """Notes a refusal; returns its reason. A silent node has refused nothing: it is asked when it is back."""
        log.info("node %s refused %s: %s", assignment.node_id, instance_id, reason)
        if not is_silent:
            self._upkeep = with_barred(self._upkeep, instance_id, assignment.node_id, self._clock.now())
        self._ledger.append(InstanceUnassigned(instance_id=instance_id, reason=reason))
        return reason

    def _existing(self, command: PlaceModel, known: Instance) -> PlacementReply:
        """The answer that promises an instance which is there: a person's stays from now on, even without a node."""
        if not command.on_demand and not known.kept:
            self._ledger.append(InstanceKept(instance_id=known.instance_id))
        return self._reply(command, known, existed=True)

    def _reply(
        self,
        command: PlaceModel,
        instance: Instance,
        *,
        existed: bool,
        decision: PlacementDecision | None = None,
    ) -> PlacementReply:
        nodes = () if instance.assignment is None else (instance.assignment.node_id,)
        if decision is None or decision.nodes != nodes:
            decision = PlacementDecision(outcome="placed" if nodes else "pending", nodes=nodes, reason=instance.reason)
        return PlacementReply(
            command_id=command.command_id,
            instance_id=instance.instance_id,
            decision=decision,
            assignment=instance.assignment,
            position=self.state.position,
            existed=existed,
        )

    async def _keep_up(self) -> None:
        while True:
            await asyncio.sleep(UPKEEP_S)
            now = self._clock.now()
            view = self.view
            kept = without_expired(with_missing(self._upkeep, view, now), view, now)
            self._upkeep = msgspec.structs.replace(kept, waited=self._waiting.models())
            for instance in refused_by(view):
                assert instance.assignment is not None
                self._upkeep = with_barred(self._upkeep, instance.instance_id, instance.assignment.node_id, now)
            try:
                self._append_due(now)
            except UnavailableError:
                return  # the term is over

    def _append_due(self, now: float) -> None:
        for _ in range(len(self.state.instances) + 2):
            event = next_event(
                self._upkeep,
                self.view,
                now,
                self._clock.wall(),
                self._rules,
                busy=self._placing,
            )
            if event is None:
                return
            self._ledger.append(event)


def _instance_id(command: PlaceModel) -> str:
    if command.ensure:
        return ensured_instance_id(command.request.card.model_id)
    return command.instance_id or commanded_instance_id(command.command_id)


def _stays_pending(command: PlaceModel) -> bool:
    """Whether an instance that fits nowhere waits for a node: what a person ensures does, what a request needs not."""
    return command.ensure and not command.on_demand


def _deleted_meanwhile(instance_id: str) -> RequestError:
    return RequestError("instance_not_found", f"the instance {instance_id} was deleted while it was placed")


def _answer_missing(view: ClusterView, instance: Instance) -> bool:
    """Whether the node of an assigned instance has said nothing about it yet."""
    return instance.assignment is not None and instance.assignment.runner_id not in view.runners


def _is_gone(status: RunnerStatus | None) -> bool:
    return status is None or status.phase == "stopped"
