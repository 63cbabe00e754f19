"""``skulk preview MODEL``: where the model would go now, and of every node why."""

from __future__ import annotations

import sys

import msgspec

from skulk.cli.client import connect
from skulk.cli.context import Column, Context, print_json, printable, render_table
from skulk.cli.interruptible import run_interruptible
from skulk.cli.placing import Wish, preview
from skulk.units import format_bytes
from skulk.wire.placement import NodeReport, PlacementDecision


def run(context: Context) -> int:
    """Prints the decision; status 1 where the model would not be placed."""
    return run_interruptible(_preview(context))


async def _preview(context: Context) -> int:
    given = context.arguments
    async with connect(context.settings) as client:
        wish = Wish(excluded=tuple(given.exclude), context_length=given.context, force=given.force)
        decision = await preview(client, given.model, wish)
    if context.is_json:
        print_json(msgspec.to_builtins(decision))
    else:
        sys.stdout.write(explain(decision))
    return 0 if decision.outcome == "placed" else 1


def explain(decision: PlacementDecision) -> str:
    """The decision as a table of nodes and a sentence."""
    columns = (
        Column[NodeReport]("NODE", lambda report: report.name or report.node_id),
        Column[NodeReport]("VERDICT", lambda report: _verdict(decision, report)),
        Column[NodeReport]("BACKEND", lambda report: report.backend or ""),
        Column[NodeReport]("NEED", lambda report: format_bytes(report.memory.need_bytes) if report.memory else ""),
        Column[NodeReport]("HAVE", lambda report: format_bytes(report.available_bytes) if report.memory else ""),
        Column[NodeReport]("CONTEXT", lambda report: str(report.context_length or "")),
        Column[NodeReport]("WHY", _why),
    )
    table = render_table(columns, decision.reports) if decision.reports else ""
    return f"{table}{decision.outcome}: {printable(decision.reason)}\n"


def _verdict(decision: PlacementDecision, report: NodeReport) -> str:
    if report.node_id in decision.nodes:
        return "chosen"
    return report.filter or "fits"


def _why(report: NodeReport) -> str:
    return report.detail or report.warning or " ".join(f"{part}={value:g}" for part, value in report.score.items())
