from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from skulk.models.catalogue import Catalogue
from skulk.models.foreign import lm_studio_folders
from tests.support.gguf import TENSORS, gguf_bytes, llama_metadata, write_model

BODY = gguf_bytes(llama_metadata(), TENSORS)


def pull(store: Path, name: str, *, namespace: str = "library", eyes: bool = False, body: bytes = BODY) -> str:
    """Lays a model into the store as Ollama does; its digest."""
    digest = hashlib.sha256(body).hexdigest()
    layers = [
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "0" * 64, "size": 1},
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": len(body)},
    ]
    (store / "blobs").mkdir(parents=True, exist_ok=True)
    (store / "blobs" / f"sha256-{digest}").write_bytes(body)
    if eyes:
        layers.append(
            {"mediaType": "application/vnd.ollama.image.projector", "digest": "sha256:" + "e" * 64, "size": 3}
        )
        (store / "blobs" / f"sha256-{'e' * 64}").write_bytes(b"eye")
    model, tag = name.split(":")
    manifest = store / "manifests" / "registry.ollama.ai" / namespace / model / tag
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return digest


def catalogue_of(tmp_path: Path) -> Catalogue:
    lm_studio = lm_studio_folders(tmp_path / "home")
    found = Catalogue(
        tmp_path / "models", lm_studio, verified_file=tmp_path / "verified.json", ollama_dir=tmp_path / "ollama"
    )
    found.rescan()
    return found


def test_a_model_of_ollama_is_called_as_ollama_calls_it_and_pinned_by_its_digest(tmp_path: Path) -> None:
    digest = pull(tmp_path / "ollama", "llama3.2:1b")
    pull(tmp_path / "ollama", "mine:latest", namespace="ada")
    catalogue = catalogue_of(tmp_path)
    entry = catalogue.find("llama3.2:1b")
    assert entry.is_held and entry.card.files[0].sha256 == digest
    assert catalogue.verify(entry) == (digest,)
    assert catalogue.find("ada.mine:latest").is_held


def test_a_projector_of_ollama_makes_it_see(tmp_path: Path) -> None:
    pull(tmp_path / "ollama", "llava:7b", eyes=True)
    entry = catalogue_of(tmp_path).find("llava:7b")
    assert "vision" in entry.card.capabilities
    assert entry.projector is not None and entry.projector.read_bytes() == b"eye"


def test_a_damaged_blob_is_noticed(tmp_path: Path) -> None:
    digest = pull(tmp_path / "ollama", "m:1")
    blob = tmp_path / "ollama" / "blobs" / f"sha256-{digest}"
    spoiled = bytearray(BODY)
    spoiled[-1] ^= 1
    blob.write_bytes(spoiled)
    catalogue = catalogue_of(tmp_path)
    with pytest.raises(Exception, match="damaged or another file"):
        catalogue.verify(catalogue.find("m:1"))


def test_what_is_broken_there_is_a_problem_and_hides_nothing(tmp_path: Path) -> None:
    store = tmp_path / "ollama"
    pull(store, "good:1")
    digest = pull(store, "gone:1", body=BODY + bytes(32))
    (store / "blobs" / f"sha256-{digest}").unlink()
    place = store / "manifests" / "registry.ollama.ai" / "library" / "odd"
    place.mkdir()
    (place / "json").write_text("{")
    (place / "empty").write_text("{}")
    (place / "path").write_text(
        json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../x"}]})
    )
    catalogue = catalogue_of(tmp_path)
    assert catalogue.find("good:1").is_held
    problems = {problem.model_id for problem in catalogue.problems()}
    assert problems == {"gone:1", "odd:json", "odd:empty", "odd:path"}


def test_lm_studio_s_folders_are_read_as_our_own(tmp_path: Path) -> None:
    write_model(tmp_path / "home" / ".lmstudio" / "models" / "org" / "repo" / "m-Q4_0.gguf")
    write_model(tmp_path / "home" / ".cache" / "lm-studio" / "models" / "old" / "repo" / "m-Q4_0.gguf")
    catalogue = catalogue_of(tmp_path)
    assert catalogue.find("org/repo").is_held and catalogue.find("old/repo").is_held


def test_nothing_is_written_into_other_programs_folders(tmp_path: Path) -> None:
    pull(tmp_path / "ollama", "m:1")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "ollama").rglob("*"))
    catalogue = catalogue_of(tmp_path)
    catalogue.verify(catalogue.find("m:1"))
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "ollama").rglob("*")) == before
