"""Cards without files: what they may say, how it wins, and that the built-in ones hold together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from skulk.errors import RequestError
from skulk.models.card import read_card
from skulk.models.catalogue import BUILT_IN_CARDS, Catalogue
from skulk.models.hints import CardHint, with_hint
from skulk.models.selection import select
from skulk.wire.model import ModelFile, SamplingDefaults
from tests.support.gguf import write_model
from tests.support.states import card

PAGE = 'sources = ["https://example.org/page"]\n'


def hint_of(tmp_path: Path, text: str) -> CardHint:
    path = tmp_path / "card.toml"
    path.write_text(text)
    found = read_card(path)
    assert isinstance(found, CardHint)
    return found


@pytest.mark.parametrize("path", sorted(BUILT_IN_CARDS.glob("*.toml")), ids=lambda path: path.stem)
def test_built_in_cards_are_valid_and_name_their_pages(path: Path) -> None:
    found = read_card(path)
    if isinstance(found, CardHint):
        assert found.sources and all(page.startswith("https://") for page in found.sources)
        assert len(set(found.sources)) == len(found.sources)
        assert found.name and found.family
        assert "sha256" not in path.read_text(), "no hash that was not seen"


def test_there_are_cards_for_a_dozen_families() -> None:
    found = [one for path in BUILT_IN_CARDS.glob("*.toml") if isinstance(one := read_card(path), CardHint)]
    assert len(found) >= 12
    assert len({one.model_id for one in found}) == len(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('model_id = "org/m"\n', "Object missing required field `sources`"),
        ('model_id = "org/m"\nsources = []\n', "sources:"),
        ('model_id = "org/m:Q8_0"\n' + PAGE, "model_id:"),
        ('model_id = "bare"\n' + PAGE, "model_id:"),
        ('model_id = "org/m"\nquant = "Q8_0"\n' + PAGE, "unknown field `quant`"),
        ('model_id = "org/m"\nmax_context_tokens = "8k"\n' + PAGE, "$.max_context_tokens"),
        ('model_id = "org/m"\nmax_context_tokens = 0\n' + PAGE, "max_context_tokens: 0"),
        ('model_id = "org/m"\nmin_vram_gib = -1\n' + PAGE, "min_vram_gib"),
        ('model_id = "org/m"\nbackends = ["Vulkan!"]\n' + PAGE, "backends: 'Vulkan!'"),
        ('model_id = "org/m"\nreasoning_format = "loud"\n' + PAGE, "$.reasoning_format"),
        ('model_id = "org/m"\n' + PAGE + "[sampling]\ntemperature = 9\n", "sampling.temperature: 9"),
        ('model_id = "org/m"\n' + PAGE + "[sampling]\nseed = 1\n", "unknown field `seed`"),
        ('model_id = "org/m"\n' + PAGE + "[sampling]\ntemprature = 1\n", "unknown field `temprature`"),
    ],
)
def test_a_bad_card_is_told_with_file_and_field(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(RequestError) as refused:
        hint_of(tmp_path, text)
    assert words in refused.value.detail
    assert str(tmp_path / "card.toml") in refused.value.detail


def test_what_a_hint_says_wins_and_the_rest_stays(tmp_path: Path) -> None:
    hint = hint_of(
        tmp_path,
        'model_id = "org/model"\nbackends = ["llama_cpp-vulkan"]\nmax_context_tokens = 4096\nmin_vram_gib = 24.0\n'
        'reasoning_format = "think"\ntool_format = "hermes"\n' + PAGE + "[sampling]\ntemperature = 0.6\n",
    )
    before = card()
    after = with_hint(before, hint)
    assert after == msgspec.structs.replace(
        before,
        backends=("llama_cpp-vulkan",),
        max_context_tokens=4096,
        min_vram_gib=24.0,
        reasoning_format="think",
        tool_format="hermes",
        sampling=SamplingDefaults(temperature=0.6),
    )


@pytest.mark.parametrize(
    ("vision", "seen", "has_eyes"), [(None, True, True), (False, False, False), (True, True, True)]
)
def test_vision_can_be_switched_off(vision: bool | None, seen: bool, has_eyes: bool) -> None:
    eyes = ModelFile(name="mmproj.gguf", size_bytes=1)
    before = msgspec.structs.replace(card(), capabilities=("text", "vision"), projector=eyes)
    after = with_hint(before, CardHint(model_id="org/model", sources=("https://x",), vision=vision))
    assert ("vision" in after.capabilities) == seen
    assert (after.projector is not None) == has_eyes


def catalogue_of(tmp_path: Path, own: dict[str, str], **changes: Any) -> Catalogue:
    cards = tmp_path / "cards"
    cards.mkdir()
    for name, text in own.items():
        (cards / name).write_text(text)
    found = Catalogue(tmp_path / "models", verified_file=tmp_path / "verified.json", card_dirs=(cards,), **changes)
    found.rescan()
    return found


def test_own_cards_win_over_built_in_ones_and_reach_the_files_of_their_repository(tmp_path: Path) -> None:
    model_id = "unsloth/gpt-oss-20b-GGUF"
    write_model(tmp_path / "models" / model_id / "gpt-oss-20b-Q8_0.gguf")
    text = f'model_id = "{model_id}"\nmax_context_tokens = 777\n{PAGE}'
    catalogue = catalogue_of(tmp_path, {"mine.toml": text})
    hint = catalogue.hint_of(model_id)
    assert hint is not None
    assert hint.max_context_tokens == 777
    assert catalogue.find(model_id).card.max_context_tokens == 777
    assert catalogue.problems() == ()


def test_two_own_cards_of_one_model_and_bad_ones_are_problems(tmp_path: Path) -> None:
    text = f'model_id = "org/m"\n{PAGE}'
    catalogue = catalogue_of(tmp_path, {"a.toml": text, "b.toml": text, "c.toml": "model_id = 7\n"})
    assert sorted(problem.path.name for problem in catalogue.problems()) == ["b.toml", "c.toml"]
    assert catalogue.hint_of("org/m") is not None


def test_a_pinned_file_is_taken_whatever_its_name_says() -> None:
    files = [ModelFile(name=name, size_bytes=10) for name in ("phi-4-fp16.gguf", "phi-4-q4.gguf")]
    assert [file.name for file in select("microsoft/phi-4-gguf", files, file="phi-4-q4.gguf").weights] == [
        "phi-4-q4.gguf"
    ]
    with pytest.raises(RequestError, match="which its card pins"):
        select("microsoft/phi-4-gguf", files, file="gone.gguf")
