"""The catalogue: one view over cards and folders; nothing bad is fatal, nothing bad is silent."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec
import pytest

from skulk.errors import RequestError
from skulk.models.catalogue import EMBEDDED_MODEL, Catalogue
from skulk.models.verification import VerificationCache
from tests.support.gguf import write_model


class Place:
    """A node's folders."""

    def __init__(self, root: Path) -> None:
        self.models = root / "models"
        self.more = root / "more"
        self.cards = root / "cards"
        self.verified = root / "verified.json"
        self.cards.mkdir(parents=True)

    def catalogue(self) -> Catalogue:
        catalogue = Catalogue(self.models, (self.more,), verified_file=self.verified, card_dirs=(self.cards,))
        catalogue.rescan()
        return catalogue

    def card(self, name: str, body: bytes, *, sha256: str | None = None, size: int | None = None) -> None:
        """An own card for the fake engine, pinned to a body."""
        pin = f'sha256 = "{sha256}"' if sha256 else ""
        (self.cards / f"{name}.toml").write_text(
            f'model_id = "own/{name}"\nname = "{name}"\nfamily = "fake"\nbackends = ["fake-cpu"]\ncontext_length = 64\n'
            f"weights_bytes = 1\nkv_bytes_per_token = 1\n[[files]]\nname = 'f.json'\n"
            f"size_bytes = {len(body) if size is None else size}\n{pin}\n"
        )


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def held(catalogue: Catalogue) -> set[str]:
    return {model.model_id for model in catalogue.held()} - {EMBEDDED_MODEL}


def put(path: Path, body: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    return path


def test_models_of_all_folders_are_found(place: Place) -> None:
    write_model(place.models / "org/repo/m-Q4_1.gguf")
    path = write_model(place.more / "bare.gguf")
    catalogue = place.catalogue()
    assert held(catalogue) == {"org/repo", "bare"}
    assert catalogue.path_of("bare") == path
    entry = catalogue.find("org/repo:q4_1")
    assert entry.card.model_id == "org/repo" and entry.card.files[0].name == "m-Q4_1.gguf"
    assert catalogue.problems() == ()
    assert [e.card.model_id for e in catalogue.entries()] == sorted(e.card.model_id for e in catalogue.entries())


def test_every_quantization_can_be_asked_for(place: Place) -> None:
    for quantization in ("Q4_K_M", "Q8_0"):
        write_model(place.models / f"o/r/m-{quantization}.gguf")
    catalogue = place.catalogue()
    assert catalogue.find("o/r").card.quantization == "Q4_K_M"
    assert catalogue.find("o/r:Q8_0").card.quantization == "Q8_0"
    assert catalogue.find("o/r:Q8_0").card.model_id == "o/r:Q8_0"


@pytest.mark.parametrize("cut", [0, 10, -1])
def test_a_bad_file_is_listed_and_the_others_work(place: Place, cut: int) -> None:
    good = write_model(place.models / "good.gguf")
    put(place.models / "bad.gguf", good.read_bytes()[:cut])
    catalogue = place.catalogue()
    assert held(catalogue) == {"good"}
    [problem] = catalogue.problems()
    assert problem.model_id == "bad" and str(place.models / "bad.gguf") in problem.reason
    with pytest.raises(RequestError) as caught:
        catalogue.find("bad")
    assert (caught.value.code, caught.value.detail) == ("model_file_invalid", problem.reason)


def test_a_bad_card_is_listed_and_the_others_work(place: Place) -> None:
    (place.cards / "a.toml").write_text("model_id = [")
    place.card("b", b"{}")
    put(place.models / "own/b/f.json", b"{}")
    catalogue = place.catalogue()
    assert held(catalogue) == {"own/b"}
    [problem] = catalogue.problems()
    assert problem.path == place.cards / "a.toml" and "not valid" in problem.reason


def test_two_cards_of_one_id(place: Place) -> None:
    place.card("b", b"{}")
    (place.cards / "c.toml").write_bytes((place.cards / "b.toml").read_bytes())
    [problem] = place.catalogue().problems()
    assert problem.path == place.cards / "c.toml"


def test_the_same_id_in_two_folders_takes_the_first(place: Place) -> None:
    first = write_model(place.models / "o/r/m.gguf")
    write_model(place.more / "o/r/m.gguf")
    catalogue = place.catalogue()
    assert catalogue.path_of("o/r") == first
    [problem] = catalogue.problems()
    assert str(place.more) in problem.reason


def test_a_card_without_files_is_known_but_not_held(place: Place) -> None:
    place.card("b", b"{}")
    catalogue = place.catalogue()
    assert held(catalogue) == set()
    assert catalogue.find("own/b").path is None
    with pytest.raises(RequestError, match="don't lie on this node") as caught:
        catalogue.path_of("own/b")
    assert str(place.models / "own/b") in caught.value.detail


def test_a_cards_file_of_another_size_is_not_used(place: Place) -> None:
    place.card("b", b"{}")
    put(place.models / "own/b/f.json", b"{ }")
    catalogue = place.catalogue()
    assert held(catalogue) == set()
    with pytest.raises(RequestError, match="3 bytes, its card says 2"):
        catalogue.path_of("own/b")
    assert len(catalogue.problems()) == 1
    put(place.more / "own/b/f.json", b"{}")
    catalogue.rescan()
    assert catalogue.path_of("own/b") == place.more / "own/b/f.json"


def test_an_unknown_model_names_the_search_and_near_names(place: Place) -> None:
    write_model(place.models / "Qwen/Qwen3-8B-GGUF/m-Q4_0.gguf")
    catalogue = place.catalogue()
    for asked in ("qwen/qwen3-8b", "Qwen3-8B-GUFF", "Qwen/Qwen3-8B-GGUF:Q8_0"):
        with pytest.raises(RequestError) as caught:
            catalogue.find(asked)
        assert caught.value.code == "model_not_found" and caught.value.http_status == 404
        assert "Qwen/Qwen3-8B-GGUF" in caught.value.detail
    with pytest.raises(RequestError, match=r"GET /models/search\?query=no%20such%26model ") as caught:
        catalogue.find("x/no such&model")
    assert "Near" not in caught.value.detail
    with pytest.raises(RequestError) as caught:
        catalogue.find("x" * 100_000)
    assert len(caught.value.detail) < 1000


def test_rescan_sees_what_came_and_went(place: Place) -> None:
    catalogue = place.catalogue()
    path = write_model(place.models / "m.gguf")
    catalogue.rescan()
    assert held(catalogue) == {"m"}
    path.unlink()
    catalogue.rescan()
    assert held(catalogue) == set()


def test_headers_of_unchanged_files_are_not_read_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(place.models / "m.gguf")
    put(place.models / "bad.gguf", b"GGUF")
    catalogue = place.catalogue()

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr("skulk.models.catalogue.read_header", refuse)
    catalogue.rescan()
    catalogue.rescan()
    assert held(catalogue) == {"m"} and len(catalogue.problems()) == 1


def test_verify_compares_with_the_card_and_remembers(place: Place) -> None:
    body = b'{"answer_tokens": 3}'
    digest = hashlib.sha256(body).hexdigest()
    place.card("b", body, sha256=digest.upper())
    path = put(place.models / "own/b/f.json", body)
    catalogue = place.catalogue()
    entry = catalogue.find("own/b")
    assert not catalogue.is_verified(entry)
    assert catalogue.verify(entry) == (digest,)
    assert catalogue.is_verified(entry)
    assert place.catalogue().is_verified(entry), "it is remembered over a restart"
    os.utime(path, ns=(1, 1))
    assert not catalogue.is_verified(entry), "a touched file is another one until it is hashed again"


def test_a_wrong_hash_has_a_sentence_and_stays_known(place: Place) -> None:
    place.card("b", b"{}", sha256="0" * 64)
    path = put(place.models / "own/b/f.json", b"{}")
    catalogue = place.catalogue()
    with pytest.raises(RequestError) as caught:
        catalogue.verify(catalogue.find("own/b"))
    assert caught.value.code == "model_file_invalid"
    assert str(path) in caught.value.detail and "0" * 64 in caught.value.detail
    assert not catalogue.is_verified(catalogue.find("own/b"))


def test_the_card_of_a_folders_own_model_keeps_its_id(place: Place) -> None:
    """An own quantization of a carded model stands beside it, under its quantization."""
    write_model(place.models / EMBEDDED_MODEL / "other-Q8_0.gguf")
    catalogue = place.catalogue()
    assert catalogue.find(f"{EMBEDDED_MODEL}:Q8_0").path == place.models / EMBEDDED_MODEL / "other-Q8_0.gguf"
    assert catalogue.find(EMBEDDED_MODEL).card.quantization == "Q4_1"


class TestVerificationCache:
    def test_hashes_once_per_content(self, tmp_path: Path) -> None:
        path = put(tmp_path / "f", b"abc")
        cache = VerificationCache(tmp_path / "v.json")
        blocks: list[int] = []
        assert cache.sha256(path, blocks.append) == hashlib.sha256(b"abc").hexdigest()
        assert cache.sha256(path, blocks.append) == hashlib.sha256(b"abc").hexdigest()
        assert blocks == [3]
        put(path, b"abcd")
        assert cache.known(path) is None
        assert cache.sha256(path) == hashlib.sha256(b"abcd").hexdigest()

    def test_a_replaced_file_of_the_same_size_and_time_is_another(self, tmp_path: Path) -> None:
        path = put(tmp_path / "f", b"abc")
        cache = VerificationCache(tmp_path / "v.json")
        cache.sha256(path)
        stat = path.stat()
        other = put(tmp_path / "g", b"xyz")
        os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        os.replace(other, path)
        assert cache.known(path) is None

    @pytest.mark.parametrize("body", [b"not json", b"[]", b'{"a": 1}'])
    def test_a_broken_list_only_costs_time(self, tmp_path: Path, body: bytes) -> None:
        put(tmp_path / "v.json", body)
        path = put(tmp_path / "f", b"abc")
        assert VerificationCache(tmp_path / "v.json").sha256(path) == hashlib.sha256(b"abc").hexdigest()
        assert str(path) in msgspec.json.decode((tmp_path / "v.json").read_bytes())

    def test_a_list_that_cannot_be_written_is_no_failure(self, tmp_path: Path) -> None:
        put(tmp_path / "file", b"")
        path = put(tmp_path / "f", b"abc")
        cache = VerificationCache(tmp_path / "file" / "v.json")
        assert cache.sha256(path) == hashlib.sha256(b"abc").hexdigest()
        assert cache.known(path) is not None

    def test_a_file_that_changes_meanwhile_is_refused(self, tmp_path: Path) -> None:
        path = put(tmp_path / "f", b"abc")
        cache = VerificationCache(tmp_path / "v.json")

        def change(_: int) -> None:
            path.write_bytes(b"longer than before")

        with pytest.raises(RequestError, match="changed while"):
            cache.sha256(path, change)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="can't be read"):
            VerificationCache(tmp_path / "v.json").sha256(tmp_path / "none")

    def test_a_hash_can_be_stopped(self, tmp_path: Path) -> None:
        path = put(tmp_path / "f", b"abc")
        cache = VerificationCache(tmp_path / "v.json")

        def stop(_: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cache.sha256(path, stop)
        assert cache.known(path) is None


def test_what_is_no_file_is_not_opened(place: Place) -> None:
    """Opening a pipe without a writer waits for ever."""
    place.models.mkdir()
    os.mkfifo(place.models / "pipe.gguf")
    (place.models / "endless.gguf").symlink_to("/dev/zero")
    write_model(place.models / "good.gguf")
    catalogue = place.catalogue()
    assert held(catalogue) == {"good"}
    assert {problem.path.name for problem in catalogue.problems()} == {"pipe.gguf", "endless.gguf"}
    assert all("no regular file" in problem.reason for problem in catalogue.problems())
