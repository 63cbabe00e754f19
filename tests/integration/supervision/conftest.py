"""Every test here must leave no process behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.child_processes import no_process_left


@pytest.fixture(autouse=True)
def leaves_no_process() -> Iterator[None]:
    with no_process_left():
        yield
