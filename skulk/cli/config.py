"""``skulk config``: every setting, its value and where it came from; secrets are masked."""

from __future__ import annotations

import msgspec

from skulk.cli.context import Column, Context, print_rows
from skulk.settings_options import OPTIONS, masked_value


class SettingRow(msgspec.Struct, frozen=True, kw_only=True):
    """One setting; ``setting`` is its key in ``skulk.toml``, ``environment`` its variable."""

    setting: str
    value: str
    source: str
    environment: str


COLUMNS = (
    Column[SettingRow]("SETTING", lambda row: row.setting),
    Column[SettingRow]("VALUE", lambda row: row.value),
    Column[SettingRow]("SOURCE", lambda row: row.source),
)


def run(context: Context) -> int:
    """Prints the settings."""
    rows = [
        SettingRow(
            setting=option.key,
            value=masked_value(option, getattr(context.settings, option.field)),
            source=context.loaded.sources[option.field],
            environment=option.env,
        )
        for option in OPTIONS
    ]
    print_rows(context, COLUMNS, rows, empty="no settings")
    return 0
