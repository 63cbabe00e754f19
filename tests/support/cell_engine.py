"""Cells as llama.cpp has them, without the numbers in them: what a batch asks of an engine is done, or refused.

Every cell knows its token, its position and the slots that hold it; a token that follows is a function of what a slot
holds, so a sequence whose cells were shared, cut, moved, parked or computed again wrongly answers wrongly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from skulk.batching.admission import BatchShape
from skulk.batching.operations import Begin, End, Forget, Keep, Move, Operation, Park, Restore, Share
from skulk.batching.state import BatchState
from skulk.batching.step import StepPlan, StepResult
from skulk.engines.fake import following

WORDS = 200


class Cell:
    """One token of a cache."""

    def __init__(self, token: int) -> None:
        self.token = token


class CellEngine:
    """See the module. ``holds``: the cells of each slot in the order of their positions."""

    def __init__(self, shape: BatchShape) -> None:
        self.shape = shape
        self.holds: list[list[Cell]] = [[] for _ in range(shape.n_parallel)]
        self.drawing: dict[int, int] = {}
        self.aside: dict[int, int] = {}
        self.parked: dict[int, tuple[int, ...]] = {}
        self.computed = 0

    @property
    def used(self) -> int:
        return len({id(cell) for cells in self.holds for cell in cells})

    def do(self, operations: Iterable[Operation]) -> None:
        for operation in operations:
            self._do(operation)
            assert not self.shape.is_unified or self.used <= self.shape.kv_cells, f"no cells for {operation}"
            parked = sum(self.shape.parked_size(len(tokens)) for tokens in self.parked.values())
            assert parked <= self.shape.park_bytes, f"no host memory for {operation}"

    def _do(self, operation: Operation) -> None:
        match operation:
            case Begin(sequence=sequence, parked=parked):
                assert sequence.slot not in self.drawing
                # A sampler that was set aside comes back; it is the sequence's own.
                assert self.aside.pop(parked, sequence.order) == sequence.order
                self.drawing[sequence.slot] = sequence.order
                assert self._tokens(sequence.slot) == sequence.known_tokens(0, sequence.computed)
            case End(slot=slot, parked=parked):
                order = self.drawing.pop(slot)
                if parked:
                    self.aside[parked] = order
            case Keep(slot=slot, count=count):
                assert count == 0 or self.shape.reuse == "cut"
                assert count <= len(self.holds[slot])
                del self.holds[slot][count:]
            case Share(source=source, slot=slot, count=count):
                self._check_take(slot, count, len(self.holds[source]))
                taken = self.holds[source][:count]
                is_shared = self.shape.is_unified and self.shape.shares_cells
                self.holds[slot] = taken if is_shared else [Cell(cell.token) for cell in taken]
            case Move(source=source, slot=slot):
                assert not self.shape.is_unified
                assert not self.holds[slot]
                assert slot not in self.drawing
                self.holds[slot], self.holds[source] = self.holds[source], []
                self.drawing[slot] = self.drawing.pop(source)
            case Park(slot=slot, parked=parked):
                assert parked not in self.parked
                self.parked[parked] = self._tokens(slot)
            case Restore(parked=parked, slot=slot, count=count):
                self._check_take(slot, count, len(self.parked[parked]))
                needed = self.used + len(self.parked[parked])
                assert not self.shape.is_unified or needed <= self.shape.kv_cells, "a state comes back whole"
                self.holds[slot] = [Cell(token) for token in self.parked[parked][:count]]
            case Forget(parked=parked):
                assert self.parked.pop(parked, None) is not None or self.aside.pop(parked, None) is not None
                self.aside.pop(parked, None)

    def _check_take(self, slot: int, count: int, length: int) -> None:
        assert not self.holds[slot], f"slot {slot} is not empty"
        assert 0 < count <= length
        assert count == length or self.shape.reuse == "cut", "a state of this kind can't be cut"

    def run(self, plan: StepPlan) -> StepResult:
        drawn: dict[int, tuple[int, ...]] = {}
        for _ in range(plan.steps):
            sampled = self._step(plan)
            drawn = {slot: (*drawn.get(slot, ()), token) for slot, token in sampled.items()}
            if plan.steps > 1:
                plan = following(plan, sampled)
        return StepResult(sampled=drawn, steps=plan.steps, elapsed_s=0.01)

    def _step(self, plan: StepPlan) -> dict[int, int]:
        sampled: dict[int, int] = {}
        for row in plan.rows:
            assert row.slot in self.drawing
            cells = self.holds[row.slot]
            assert row.start == len(cells)
            cells.extend(Cell(token) for token in row.tokens)
            assert len(cells) <= self.shape.n_ctx
            self.computed += len(row.tokens)
            if row.sample:
                sampled[row.slot] = follows(self._tokens(row.slot))
        if self.shape.is_unified:
            assert self.used <= self.shape.kv_cells, "llama_decode finds no room"
        else:
            slots = sorted({row.slot for row in plan.rows} | set(self.drawing))
            assert slots == list(range(slots[0], slots[0] + len(slots))), "a hole between running streams"
        return sampled

    def check(self, state: BatchState) -> None:
        """What the batch believes is what is here."""
        believed = {seq.slot: seq.known_tokens(0, seq.computed) for seq in state.running}
        assert not set(believed) & {idle.slot for idle in state.idle}
        believed |= {idle.slot: idle.tokens for idle in state.idle}
        for slot in range(self.shape.n_parallel):
            assert self._tokens(slot) == believed.get(slot, ()), f"slot {slot}"
        assert self.parked == {parked.id: parked.tokens for parked in state.parked}
        assert self.drawing == {seq.slot: seq.order for seq in state.running}
        assert set(self.aside.values()) == {seq.order for seq in state.waiting if seq.parked}

    def _tokens(self, slot: int) -> tuple[int, ...]:
        return tuple(cell.token for cell in self.holds[slot])


def follows(tokens: Sequence[int]) -> int:
    """The token after these."""
    text = ",".join(map(str, tokens)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") % WORDS


def answer_to(prompt: Sequence[int], count: int) -> list[int]:
    """What a sequence answers when it is alone and nothing ends it."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(follows(tokens))
    return tokens[len(prompt) :]
