"""Counters of the gateway, and their text for Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Final

import msgspec
from aiohttp import web

from skulk.bus.port import BusCounters

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_METHODS: Final = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})


class Metrics:
    """Counts since the start of the process; one event loop, no locks."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, int]] = Counter()
        self.open_requests = 0
        self.streams = 0
        self.chunks = 0
        self.tokens = 0
        self.prompt_tokens = 0
        self.cancelled = 0
        self.stream_errors: Counter[str] = Counter()

    @contextmanager
    def in_flight(self) -> Generator[None]:
        """Counts a request as open while it lasts."""
        self.open_requests += 1
        try:
            yield
        finally:
            self.open_requests -= 1

    def count_request(self, request: web.Request, status: int) -> None:
        """Counts an answered request by its route's template, so that ids don't make series without end."""
        resource = request.match_info.route.resource
        route = "unmatched" if resource is None else resource.canonical
        method = request.method if request.method in _METHODS else "other"
        self.requests[route, method, status] += 1

    def text(
        self, bus: BusCounters, *, streams_open: int, waiting: int, queued: int, failovers: Mapping[str, int]
    ) -> str:
        """Everything in Prometheus' text format."""
        lines: list[str] = ["# TYPE skulk_http_requests_total counter"]
        lines += [
            f'skulk_http_requests_total{{route="{_label(route)}",method="{method}",status="{status}"}} {count}'
            for (route, method, status), count in sorted(self.requests.items())
        ]
        lines.append("# TYPE skulk_stream_errors_total counter")
        lines += [
            f'skulk_stream_errors_total{{code="{code}"}} {count}' for code, count in sorted(self.stream_errors.items())
        ]
        lines.append("# TYPE skulk_failovers_total counter")
        lines += [
            f'skulk_failovers_total{{outcome="{outcome}"}} {count}' for outcome, count in sorted(failovers.items())
        ]
        gauges = {
            "http_requests_open": self.open_requests,
            "streams_open": streams_open,
            "requests_waiting_for_load": waiting,
            "requests_queued": queued,
        }
        totals = {
            "streams_total": self.streams,
            "chunks_total": self.chunks,
            "completion_tokens_total": self.tokens,
            "prompt_tokens_total": self.prompt_tokens,
            "requests_cancelled_total": self.cancelled,
        }
        totals |= {
            f"bus_{name}_total": count for name, count in msgspec.structs.asdict(bus).items() if isinstance(count, int)
        }
        for kind, counts in (("gauge", gauges), ("counter", totals)):
            for name, count in counts.items():
                lines += [f"# TYPE skulk_{name} {kind}", f"skulk_{name} {count}"]
        return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
