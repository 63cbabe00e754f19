"""What a candidate asks the others: whether a master lives, and what they know. One question each, all at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from functools import reduce
from typing import Any, Final, TypeVar

import msgspec

from skulk.bus.port import Bus
from skulk.bus.subjects import ELECTION_GATHER, ELECTION_PREVOTE, Endpoint
from skulk.cluster.merge import merge
from skulk.errors import SkulkError
from skulk.wire.commands import Gather, Gathered, PreVote, PreVoted
from skulk.wire.state import NO_TERM, ClusterState, Term

R = TypeVar("R")

log = logging.getLogger("skulk.master")

PRE_VOTE_S: Final = 0.3
GATHER_S: Final = 0.8


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What a round has brought together. ``highest``: of the terms that anybody has seen."""

    answers: tuple[Gathered, ...]

    @property
    def highest(self) -> Term:
        return max((found.highest for found in self.answers), default=NO_TERM)

    def merged_with(self, own: ClusterState) -> ClusterState:
        """The own state and everything told."""
        states = (
            found.state for found in self.answers if found.state is not None and found.state.cluster == own.cluster
        )
        return reduce(merge, states, own)


async def pre_vote(bus: Bus, candidate: str, others: Iterable[str]) -> tuple[PreVoted, ...]:
    """The answers that come within 0.3 s; at once when nobody else is to be asked or all have answered."""
    return await _ask_all(bus, ELECTION_PREVOTE, PreVote(candidate=candidate), others, PRE_VOTE_S)


async def gather(bus: Bus, term: Term, state_hash: str, others: Iterable[str]) -> Told:
    """What the others know, as far as they tell it within 0.8 s."""
    question = Gather(term=term, state_hash=state_hash)
    return Told(answers=await _ask_all(bus, ELECTION_GATHER, question, others, GATHER_S))


async def _ask_all(
    bus: Bus, endpoint: Endpoint[Any, R], question: Any, others: Iterable[str], timeout_s: float
) -> tuple[R, ...]:
    async def ask(node_id: str) -> R | None:
        try:
            return await bus.request(endpoint, question, timeout_s=timeout_s, node=node_id)
        except SkulkError as error:
            log.debug("node %s doesn't answer %s: %s", node_id, endpoint.name, error)
            return None

    answers = await asyncio.gather(*(ask(node_id) for node_id in sorted(others)))
    return tuple(answer for answer in answers if answer is not None)
