"""``skulk place MODEL``: adds instances; ``--explain`` says why there, ``--wait`` returns when they are ready."""

from __future__ import annotations

import sys

import msgspec

from skulk.cli.client import connect
from skulk.cli.context import Context, note, print_json
from skulk.cli.interruptible import run_interruptible
from skulk.cli.placing import Wish, place, preview, wait_ready
from skulk.cli.preview import explain


def run(context: Context) -> int:
    """Places the model."""
    return run_interruptible(_place(context))


async def _place(context: Context) -> int:
    given = context.arguments
    wish = Wish(excluded=tuple(given.exclude), context_length=given.context, replicas=given.replicas, force=given.force)
    row: dict[str, object] = {"model_id": given.model}
    async with connect(context.settings) as client:
        if given.explain:
            decision = await preview(client, given.model, wish)
            row["decision"] = msgspec.to_builtins(decision)
            if not context.is_json:
                sys.stdout.write(explain(decision))
        placed = await place(client, given.model, wish)
        for warning in placed.warnings:
            note(f"warning: {warning}")
        if not context.is_json:
            for instance_id in placed.instance_ids:
                print(f"placed {instance_id} ({given.model})", flush=True)
        if given.wait:
            await wait_ready(client, placed.instance_ids, note, all_of_them=True)
    if context.is_json:
        print_json([{"instance_id": instance_id, **row} for instance_id in placed.instance_ids])
    return 0
