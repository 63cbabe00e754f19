"""What a node tells of its machine."""

from __future__ import annotations

import pytest

from skulk.node.measuring import PROCESS_STEP, stepped
from skulk.units import MIB


@pytest.mark.parametrize(("measured", "told"), [(0, 0), (1, 4), (4 * MIB, 4), (83 * MIB + 1, 84), (84 * MIB, 84)])
def test_a_process_is_told_in_steps_and_never_as_less_than_it_takes(measured: int, told: int) -> None:
    assert stepped(measured) == told * MIB
    assert 0 <= stepped(measured) - measured < PROCESS_STEP
