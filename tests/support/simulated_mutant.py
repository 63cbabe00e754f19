"""A rule of the control plane switched off, for as long as a simulation runs."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

import msgspec

from tests.support.simulated_faults import run

Patches = tuple[tuple[object, str, Any], ...]


class Mutant(msgspec.Struct, frozen=True, kw_only=True):
    """A rule, in one sentence of the design, and what switches it off.

    ``first``: where the hunt for a seed begins; a rule that is rarely needed needs a rare story.
    """

    name: str
    rule: str
    patches: Callable[[], Patches]
    run: Callable[[int], None] = run
    first: int = 0

    @contextlib.contextmanager
    def applied(self) -> Generator[None]:
        with contextlib.ExitStack() as stack:
            for owner, name, value in self.patches():
                stack.enter_context(mock.patch.object(owner, name, value))
            yield


def module(name: str) -> Any:
    """A module whose name something else has, too."""
    return importlib.import_module(name)
