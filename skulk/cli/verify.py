"""``skulk verify MODEL``: hashes a model's files anew, where they lie, and compares them with its card."""

from __future__ import annotations

from typing import Final

import msgspec

from skulk.cli.client import connect
from skulk.cli.context import Context, print_json
from skulk.cli.interruptible import run_interruptible

HASH_S: Final = 3_600.0


class _Result(msgspec.Struct, frozen=True, kw_only=True):
    node_id: str
    problem: str = ""
    is_pinned: bool = False


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    model_id: str
    results: tuple[_Result, ...] = ()


def run(context: Context) -> int:
    """Verifies the files; 1 where something is wrong with them."""
    return run_interruptible(_verify(context))


async def _verify(context: Context) -> int:
    given = context.arguments
    body = {"node_id": given.node} if given.node else {}
    async with connect(context.settings) as client:
        answer = await client.post(f"/store/models/{given.model}/verify", body, _Answer, timeout_s=HASH_S)
    if context.is_json:
        print_json(msgspec.to_builtins(answer))
    else:
        for result in answer.results:
            print(f"{answer.model_id} on {result.node_id}: {_said(result)}")
    return 1 if any(result.problem for result in answer.results) else 0


def _said(result: _Result) -> str:
    if result.problem:
        return result.problem
    return "whole, as its card pins it" if result.is_pinned else "read to its end; its card pins no hash"
