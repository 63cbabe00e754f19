"""For engines that draw no tokens: the part of `skulk.engines.protocol.Engine` that nobody may call on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from skulk.batching.step import StepPlan, StepResult
from skulk.engines.canary import Recital
from skulk.engines.protocol import GoOn, always
from skulk.wire.generation import Prompt, Sampling


class NoGeneration:
    """Every method here is a defect of the caller: the runner refuses generations before they come to an engine."""

    def check(self, sampling: Sampling) -> None:
        del sampling
        _never()

    def tokens_of(self, prompt: Prompt) -> Sequence[int]:
        del prompt
        _never()

    def border_of(self, prompt: Prompt, tokens: Sequence[int]) -> int:
        del prompt, tokens
        _never()

    def begin(
        self,
        slot: int,
        sampling: Sampling,
        history: Sequence[int],
        *,
        drawn: int = 0,
        choice: int = 0,
        parked: int = 0,
    ) -> None:
        del slot, sampling, history, drawn, choice, parked
        _never()

    def run(self, plan: StepPlan, go_on: GoOn = always) -> StepResult:
        del plan, go_on
        _never()

    def end(self, slot: int, *, parked: int = 0) -> None:
        del slot, parked
        _never()

    def keep(self, slot: int, count: int) -> None:
        del slot, count
        _never()

    def share(self, source: int, slot: int, count: int) -> None:
        del source, slot, count
        _never()

    def move(self, source: int, slot: int) -> None:
        del source, slot
        _never()

    def park(self, slot: int, parked: int) -> None:
        del slot, parked
        _never()

    def restore(self, parked: int, slot: int, count: int) -> None:
        del parked, slot, count
        _never()

    def recite(self, text: str, count: int, follow: Sequence[int] = ()) -> Recital:
        del text, count, follow
        _never()

    def forget(self, parked: int) -> None:
        del parked
        _never()


def _never() -> NoReturn:
    raise AssertionError("this engine generates nothing")
