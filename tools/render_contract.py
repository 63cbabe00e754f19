"""Renders the bus contract: subjects/schemas/*.json from the message types, subjects/asyncapi.yaml from subjects.toml.

Run it after a change to skulk/wire, skulk/bus/subjects.py or subjects/subjects.toml; `--check` only names the stale.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import tomllib
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from skulk.bus.subjects import CHANNELS, ENDPOINTS, is_message_type  # noqa: E402
from skulk.wire.base import ErrorBody  # noqa: E402
from skulk.wire.transfer import Parcel  # noqa: E402

SUBJECTS: Final = ROOT / "subjects"
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
Json = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Writes what is stale, or with ``--check`` names it; gives 1 when it only named something."""
    parser = argparse.ArgumentParser(prog="tools/render_contract.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a file is stale")
    check: bool = parser.parse_args(arguments).check
    files = rendered()
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    orphans = sorted(set((SUBJECTS / "schemas").glob("*.json")) - set(files))
    for path in (*stale, *orphans):
        print(f"{path.relative_to(ROOT)} is {'stale' if path in files else 'of no message'}")
    if check:
        return 1 if stale or orphans else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[path])
    for path in orphans:
        path.unlink()
    print(f"{len(stale)} written, {len(orphans)} removed, {len(files) - len(stale)} were up to date")
    return 0


def rendered() -> dict[Path, str]:
    """Every rendered file and what it should hold."""
    files = {
        SUBJECTS / "schemas" / f"{name}.json": json.dumps(schema_of(kind), indent=2, ensure_ascii=False) + "\n"
        for name, kind in message_types().items()
    }
    contract = tomllib.loads((SUBJECTS / "subjects.toml").read_text())
    body = yaml.safe_dump(asyncapi(contract), sort_keys=False, allow_unicode=True, width=110)
    files[SUBJECTS / "asyncapi.yaml"] = (
        "# Rendered by tools/render_contract.py from subjects.toml; don't edit.\n" + body
    )
    return files


def message_types() -> dict[str, type[Any]]:
    """Every record that crosses the bus as a body, by name."""
    kinds: list[type[Any]] = [channel.payload for channel in CHANNELS]
    kinds += [kind for endpoint in ENDPOINTS for kind in (endpoint.request, endpoint.reply)]
    kinds += [ErrorBody, Parcel]
    return {kind.__name__: kind for kind in kinds if is_message_type(kind)}


def schema_of(kind: type[Any]) -> Json:
    """A message's JSON Schema, whole in itself."""
    (_,), components = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    components = {name: _tidied(component) for name, component in components.items()}
    own = components.pop(kind.__name__)
    return {"$schema": DIALECT, **own, **({"$defs": components} if components else {})}


def _tidied(schema: Json) -> Json:
    """Docstrings without the indentation of the source."""
    return {**schema, "description": inspect.cleandoc(schema["description"])} if "description" in schema else schema


def asyncapi(contract: Json) -> Json:
    """The whole bus as an AsyncAPI 3.0 document."""
    channels: Json = {}
    operations: Json = {}
    for name, channel in contract["channels"].items():
        channels[name] = _channel(contract, channel, channel["payload"])
        operations[name] = _operation(name, channel)
    for name, endpoint in contract["endpoints"].items():
        key = f"{endpoint['service']}_{name}"
        channels[key] = _channel(contract, endpoint, endpoint["request"])
        channels[f"{key}_reply"] = {
            "address": None,
            "messages": {kind: {"$ref": f"#/components/messages/{kind}"} for kind in (endpoint["reply"], "ErrorBody")},
        }
        operations[key] = {**_operation(key, endpoint), "reply": _reply(f"{key}_reply")}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Skulk's bus",
            "version": f"{contract['protocol']}.0.0",
            "description": "Every subject on the NATS bus of a Skulk cluster. "
            "The operations name who sends; x-subscribers who receives.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {"node": {"host": "127.0.0.1:52414", "protocol": "nats", "description": "Each node's own broker."}},
        "channels": channels,
        "operations": operations,
        "components": {"messages": _messages(), "schemas": {"headers": _headers(contract)}},
    }


def _channel(contract: Json, entry: Json, payload: str) -> Json:
    used = [name for name in contract["ids"] if f"{{{name}}}" in entry["subject"]]
    return {
        "address": entry["subject"],
        "description": entry["description"],
        "parameters": {name: {"description": contract["ids"][name]} for name in used},
        "messages": {payload: {"$ref": f"#/components/messages/{payload}"}},
    }


def _operation(key: str, entry: Json) -> Json:
    extra = {"x-queue-group": entry["queue_group"]} if entry.get("queue_group") else {}
    return {
        "action": "send",
        "channel": {"$ref": f"#/channels/{key}"},
        "summary": entry["guarantee"],
        "x-publishers": list(entry["publishers"]),
        "x-subscribers": list(entry["subscribers"]),
        **extra,
    }


def _reply(key: str) -> Json:
    return {
        "address": {"description": "The inbox that NATS puts on the request.", "location": "$message.header#/reply-to"},
        "channel": {"$ref": f"#/channels/{key}"},
    }


def _messages() -> Json:
    records: Json = {
        name: {
            "name": name,
            "summary": inspect.cleandoc(kind.__doc__ or "").splitlines()[0],
            "headers": {"$ref": "#/components/schemas/headers"},
            "payload": {"$ref": f"schemas/{name}.json"},
        }
        for name, kind in message_types().items()
    }
    raw = {"name": "bytes", "contentType": "application/octet-stream", "summary": "Raw bytes."}
    return {**records, "bytes": raw}


def _headers(contract: Json) -> Json:
    properties = {name: {"type": "string", "description": text} for name, text in contract["headers"].items()}
    return {"type": "object", "properties": properties}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
