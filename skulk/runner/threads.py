"""How many threads a runner computes with: its node's cores, shared among the runners there that compute on them.

Two runners with as many threads each as there are cores wait for each other at every barrier: a step of 20 ms was seen
to take 1.96 s.
"""

from __future__ import annotations

from typing import Final

from skulk.wire.beats import NodeBeat, RunnerPhase

COMPUTING: Final[frozenset[RunnerPhase]] = frozenset({"loading", "warming", "ready", "draining"})


def thread_share(cores: int, runner_id: str, beat: NodeBeat) -> int:
    """Threads for one of a node's runners, at least 1.

    Args:
        cores: physical cores that the runner may use.
        runner_id: whose share it is; it counts, whatever the beat says of it.
        beat: of its node, the last one heard.
    """
    computing = {one.runner_id for one in beat.runners if one.backend.endswith("-cpu") and one.phase in COMPUTING}
    return max(1, cores // len(computing | {runner_id}))
