"""``skulk nodes``: the machines of the cluster, what they can serve with, and how they are."""

from __future__ import annotations

from skulk.cli.client import connect
from skulk.cli.context import Column, Context, note, print_rows
from skulk.cli.interruptible import run_interruptible
from skulk.cli.state_view import NodeRow, StateView, node_rows
from skulk.units import format_bytes

COLUMNS = (
    Column[NodeRow]("NODE", lambda row: row.node_id),
    Column[NodeRow]("NAME", lambda row: row.name),
    Column[NodeRow]("ROLE", lambda row: "master" if row.is_master else ""),
    Column[NodeRow]("HEALTH", lambda row: row.health),
    Column[NodeRow]("BACKENDS", lambda row: ",".join(row.backends)),
    Column[NodeRow]("FREE", lambda row: format_bytes(row.memory_available_bytes)),
    Column[NodeRow]("MEMORY", lambda row: format_bytes(row.memory_total_bytes)),
    Column[NodeRow]("VERSION", lambda row: row.version),
)


def run(context: Context) -> int:
    """Prints the nodes."""
    return run_interruptible(_nodes(context))


async def _nodes(context: Context) -> int:
    async with connect(context.settings) as client:
        state = await client.get("/state", StateView)
    rows = node_rows(state)
    print_rows(context, COLUMNS, rows, empty="no node is heard yet")
    if not context.is_json:
        for row in rows:
            for reason in row.reasons:
                note(f"{row.name}: {row.health}: {reason}")
    return 0
