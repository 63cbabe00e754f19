"""``skulk remove MODEL``: deletes a model's files from the nodes that have them, or from one."""

from __future__ import annotations

import msgspec

from skulk.cli.client import connect
from skulk.cli.context import Context, print_json
from skulk.cli.interruptible import run_interruptible
from skulk.units import format_bytes


class _Removed(msgspec.Struct, frozen=True, kw_only=True):
    node_id: str
    freed_bytes: int = 0


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    model_id: str
    removed: tuple[_Removed, ...] = ()


def run(context: Context) -> int:
    """Removes the files."""
    return run_interruptible(_remove(context))


async def _remove(context: Context) -> int:
    given = context.arguments
    async with connect(context.settings) as client:
        query = {"node_id": given.node} if given.node else None
        answer = await client.delete(f"/store/models/{given.model}", _Answer, query=query)
    if context.is_json:
        print_json(msgspec.to_builtins(answer))
        return 0
    for removed in answer.removed:
        print(f"removed {answer.model_id} from {removed.node_id} ({format_bytes(removed.freed_bytes)} freed)")
    return 0
