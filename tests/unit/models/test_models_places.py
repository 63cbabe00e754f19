"""What lies in folders beside weights: projectors, configurations, safetensors, and the cards of the shelf."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from skulk.errors import RequestError
from skulk.models.catalogue import Catalogue
from skulk.models.config_json import card_from_config, is_vision_config, read_config, read_index
from skulk.models.shelf import Shelf
from skulk.node.storehouse import CatalogueFolders, other_addresses
from skulk.settings import Settings
from skulk.wire.model import ModelCard, ModelFile
from tests.support.gguf import write_model

CONFIG: dict[str, Any] = {
    "model_type": "qwen3", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "vocab_size": 99, "torch_dtype": "bfloat16",
}  # fmt: skip


def catalogue_of(folder: Path) -> Catalogue:
    found = Catalogue(folder, verified_file=folder / "verified.json")
    found.rescan()
    return found


def write_config(place: Path, **changes: Any) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.json").write_text(json.dumps(CONFIG | changes))


def test_a_projector_beside_a_model_makes_it_see(tmp_path: Path) -> None:
    write_model(tmp_path / "org" / "eyes" / "m-Q4_0.gguf")
    (tmp_path / "org" / "eyes" / "mmproj-m-f16.gguf").write_bytes(b"eyes")
    write_model(tmp_path / "org" / "blind" / "m-Q4_0.gguf")
    catalogue = catalogue_of(tmp_path)
    entry = catalogue.find("org/eyes")
    assert entry.projector is not None and entry.projector.name == "mmproj-m-f16.gguf"
    assert entry.card.projector == ModelFile(name="mmproj-m-f16.gguf", size_bytes=4)
    assert "vision" in entry.card.capabilities
    assert "vision" not in catalogue.find("org/blind").card.capabilities


def test_a_configuration_beside_a_model_may_say_that_it_sees(tmp_path: Path) -> None:
    write_model(tmp_path / "org" / "m" / "m-Q4_0.gguf")
    write_config(tmp_path / "org" / "m", vision_config={"depth": 2})
    assert "vision" in catalogue_of(tmp_path).find("org/m").card.capabilities


def test_a_folder_of_safetensors_is_a_model_for_mlx(tmp_path: Path) -> None:
    write_config(tmp_path / "mlx" / "q", quantization={"bits": 4, "group_size": 64})
    for part in (1, 2):
        (tmp_path / "mlx" / "q" / f"model-0000{part}-of-00002.safetensors").write_bytes(bytes(100))
    entry = catalogue_of(tmp_path).find("mlx/q")
    assert (entry.card.format, entry.card.backends, entry.card.quantization) == ("mlx", ("mlx-metal",), "4bit")
    assert (entry.card.context_length, entry.card.weights_bytes, len(entry.paths)) == (4096, 200, 2)
    assert entry.card.kv_bytes_per_token == 4 * 2 * 2 * 8 * 2


def test_a_broken_configuration_is_a_problem_with_a_sentence(tmp_path: Path) -> None:
    place = tmp_path / "mlx" / "q"
    place.mkdir(parents=True)
    (place / "config.json").write_text("{")
    (place / "model.safetensors").write_bytes(b"x")
    catalogue = catalogue_of(tmp_path)
    (problem,) = catalogue.problems()
    assert problem.model_id == "mlx/q" and "is no JSON" in problem.reason


def test_a_vision_model_s_text_part_counts(tmp_path: Path) -> None:
    del tmp_path
    inner = {name: CONFIG[name] for name in CONFIG if name != "model_type"}
    config = read_config(json.dumps({"model_type": "x_vl", "text_config": inner, "vision_config": {}}).encode(), "c")
    card = card_from_config(config, model_id="o/m", files=[ModelFile(name="m.safetensors", size_bytes=7)])
    assert (card.layers, card.weights_bytes, card.capabilities) == (4, 7, ("text", "vision"))


def test_an_embedding_model_in_safetensors_is_known_as_one() -> None:
    config = CONFIG | {"architectures": ["BertModel"]}
    card = card_from_config(config, model_id="o/m", files=[])
    assert (card.tasks, card.capabilities) == (("TextEmbedding",), ("embedding",))


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"vision_config": null}', b'"x"', b"\xff"])
def test_what_says_nothing_about_eyes(body: bytes) -> None:
    assert not is_vision_config(body)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": {"a": "../x.safetensors"}}, {"weight_map": {"a": "x.bin"}}]
)
def test_an_index_that_leads_elsewhere_is_refused(index: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        read_index(json.dumps(index).encode(), "index")
    assert caught.value.code == "model_file_invalid"


def shelved(folder: Path, **changes: Any) -> ModelCard:
    """A card of the shelf whose file lies there."""
    path = write_model(folder / "org" / "m" / "m-Q8_0.gguf")
    fields: dict[str, Any] = {
        "model_id": "org/m:Q8_0", "name": "M", "family": "llama", "backends": ("llama_cpp-cpu",),
        "context_length": 2048,
        "files": (ModelFile(name=path.name, size_bytes=path.stat().st_size),), "weights_bytes": 1,
        "kv_bytes_per_token": 1, "repo": "org/m", "revision": "c0ffee",
    }  # fmt: skip
    card = ModelCard(**{**fields, **changes})
    Shelf(folder).keep(card, 1.0)
    return card


def test_a_shelved_model_is_held_under_the_id_it_was_asked_by(tmp_path: Path) -> None:
    card = shelved(tmp_path)
    catalogue = catalogue_of(tmp_path)
    assert catalogue.find("org/m:Q8_0").card == card
    assert [(held.model_id, held.added_at > 0) for held in catalogue.held() if held.model_id.startswith("org")] == [
        ("org/m:Q8_0", True)
    ]


@pytest.mark.parametrize(
    ("changes", "is_here"),
    [
        ({"files": (ModelFile(name="m-Q8_0.gguf", size_bytes=1),)}, "has 4,544 bytes, its card says 1"),
        ({"files": (ModelFile(name="other.gguf", size_bytes=1),)}, ""),
        ({"projector": ModelFile(name="mmproj.gguf", size_bytes=1)}, ""),
    ],
)
def test_a_shelved_model_that_is_not_whole_is_known_and_not_held(
    tmp_path: Path, changes: dict[str, Any], is_here: str
) -> None:
    shelved(tmp_path, **changes)
    entry = catalogue_of(tmp_path).find("org/m:Q8_0")
    assert not entry.is_held
    assert (entry.problem is None) == (is_here == "")


def test_a_copied_models_folder_is_complete(tmp_path: Path) -> None:
    card = shelved(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    assert catalogue_of(tmp_path / "there").find("org/m:Q8_0").card == card
    # one folder of it alone is known by what lies in it
    shutil.copytree(tmp_path / "here" / "org" / "m", tmp_path / "alone" / "org" / "m")
    assert catalogue_of(tmp_path / "alone").find("org/m").is_held


@pytest.mark.parametrize("foreign_caches", [True, False])
def test_other_programs_folders_are_looked_at_unless_told_not_to(tmp_path: Path, foreign_caches: bool) -> None:
    settings = Settings(home="h", models_dir="m", models_path=("/given",), foreign_caches=foreign_caches)
    found = CatalogueFolders(settings, tmp_path, ())
    assert found.models_path[0] == Path("/given")
    assert (len(found.models_path) > 1, found.ollama_dir == tmp_path / ".ollama" / "models") == (
        foreign_caches, foreign_caches
    )  # fmt: skip


def test_a_node_serves_weights_on_every_host_that_its_routes_name() -> None:
    routes = ("10.0.0.2:52416", "192.168.1.2:52416", "[fd00::2]:52416", "10.0.0.2:52417")
    assert other_addresses("10.0.0.2:52500", routes) == ["192.168.1.2:52500", "[fd00::2]:52500"]
    assert other_addresses("10.0.0.2:52500", ()) == []
