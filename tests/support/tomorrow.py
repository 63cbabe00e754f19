"""Messages as a version of tomorrow sends them: with a field more in every record."""

from __future__ import annotations

from typing import Any, Final

MAPPINGS: Final = {"streams", "instances", "tombstones", "drains", "score", "variables", "logit_bias", "closed"}
"""Fields whose keys are ids and names: there a new key is no unknown field."""


def tomorrow(value: Any, *, is_mapping: bool = False) -> Any:
    """The same JSON with one more field in every record, at any depth."""
    if isinstance(value, list):
        return [tomorrow(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    inner = {name: tomorrow(field, is_mapping=name in MAPPINGS) for name, field in value.items()}
    return inner if is_mapping else {**inner, "field_of_tomorrow": {"a": [1]}}
