"""The schemas and asyncapi.yaml are what `tools/render_contract.py` renders now; they are valid and joined up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import render_contract
import yaml

from skulk.wire.base import Wire
from tests.support.contract import SUBJECTS, toml

TYPES = render_contract.message_types()


@pytest.mark.parametrize("path", render_contract.rendered(), ids=lambda path: path.name)
def test_a_rendered_file_is_up_to_date(path: Path) -> None:
    assert path.exists(), f"{path.name} is missing: run python tools/render_contract.py"
    text = render_contract.rendered()[path]
    assert path.read_text() == text, f"{path.name} is stale: run python tools/render_contract.py"


def test_there_is_no_schema_of_no_message() -> None:
    assert {path.stem for path in (SUBJECTS / "schemas").glob("*.json")} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_a_schema_is_valid_and_forbids_no_unknown_fields(name: str) -> None:
    schema = json.loads((SUBJECTS / "schemas" / f"{name}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for record in (schema, *schema.get("$defs", {}).values()):
        assert record.get("additionalProperties", True) is not False


@pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.__name__)
def test_a_message_is_a_record_of_ours(kind: type[Any]) -> None:
    assert issubclass(kind, Wire)
    assert kind.__struct_config__.frozen
    assert not kind.__struct_config__.forbid_unknown_fields


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_asyncapi_has_every_subject_and_every_reference_leads_somewhere() -> None:
    document = yaml.safe_load((SUBJECTS / "asyncapi.yaml").read_text())
    contract = toml("subjects.toml")
    addresses = {channel["address"] for channel in document["channels"].values()}
    entries = (*contract["channels"].values(), *contract["endpoints"].values())
    assert addresses - {None} == {entry["subject"] for entry in entries}
    assert len(document["operations"]) == len(entries)
    for reference in set(references(document)):
        if reference.startswith("#/"):
            target = document
            for part in reference[2:].split("/"):
                target = target[part]
        else:
            assert (SUBJECTS / reference).exists(), reference


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The contract's files in a folder of their own, for the tool to work on."""
    folder = tmp_path / "subjects"
    shutil.copytree(SUBJECTS, folder)
    monkeypatch.setattr(render_contract, "SUBJECTS", folder)
    monkeypatch.setattr(render_contract, "ROOT", tmp_path)
    return folder


def test_check_names_what_is_stale_and_a_run_mends_it(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert render_contract.main(["--check"]) == 0
    (copy / "schemas" / "Chunk.json").write_text("{}")
    (copy / "schemas" / "Gone.json").write_text("{}")
    assert render_contract.main(["--check"]) == 1
    told = capsys.readouterr().out
    assert "Chunk.json is stale" in told
    assert "Gone.json is of no message" in told
    assert (copy / "schemas" / "Gone.json").exists()
    assert render_contract.main([]) == 0
    assert render_contract.main(["--check"]) == 0
    assert not (copy / "schemas" / "Gone.json").exists()
