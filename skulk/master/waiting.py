"""The models that requests wait for, as gateways' beats tell: the instances of a lost node are then moved at once."""

from __future__ import annotations

from skulk.clock import Clock
from skulk.cluster.liveness import GATEWAY_SILENT_S
from skulk.wire.beats import GatewayBeat


class Waiting:
    """Keeps the last word of each gateway that still speaks."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._gateways: dict[str, tuple[float, tuple[str, ...]]] = {}

    def heard(self, beat: GatewayBeat) -> None:
        """Takes in one beat."""
        self._gateways[beat.gateway_id] = (self._clock.now(), beat.waiting)

    def models(self) -> frozenset[str]:
        """Model ids that anybody waits for now. O(gateways)."""
        limit = self._clock.now() - GATEWAY_SILENT_S
        self._gateways = {name: told for name, told in self._gateways.items() if told[0] >= limit}
        return frozenset(model for _, models in self._gateways.values() for model in models)
