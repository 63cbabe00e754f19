"""Server-sent events from bytes that arrive in any pieces (WHATWG HTML, 9.2.6), as far as the API uses them."""

from __future__ import annotations

from typing import Final

LIMIT_BYTES: Final = 16 * 1024 * 1024


class SseParser:
    """Feed it what arrives; it gives the ``data`` of each event that became whole. Comments are skipped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._held = 0

    def feed(self, part: bytes) -> list[str]:
        """The data of the events that end in this part.

        Raises:
            ValueError: one event is over 16 MiB.
        """
        lines = (self._rest + part).split(b"\n")
        self._rest = lines.pop()
        events: list[str] = []
        for line in lines:
            self._take(line.removesuffix(b"\r").decode("utf-8", "replace"), events)
        if len(self._rest) + self._held > LIMIT_BYTES:
            raise ValueError(f"one event is over {LIMIT_BYTES} bytes")
        return events

    def _take(self, line: str, events: list[str]) -> None:
        if not line:
            if self._data:
                events.append("\n".join(self._data))
            self._data, self._held = [], 0
            return
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
            self._held += len(value)
