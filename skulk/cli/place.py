"""``skulk place MODEL``: adds instances; ``--explain`` says why there, ``--wait`` returns when they are ready."""

from __future__ import annotations

import sys

import msgspec

from skulk.cli.client import connect
from skulk.cli.context import Context, note, print_json
from skulk.cli.interruptible import run_interruptible
from skulk.cli.placing import place, preview, wait_ready
from skulk.cli.preview import explain


def run(context: Context) -> int:
    """Places the model."""
    return run_interruptible(_place(context))


async def _place(context: Context) -> int:
    given = context.arguments
    placed: list[dict[str, object]] = []
    async with connect(context.settings) as client:
        for _ in range(given.replicas):
            row: dict[str, object] = {"model_id": given.model}
            if given.explain:
                decision = await preview(client, given.model, excluded=given.exclude, context_length=given.context)
                row["decision"] = msgspec.to_builtins(decision)
                if not context.is_json:
                    sys.stdout.write(explain(decision))
            instance_id = await place(client, given.model, excluded=given.exclude, context_length=given.context)
            placed.append({"instance_id": instance_id, **row})
            if not context.is_json:
                # At once: what was placed must be known even if the next one can't be.
                print(f"placed {instance_id} ({given.model})", flush=True)
        if given.wait:
            await wait_ready(client, {str(row["instance_id"]) for row in placed}, note, all_of_them=True)
    if context.is_json:
        print_json(placed)
    return 0
