"""What a newer version wrote and this one doesn't know: kept beside the record, and put back by whoever knows it.

    newer's JSON ──opened──> known fields + `unknown` (the rest, by path) ──> JSON ──opened──> newer's record, whole

`unknown` is a tree of the same shape that holds only what the record lacks; in a list, by index.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import msgspec

T = TypeVar("T", bound=msgspec.Struct)

UNKNOWN = "unknown"


def opened(raw: dict[str, Any], kind: type[T]) -> T:
    """A record of a kind with a field ``unknown`` out of its JSON: every field that the kind doesn't have is in there.

    What another version kept in ``unknown`` and this one knows becomes a field again.

    Raises:
        msgspec.ValidationError: the JSON isn't of this shape.
    """
    whole = joined(raw)
    record = msgspec.convert(whole, kind)
    rest = _rest(whole, {**msgspec.to_builtins(record), UNKNOWN: None})
    return msgspec.structs.replace(record, unknown=rest) if rest else record


def joined(raw: dict[str, Any]) -> dict[str, Any]:
    """A record's JSON as a version that knows every field reads it: what is kept in ``unknown`` is in its place."""
    whole = {name: value for name, value in raw.items() if name != UNKNOWN}
    return _joined(whole, raw.get(UNKNOWN))


def _rest(whole: Any, known: Any) -> Any:
    """What ``whole`` has and ``known`` lacks; None where nothing."""
    if isinstance(whole, dict) and isinstance(known, dict):
        fields = cast("dict[str, Any]", whole)
        found = {
            name: value if name not in known else _rest(value, known[name])
            for name, value in fields.items()
            if name not in known or _rest(value, known[name]) is not None
        }
        return found or None
    if isinstance(whole, list) and isinstance(known, list | tuple):
        pairs = zip(cast("list[Any]", whole), cast("tuple[Any, ...]", known), strict=False)
        items = {
            str(index): rest for index, (one, other) in enumerate(pairs) if (rest := _rest(one, other)) is not None
        }
        return items or None
    return None


def _joined(whole: Any, rest: Any) -> Any:
    """``whole`` with what was taken out of it."""
    if isinstance(whole, dict) and isinstance(rest, dict):
        fields, kept = cast("dict[str, Any]", whole), cast("dict[str, Any]", rest)
        added = {name: value for name, value in kept.items() if name not in fields}
        return {**{name: _joined(value, kept.get(name)) for name, value in fields.items()}, **added}
    if isinstance(whole, list) and isinstance(rest, dict):
        items = cast("list[Any]", whole)
        return [_joined(item, cast("dict[str, Any]", rest).get(str(index))) for index, item in enumerate(items)]
    return cast("Any", whole)


def pruned(unknown: dict[str, Any], *path: str) -> dict[str, Any]:
    """The tree without what lies at a path: the record there was replaced or is gone."""
    name, *rest = path
    if name not in unknown:
        return unknown
    others = {key: value for key, value in unknown.items() if key != name}
    inner = pruned(unknown[name], *rest) if rest and isinstance(unknown[name], dict) else {}
    return {**others, name: inner} if inner else others
