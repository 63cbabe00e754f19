"""``skulk ps``: the instances, and how far each is."""

from __future__ import annotations

from skulk.cli.client import connect
from skulk.cli.context import Column, Context, print_rows
from skulk.cli.interruptible import run_interruptible
from skulk.cli.state_view import InstanceRow, StateView, instance_rows
from skulk.units import format_bytes

SHOWN_ID = 8


def memory_text(row: InstanceRow) -> str:
    """``231.0 MiB (1.03)``: what the runner took after its load, and that divided by the estimate."""
    if not row.loaded_bytes:
        return ""
    ratio = "" if row.memory_ratio is None else f" ({row.memory_ratio:.2f})"
    return f"{format_bytes(row.loaded_bytes)}{ratio}"


COLUMNS = (
    Column[InstanceRow]("INSTANCE", lambda row: row.instance_id[:SHOWN_ID]),
    Column[InstanceRow]("MODEL", lambda row: row.model_id),
    Column[InstanceRow]("STATE", lambda row: row.state),
    Column[InstanceRow]("NODE", lambda row: ",".join(row.nodes)),
    Column[InstanceRow]("BACKEND", lambda row: row.backend),
    Column[InstanceRow]("CONTEXT", lambda row: str(row.context_length or "")),
    Column[InstanceRow]("MEMORY", memory_text),
    Column[InstanceRow]("DETAIL", lambda row: row.detail),
)


def run(context: Context) -> int:
    """Prints the instances."""
    return run_interruptible(_ps(context))


async def _ps(context: Context) -> int:
    async with connect(context.settings) as client:
        state = await client.get("/state", StateView)
    rows = instance_rows(state)
    columns = COLUMNS if any(row.detail for row in rows) else COLUMNS[:-1]
    print_rows(context, columns, rows, empty="no model is placed; `skulk place MODEL` places one")
    return 0
