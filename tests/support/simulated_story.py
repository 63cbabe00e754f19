"""A simulated run told line by line: faults, commands and their answers, and every event of the log."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any
from unittest import mock

from skulk.bus.subjects import EVENT
from skulk.bus.transport import Raw
from tests.support import simulated_cluster, simulated_witness
from tests.support.simulated_versions import read


@contextlib.contextmanager
def told(tell: Callable[[str], None] | None) -> Generator[None]:
    """Gives ``tell`` each line of the clusters that are simulated meanwhile."""
    if tell is None:
        yield
        return
    clusters: list[simulated_cluster.SimulatedCluster] = []
    real_init = simulated_cluster.SimulatedCluster.__init__
    real_check = simulated_witness.Witness._check

    def init(self: Any, seed: int, nodes: int) -> None:
        real_init(self, seed, nodes)
        self.story = tell
        clusters.append(self)

    def check(self: Any, sender: str, message: Raw) -> None:
        if message.subject.split(".")[3] == "event" and not message.reply:
            record = read(message.body, EVENT.payload)
            term = record.position.term
            clusters[-1].note(
                f"{sender} writes {record.position.seq} in term {term.number}/{term.node_id}: {record.event}"
            )
        real_check(self, sender, message)

    with (
        mock.patch.object(simulated_cluster.SimulatedCluster, "__init__", init),
        mock.patch.object(simulated_witness.Witness, "_check", check),
    ):
        yield
