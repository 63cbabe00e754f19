"""``skulk rm INSTANCE``: deletes one instance; the beginning of its id is enough."""

from __future__ import annotations

import sys
from typing import Any

from skulk.cli.client import connect
from skulk.cli.context import Context, print_json
from skulk.cli.interruptible import run_interruptible
from skulk.cli.state_view import StateView, find_instance, instance_rows


def run(context: Context) -> int:
    """Deletes the instance."""
    return run_interruptible(_rm(context))


async def _rm(context: Context) -> int:
    async with connect(context.settings) as client:
        state = await client.get("/state", StateView)
        row = find_instance(instance_rows(state), context.arguments.instance)
        await client.delete(f"/instance/{row.instance_id}", dict[str, Any])
    if context.is_json:
        print_json({"instance_id": row.instance_id, "model_id": row.model_id})
    else:
        sys.stdout.write(f"deleted {row.instance_id} ({row.model_id})\n")
    return 0
