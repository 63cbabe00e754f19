from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skulk.errors import RequestError, ServiceError
from skulk.models.shelf import OnDisk, Shelf, evictions
from skulk.wire.model import ModelCard, ModelFile


def card_of(model_id: str = "org/m", *names: str, **changes: Any) -> ModelCard:
    files = tuple(ModelFile(name=name, size_bytes=3) for name in names or ("m.gguf",))
    fields: dict[str, Any] = {
        "model_id": model_id, "name": "m", "family": "llama", "backends": ("fake-cpu",), "context_length": 10,
        "files": files, "weights_bytes": 1, "kv_bytes_per_token": 1,
    }  # fmt: skip
    return ModelCard(**{**fields, **changes})


def put(shelf: Shelf, card: ModelCard) -> None:
    shelf.keep(card, 1.0)
    for path in shelf.files_of(card):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"abc")


def test_a_card_is_kept_with_its_use(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.keep(card_of(), 5.0, pinned=True)
    shelf.touch("org/m", 9.0)
    shelf.keep(card_of(name="new"), 20.0)
    (found,) = Shelf(tmp_path).all()
    assert (found.card.name, found.pinned, found.added_at, found.used_at) == ("new", True, 5.0, 9.0)
    shelf.keep(card_of(), 20.0, pinned=False)
    assert not shelf.all()[0].pinned


def test_a_revision_and_a_quantization_lie_where_they_belong(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    assert shelf.place_of(card_of("org/m:Q8_0")) == tmp_path / "org" / "m"
    assert shelf.place_of(card_of("org/m@v1")) == tmp_path / "org" / "m@v1"
    assert shelf.place_of(card_of("bare")) == tmp_path / "bare"


@pytest.mark.parametrize("model_id", ["../x", "a/b/c", "", ".x", "a\\b", "/etc/passwd"])
def test_an_id_that_leads_elsewhere_is_refused(tmp_path: Path, model_id: str) -> None:
    with pytest.raises(RequestError):
        Shelf(tmp_path).place_of(card_of(model_id))


@pytest.mark.parametrize("name", ["../m.gguf", "/m.gguf", "m.py", "a/../../m.gguf"])
def test_a_file_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError):
        Shelf(tmp_path).keep(card_of("org/m", name), 1.0)


def test_removing_takes_the_files_the_card_and_the_folders(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    put(shelf, card_of("org/m", "sub/a.gguf", "b.gguf"))
    assert shelf.remove("org/m") > 0
    assert shelf.all() == () and not (tmp_path / "org").exists()
    assert shelf.remove("org/m") == 0


def test_what_another_model_shares_stays(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    put(shelf, card_of("org/m"))
    put(shelf, card_of("org/m:Q8_0"))
    assert shelf.remove("org/m:Q8_0") == 0
    assert (tmp_path / "org" / "m" / "m.gguf").exists()


def test_a_damaged_card_hides_no_other(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.keep(card_of(), 1.0)
    (tmp_path / ".cards" / "x.json").write_bytes(b"{")
    assert [one.card.model_id for one in shelf.all()] == ["org/m"]


def model(name: str, size: int = 10, used: float = 0.0, *, kept: bool = False) -> OnDisk:
    return OnDisk(model_id=name, held_bytes=size, used_at=used, is_kept=kept)


def test_the_least_recently_used_go_first_and_no_more_than_needed() -> None:
    models = [model("a", used=3), model("b", used=1), model("c", used=2)]
    going = evictions(models, needed_bytes=15, budget_bytes=30, in_use=frozenset())
    assert going == ("b", "c")
    assert evictions(models, needed_bytes=0, budget_bytes=30, in_use=frozenset()) == ()
    assert evictions(models, needed_bytes=10**9, budget_bytes=0, in_use=frozenset()) == ()


def test_what_is_pinned_or_in_use_stays_and_the_numbers_are_said() -> None:
    models = [model("a", kept=True), model("b"), model("c", used=1)]
    assert evictions(models, needed_bytes=10, budget_bytes=30, in_use=frozenset({"b"})) == ("c",)
    with pytest.raises(ServiceError, match=r"25 B more .* 30 B .* 20 B are pinned or in use") as caught:
        evictions(models, needed_bytes=25, budget_bytes=30, in_use=frozenset({"b"}))
    assert caught.value.code == "disk_full"


NAMES = st.sampled_from("abcdef")
MODELS = st.lists(
    st.builds(OnDisk, model_id=NAMES, held_bytes=st.integers(0, 50), used_at=st.floats(0, 9), is_kept=st.booleans()),
    unique_by=lambda one: one.model_id,
)


@given(models=MODELS, needed=st.integers(0, 100), budget=st.integers(1, 200), in_use=st.frozensets(NAMES))
def test_evictions_keep_the_budget_and_touch_nothing_protected(
    models: list[OnDisk], needed: int, budget: int, in_use: frozenset[str]
) -> None:
    try:
        going = evictions(models, needed_bytes=needed, budget_bytes=budget, in_use=in_use)
    except ServiceError:
        kept = sum(one.held_bytes for one in models if one.is_kept or one.model_id in in_use)
        assert kept + needed > budget
        return
    assert not set(going) & (in_use | {one.model_id for one in models if one.is_kept})
    assert sum(one.held_bytes for one in models if one.model_id not in going) + needed <= budget
