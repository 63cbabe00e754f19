"""One term of a master: commands become events, and the placements are kept up."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from skulk.bus.port import Bus
from skulk.bus.replica import Replica
from skulk.clock import Clock
from skulk.cluster.view import ClusterView, with_state
from skulk.errors import RequestError, ServiceError, UnavailableError
from skulk.ids import ensured_instance_id, new_id
from skulk.master.ledger import Ledger
from skulk.master.upkeep import (
    Rules,
    Upkeep,
    next_event,
    placement_of,
    refused_by,
    with_barred,
    with_missing,
    without_expired,
)
from skulk.placement.decision import place
from skulk.wire.beats import RunnerStatus
from skulk.wire.commands import DeleteInstance, DeleteReply, PlacementReply, PlaceModel
from skulk.wire.events import InstanceAssigned, InstanceCreated, InstanceDeleted, InstanceUnassigned
from skulk.wire.placement import PlacementDecision, PlacementRequest
from skulk.wire.state import ClusterState, Instance, Term

log = logging.getLogger("skulk.master")

FACTS_WAIT_S: Final = 15.0
ACCEPT_WAIT_S: Final = 5.0
STOP_WAIT_S: Final = 10.0
UPKEEP_S: Final = 0.5


class Leader:
    """What the master does during one term; made when the term begins, dropped when it ends."""

    def __init__(self, bus: Bus, replica: Replica, clock: Clock, term: Term, rules: Rules) -> None:
        self._replica = replica
        self._clock = clock
        self._rules = rules
        self._ledger = Ledger(bus, clock, replica.view.state, term)
        self._upkeep = Upkeep()
        self._placing: set[str] = set()

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

    def preview(self, request: PlacementRequest) -> PlacementDecision:
        """What `place` would decide now."""
        return place(self.view, request, self._clock.now(), default_parallel=self._rules.default_parallel)

    async def place(self, command: PlaceModel) -> PlacementReply:
        """Places one more instance and waits until a node has accepted it.

        Raises:
            RequestError: ``unplaceable``, with every node's reason.
            UnavailableError: ``facts_pending``: no node has spoken within 15 s.
        """
        request = command.request
        ensured = ensured_instance_id(request.card.model_id)
        if command.ensure and (known := self._known(request.card.model_id)) is not None:
            return self._reply(command, known, existed=True)
        decision = await self._decide(request)
        if decision.outcome == "pending":
            raise UnavailableError("facts_pending", decision.reason, retry_after_s=5)
        if decision.outcome == "unplaceable" and not command.ensure:
            raise RequestError("unplaceable", decision.reason)
        if command.ensure and (known := self._known(request.card.model_id)) is not None:
            return self._reply(command, known, existed=True)
        instance = Instance(
            instance_id=ensured if command.ensure else command.instance_id or new_id(),
            request=request,
            reason=decision.reason if decision.outcome == "unplaceable" else "",
            created_at=self._clock.wall(),
        )
        if instance.instance_id in self.state.instances:
            raise RequestError(
                "invalid_request", f"there is an instance {instance.instance_id} already; delete it first"
            )
        return await self._create(command, instance, decision)

    async def delete(self, command: DeleteInstance) -> DeleteReply:
        """Deletes an instance and waits until its runner is gone, or its node is away.

        Raises:
            RequestError: ``instance_not_found``.
        """
        instance = self.state.instances.get(command.instance_id)
        if instance is None:
            raise RequestError("instance_not_found", f"there is no instance {command.instance_id}; see GET /state")
        event = InstanceDeleted(
            instance_id=command.instance_id, deleted_at=self._clock.wall(), command_id=command.command_id
        )
        position = self._ledger.append(event)
        if instance.assignment is not None:
            runner = instance.assignment.runner_id
            await self._replica.wait_until(lambda view: _is_gone(view.runners.get(runner)), STOP_WAIT_S)
        return DeleteReply(command_id=command.command_id, instance_id=command.instance_id, position=position)

    def _known(self, model_id: str) -> Instance | None:
        """An instance of the model, whoever asked for it: what ``ensure`` needs to be there."""
        return next((found for found in self.state.instances.values() if found.model_id == model_id), None)

    async def _decide(self, request: PlacementRequest) -> PlacementDecision:
        """Decides as soon as the facts are there, at the latest after `FACTS_WAIT_S`."""

        def has_facts(_view: ClusterView) -> bool:
            return self.preview(request).outcome != "pending"

        await self._replica.wait_until(has_facts, FACTS_WAIT_S)
        return self.preview(request)

    async def _create(self, command: PlaceModel, instance: Instance, decision: PlacementDecision) -> PlacementReply:
        """Writes the instance, then tries node after node until one accepts."""
        instance_id = instance.instance_id
        self._placing.add(instance_id)
        try:
            self._ledger.append(InstanceCreated(instance=instance, command_id=command.command_id))
            refusal = decision.reason
            while (assigned := self._assign(instance_id)) is not None:
                answer = await self._answer_of(assigned)
                if answer is None or answer.phase != "refused":
                    break
                refusal = self._refused(assigned, answer)
        finally:
            self._placing.discard(instance_id)
        placed = self.state.instances.get(instance_id)
        if placed is None:
            raise RequestError("instance_not_found", f"the instance {instance_id} was deleted while it was placed")
        if placed.assignment is None and not command.ensure:
            self._ledger.append(InstanceDeleted(instance_id=instance_id, deleted_at=self._clock.wall()))
            raise RequestError("unplaceable", refusal)
        if _answer_missing(self.view, placed):
            raise ServiceError(
                "deadline_exceeded",
                f"the node has not answered for {ACCEPT_WAIT_S:.0f} s; the instance {instance_id} stays and is started "
                "when it does: see GET /state",
            )
        return self._reply(command, placed, existed=False, decision=decision)

    def _assign(self, instance_id: str) -> InstanceAssigned | None:
        instance = self.state.instances.get(instance_id)
        if instance is None:
            return None
        event = placement_of(self._upkeep, self.view, instance, self._clock.now(), self._rules)
        if event is not None:
            self._ledger.append(event)
        return event

    async def _answer_of(self, assigned: InstanceAssigned) -> RunnerStatus | None:
        runner = assigned.assignment.runner_id
        await self._replica.wait_until(lambda view: runner in view.runners, ACCEPT_WAIT_S)
        return self._replica.view.runners.get(runner)

    def _refused(self, assigned: InstanceAssigned, answer: RunnerStatus) -> str:
        """Notes a refusal; returns its reason."""
        reason = "refused without a reason" if answer.error is None else answer.error.detail
        node_id = assigned.assignment.node_id
        log.info("node %s refused %s: %s", node_id, assigned.instance_id, reason)
        self._upkeep = with_barred(self._upkeep, assigned.instance_id, node_id, self._clock.now())
        self._ledger.append(InstanceUnassigned(instance_id=assigned.instance_id, reason=reason))
        return reason

    def _reply(
        self,
        command: PlaceModel,
        instance: Instance,
        *,
        existed: bool,
        decision: PlacementDecision | None = None,
    ) -> PlacementReply:
        if decision is None:
            nodes = () if instance.assignment is None else (instance.assignment.node_id,)
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
            self._upkeep = without_expired(with_missing(self._upkeep, view, now), view, now)
            for instance in refused_by(view):
                assert instance.assignment is not None
                self._upkeep = with_barred(self._upkeep, instance.instance_id, instance.assignment.node_id, now)
            self._append_due(now)

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


def _answer_missing(view: ClusterView, instance: Instance) -> bool:
    """Whether the node of an assigned instance has said nothing about it yet."""
    return instance.assignment is not None and instance.assignment.runner_id not in view.runners


def _is_gone(status: RunnerStatus | None) -> bool:
    return status is None or status.phase == "stopped"
