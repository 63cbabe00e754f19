"""Streams over the bus that end exactly once (DESIGN 6): the runner has an `Outbox`, the gateway an `Inbox`.

runner                                          gateway
writer = outbox.open(request)                   reader = inbox.open(request_id, attempt, runner_id)
writer.send(choice, text, tokens)   chunk 0     await bus.request(RUNNER_GENERATE, …)
writer.send(choice, text, tokens)   chunk 1     while True:
writer.end(StreamEnd(…))            chunk 2         for chunk in await reader.take(): …
outbox.resend(ask)  <── chunk 1 is missing ──   (asks by itself)
"""

from __future__ import annotations

from skulk.bus.inbox import Inbox, InboxCounters, StreamReader
from skulk.bus.outbox import Outbox, OutboxCounters, StreamWriter
from skulk.bus.sequence import StreamSequence

__all__ = ["Inbox", "InboxCounters", "Outbox", "OutboxCounters", "StreamReader", "StreamSequence", "StreamWriter"]
