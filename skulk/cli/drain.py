"""``skulk drain NODE [--undo]``: takes no new work to a node and moves its instances; holds until it is undone."""

from __future__ import annotations

import sys

import msgspec

from skulk.cli.client import connect
from skulk.cli.context import Context, print_json
from skulk.cli.interruptible import run_interruptible


class _Reply(msgspec.Struct, frozen=True, kw_only=True):
    node_id: str
    instance_ids: tuple[str, ...] = ()


def run(context: Context) -> int:
    """Begins or ends the drain."""
    return run_interruptible(_drain(context))


async def _drain(context: Context) -> int:
    path = f"/nodes/{context.arguments.node}/drain"
    async with connect(context.settings) as client:
        if context.arguments.undo:
            reply = await client.delete(path, _Reply)
        else:
            reply = await client.post(path, {}, _Reply)
    if context.is_json:
        print_json(
            {"node_id": reply.node_id, "draining": not context.arguments.undo, "leaving": list(reply.instance_ids)}
        )
    elif context.arguments.undo:
        sys.stdout.write(f"{reply.node_id} takes work again\n")
    else:
        leaving = f"; {len(reply.instance_ids)} instances leave it" if reply.instance_ids else ""
        sys.stdout.write(f"{reply.node_id} takes no new work{leaving}\n")
    return 0
