"""What the engine does between two steps, in order: sequences come and go, cells are taken over, parked and moved.

``slot``: a sequence of the engine, 0 to ``n_parallel`` - 1. ``parked``: an id of host memory, never used twice.
``count``: tokens from a sequence's first on.
"""

from __future__ import annotations

import msgspec

from skulk.batching.requests import Sequence


class Begin(msgspec.Struct, frozen=True, kw_only=True):
    """Draw for this sequence in its slot; ``parked``: where its sampler was set aside, 0: make a new one."""

    sequence: Sequence
    parked: int = 0


class End(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing is drawn in this slot any more; its cells stay. ``parked``: set the sampler aside there, 0: free it."""

    slot: int
    parked: int = 0


class Keep(msgspec.Struct, frozen=True, kw_only=True):
    """Free the slot's cells from position ``count`` on; 0: all of them."""

    slot: int
    count: int


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """The empty ``slot`` takes the first ``count`` tokens of ``source``, which keeps what it has."""

    source: int
    slot: int
    count: int


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """The empty ``slot`` takes over cells and sampler of ``source``, which is empty then."""

    source: int
    slot: int


class Park(msgspec.Struct, frozen=True, kw_only=True):
    """Copy the slot's cells to host memory; the slot keeps them."""

    slot: int
    parked: int


class Restore(msgspec.Struct, frozen=True, kw_only=True):
    """The empty ``slot`` takes the first ``count`` tokens of what was parked, which stays there."""

    parked: int
    slot: int
    count: int


class Forget(msgspec.Struct, frozen=True, kw_only=True):
    """Free what was parked there, cells and sampler."""

    parked: int


Operation = Begin | End | Keep | Share | Move | Park | Restore | Forget
