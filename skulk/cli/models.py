"""``skulk models``: what can be asked, the readiest first."""

from __future__ import annotations

import msgspec

from skulk.cli.client import ApiClient, connect
from skulk.cli.context import Column, Context, print_rows
from skulk.cli.interruptible import run_interruptible
from skulk.units import MIB, format_bytes


class ModelRow(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of ``GET /v1/models``. ``state``: ``ready``, ``loading``, ``downloaded`` or ``available``."""

    id: str
    state: str = ""
    family: str = ""
    context_length: int | None = None
    storage_size_megabytes: float | None = None


class _Models(msgspec.Struct, frozen=True, kw_only=True):
    data: tuple[ModelRow, ...]


COLUMNS = (
    Column[ModelRow]("MODEL", lambda row: row.id),
    Column[ModelRow]("STATE", lambda row: row.state),
    Column[ModelRow]("SIZE", lambda row: format_bytes(int((row.storage_size_megabytes or 0) * MIB))),
    Column[ModelRow]("CONTEXT", lambda row: str(row.context_length or "")),
    Column[ModelRow]("FAMILY", lambda row: row.family),
)


async def list_models(client: ApiClient) -> tuple[ModelRow, ...]:
    """The catalogue as the gateway orders it.

    Raises:
        SkulkError: as `ApiClient.get`.
    """
    return (await client.get("/v1/models", _Models)).data


def run(context: Context) -> int:
    """Prints the models."""
    return run_interruptible(_models(context))


async def _models(context: Context) -> int:
    async with connect(context.settings) as client:
        rows = await list_models(client)
    print_rows(context, COLUMNS, rows, empty="no model is known; put a GGUF file into a folder of SKULK_MODELS_PATH")
    return 0
