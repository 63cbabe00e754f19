"""The one liveness table: who must speak how often, and what silence means (DESIGN 3). Seconds throughout.

speaker   every   silent for   means
master    0.5     1.5          the pre-vote begins
node      1.0     3.0          suspect
                  5.0          lost
                  2.0          lost, when its routes have been closed as long
runner    0.5     2.5          its streams are dead
          1.0     10.0         it hangs: its node kills it
gateway   1.0     5.0          its requests are cancelled by the runners
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Final, Literal

MASTER_BEAT_S: Final = 0.5
MASTER_SILENT_S: Final = 1.5
NODE_BEAT_S: Final = 1.0
NODE_SUSPECT_S: Final = 3.0
NODE_LOST_S: Final = 5.0
NODE_CLOSED_S: Final = 2.0
STREAM_ALIVE_S: Final = 0.5
STREAM_DEAD_S: Final = 2.5
RUNNER_STATUS_S: Final = 1.0
RUNNER_SILENT_S: Final = 10.0
GATEWAY_BEAT_S: Final = 1.0
GATEWAY_SILENT_S: Final = 5.0
CHUNKS_KEPT_S: Final = 30.0

NodeLiveness = Literal["live", "suspect", "lost"]


def node_liveness(silent_s: float) -> NodeLiveness:
    """What a node's silence means."""
    if silent_s < NODE_SUSPECT_S:
        return "live"
    return "suspect" if silent_s < NODE_LOST_S else "lost"


def closed_since(
    before: Mapping[str, float], was_joined: Set[str], joined: Set[str], now: float
) -> Mapping[str, float]:
    """Nodes whose routes closed, and when that was seen; after ``NODE_LOST_S`` their silence says it all.

    Args:
        before: what this gave at the last look.
        was_joined: the nodes with a route at the last look.
        joined: those with one now.
        now: seconds, of the clock of ``before``.
    """
    closed = dict.fromkeys(was_joined - joined, now)
    return closed | {node: at for node, at in before.items() if node not in joined and now - at < NODE_LOST_S}
