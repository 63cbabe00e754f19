"""Where a model goes, and why: pure functions of the cluster's view. No clock, no randomness, no I/O."""

from skulk.placement.admission import admit
from skulk.placement.decision import DEFAULT_PARALLEL, assign, place
from skulk.placement.rooms import reserved_bytes, room

__all__ = ["DEFAULT_PARALLEL", "admit", "assign", "place", "reserved_bytes", "room"]
