"""Golden examples: every message type has one; they decode, round-trip and obey the schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import render_contract
from hypothesis import given
from hypothesis import strategies as st

from skulk.cluster.fold import fold
from skulk.errors import ServiceError
from skulk.ids import parse_runner_id
from skulk.wire.base import decode, encode
from skulk.wire.commands import History
from skulk.wire.events import EventRecord
from skulk.wire.generation import Chunk
from skulk.wire.placement import MemoryEstimate
from skulk.wire.state import ClusterState, Position
from skulk.wire.unknown import joined
from tests.support.contract import EXAMPLES, SUBJECTS, message_of
from tests.support.tomorrow import tomorrow

TYPES = render_contract.message_types()
each = pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)


def test_every_message_type_has_an_example_and_every_example_a_type() -> None:
    assert {message_of(example) for example in EXAMPLES} == set(TYPES)


def test_every_kind_of_event_has_an_example() -> None:
    (kinds,) = [field.type for field in msgspec.structs.fields(EventRecord) if field.name == "event"]
    tags = {kind.__struct_config__.tag for kind in kinds.__args__}
    assert {example.stem.split(".")[1] for example in EXAMPLES if message_of(example) == "EventRecord"} == tags


@each
def test_an_example_survives_a_round_trip(example: Path) -> None:
    kind = TYPES[message_of(example)]
    message = decode(example.read_bytes(), kind)
    assert decode(encode(message), kind) == message


def holds(whole: Any, part: Any) -> bool:
    """Whether ``part`` is all in ``whole``: equal, but that records may have more fields."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(name in whole and holds(whole[name], part[name]) for name in part)
    if isinstance(part, list):
        return isinstance(whole, list) and len(whole) == len(part) and all(map(holds, whole, part))
    return whole == part


@each
def test_an_example_has_no_field_that_its_type_lacks(example: Path) -> None:
    message = decode(example.read_bytes(), TYPES[message_of(example)])
    assert holds(json.loads(encode(message)), json.loads(example.read_bytes()))


@each
def test_an_example_and_its_encoded_form_obey_the_schema(example: Path) -> None:
    name = message_of(example)
    schema = json.loads((SUBJECTS / "schemas" / f"{name}.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(json.loads(example.read_bytes()))
    validator.validate(json.loads(encode(decode(example.read_bytes(), TYPES[name]))))


@each
def test_fields_of_a_newer_version_are_ignored_at_any_depth(example: Path) -> None:
    kind = TYPES[message_of(example)]
    sent = json.dumps(tomorrow(json.loads(example.read_bytes())))
    assert "field_of_tomorrow" in sent
    assert known_part(decode(sent.encode(), kind)) == decode(example.read_bytes(), kind)


def known_part(message: Any) -> Any:
    """A message without what it keeps for a newer version: only whole states do."""
    state = getattr(message, "state", None)
    if not isinstance(state, ClusterState):
        return message
    assert state.partial
    assert state.unknown["field_of_tomorrow"] == {"a": [1]}
    return msgspec.structs.replace(message, state=msgspec.structs.replace(state, partial=False, unknown={}))


@each
def test_what_a_newer_version_wrote_into_a_state_survives_a_round_trip(example: Path) -> None:
    kind = TYPES[message_of(example)]
    if message_of(example) not in ("Snapshot", "Gathered"):
        return
    sent = json.dumps(tomorrow(json.loads(example.read_bytes()))).encode()
    message = decode(sent, kind)
    assert decode(encode(message), kind) == message
    put_back = joined(json.loads(encode(message))["state"])
    put_back["partial"] = False
    assert holds(put_back, json.loads(sent)["state"])


@each
def test_a_message_without_its_required_fields_is_refused_with_the_field_s_name(example: Path) -> None:
    kind = TYPES[message_of(example)]
    required = [field.encode_name for field in msgspec.structs.fields(kind) if field.required]
    whole = json.loads(example.read_bytes())
    for name in required:
        cut = {field: value for field, value in whole.items() if field != name}
        with pytest.raises(ServiceError, match=name) as caught:
            decode(json.dumps(cut).encode(), kind)
        assert caught.value.code == "invalid_message"


@given(body=st.binary(max_size=64))
def test_bytes_that_are_no_message_are_refused_by_code(body: bytes) -> None:
    with pytest.raises(ServiceError) as caught:
        decode(body, Chunk)
    assert caught.value.code == "invalid_message"


def named(value: Any, name: str) -> list[Any]:
    """Every value of a field of this name, at any depth."""
    if isinstance(value, dict):
        own = [value[name]] if value.get(name) is not None else []
        return own + [found for inner in value.values() for found in named(inner, name)]
    return [found for inner in value for found in named(inner, name)] if isinstance(value, list) else []


@each
def test_the_values_of_an_example_are_realistic(example: Path) -> None:
    whole = json.loads(example.read_bytes())
    for runner in named(whole, "runner_id"):
        parse_runner_id(runner)
    for memory in named(whole, "memory"):
        if "need_bytes" in memory:
            parts = msgspec.convert(memory, MemoryEstimate)
            total = parts.weights_bytes + parts.kv_bytes + parts.compute_bytes + parts.headroom_bytes
            assert parts.need_bytes == total


def test_the_example_of_a_history_folds() -> None:
    first, *others = decode((SUBJECTS / "examples" / "History.json").read_bytes(), History).events
    before = Position(term=first.position.term, seq=first.position.seq - 1)
    state = ClusterState(cluster="home", position=before)
    for record in (first, *others):
        state = fold(state, record)
    assert [instance.assignment is not None for instance in state.instances.values()] == [True]
