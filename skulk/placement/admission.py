"""The node's own check of an assignment: it is the last authority on what fits (DESIGN 3)."""

from __future__ import annotations

from typing import Final, Protocol

from skulk.errors import UnavailableError
from skulk.placement.rooms import usable_by
from skulk.units import format_bytes
from skulk.wire.beats import MemoryFacts
from skulk.wire.state import Assignment

TOLERANCE_PERCENT: Final = 10
"""How much more than its room a node takes on: the master decided on figures up to a beat old."""


class OwnFacts(Protocol):
    """What a node knows of itself; its `NodeBeat` will do."""

    @property
    def tags(self) -> tuple[str, ...]: ...

    @property
    def memory(self) -> MemoryFacts: ...


def admit(
    facts: OwnFacts, assignment: Assignment, reserved_bytes: int, *, is_forced: bool = False
) -> UnavailableError | None:
    """Whether a node takes an assignment on; None: it does.

    Args:
        facts: measured now, not when the master decided.
        assignment: what the state asks of this node.
        reserved_bytes: of everything else in the same pool, by `skulk.placement.rooms.reserved_bytes`.
        is_forced: a person takes the risk that the memory doesn't suffice.

    Returns:
        ``refused_by_node`` with the figures, so that the master tries the next node.
    """
    if assignment.backend not in facts.tags:
        offered = ", ".join(facts.tags) or "none"
        return UnavailableError(
            "refused_by_node", f"backend {assignment.backend} isn't there any more; this node offers {offered}"
        )
    usable_bytes = usable_by(facts.memory, assignment.backend)
    have = max(0, usable_bytes - reserved_bytes)
    need = assignment.memory.need_bytes
    if is_forced or need * 100 <= have * (100 + TOLERANCE_PERCENT):
        return None
    usable, promised = format_bytes(usable_bytes), format_bytes(reserved_bytes)
    return UnavailableError(
        "refused_by_node",
        f"memory need {format_bytes(need)} have {format_bytes(have)}: "
        f"{usable} usable, {promised} of it promised to other instances",
    )
