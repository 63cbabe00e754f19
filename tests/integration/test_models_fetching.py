"""Fetching through the real huggingface_hub client from a hub that fails: nothing corrupt, nothing whole twice."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from skulk.errors import ServiceError, SkulkError, UnavailableError
from skulk.models import fetching
from skulk.models import hub as hub_module
from skulk.models.fetching import Fetch, Limits
from skulk.models.hub import Hub
from skulk.models.parts import PartFile, part_key
from skulk.models.sources import HubSource
from skulk.wire.model import ModelCard, ModelFile
from tests.support.hub import COMMIT, SmallHub

REPO = "org/m"
KIB = 1024
CHUNK = 64 * KIB
LARGE = random.Random(7).randbytes(1_000_000)
SMALL = b'{"a": 1}'
LIMITS = Limits(chunk_bytes=CHUNK, attempts=3, wait_s=0.01, disk_margin_bytes=0)


@pytest.fixture
def small_hub() -> Iterator[SmallHub]:
    with SmallHub() as hub:
        hub.block_bytes = 16 * KIB
        hub.add(REPO, {"m.gguf": LARGE, "config.json": SMALL})
        yield hub


def card_of(body: bytes = LARGE, **changes: Any) -> ModelCard:
    fields: dict[str, Any] = {
        "model_id": REPO, "name": "m", "family": "llama", "backends": ("fake-cpu",), "context_length": 10,
        "files": (ModelFile(name="m.gguf", size_bytes=len(body), sha256=hashlib.sha256(body).hexdigest()),),
        "weights_bytes": 1, "kv_bytes_per_token": 1, "repo": REPO, "revision": COMMIT,
    }  # fmt: skip
    return ModelCard(**{**fields, **changes})


def companion() -> ModelFile:
    oid = hashlib.sha1(b"blob %d\0" % len(SMALL) + SMALL).hexdigest()
    return ModelFile(name="config.json", size_bytes=len(SMALL), git_oid=oid)


def fetch_of(small_hub: SmallHub, folder: Path, card: ModelCard | None = None, limits: Limits = LIMITS) -> Fetch:
    hub = HubSource(Hub(endpoint=small_hub.url), REPO, COMMIT)
    return Fetch(card or card_of(), folder / "org" / "m", folder / ".parts", hub=hub, limits=limits)


def content_of(folder: Path) -> bytes:
    return (folder / "org" / "m" / "m.gguf").read_bytes()


def test_all_files_come_whole_with_the_hash_of_each(small_hub: SmallHub, tmp_path: Path) -> None:
    fetch = fetch_of(small_hub, tmp_path, card_of(companions=(companion(),)))
    files = fetch.run()
    assert content_of(tmp_path) == LARGE
    assert files[1].sha256 == hashlib.sha256(SMALL).hexdigest()
    assert fetch.progress().done_bytes == fetch.progress().total_bytes == len(LARGE) + len(SMALL)
    assert fetch.progress().sources == ("hub",)
    assert list((tmp_path / ".parts").iterdir()) == []


def test_what_is_here_already_is_not_fetched_again(small_hub: SmallHub, tmp_path: Path) -> None:
    fetch_of(small_hub, tmp_path).run()
    sent = small_hub.sent_bytes
    fetch_of(small_hub, tmp_path).run()
    assert small_hub.sent_bytes == sent


def test_what_lies_there_and_is_something_else_is_replaced(small_hub: SmallHub, tmp_path: Path) -> None:
    target = tmp_path / "org" / "m" / "m.gguf"
    target.parent.mkdir(parents=True)
    target.write_bytes(bytes(len(LARGE)))
    fetch_of(small_hub, tmp_path).run()
    assert content_of(tmp_path) == LARGE


def test_a_connection_that_is_cut_is_taken_up_where_it_ended(small_hub: SmallHub, tmp_path: Path) -> None:
    small_hub.cuts_after, small_hub.cuts = 100 * KIB, 6
    fetch_of(small_hub, tmp_path, limits=Limits(chunk_bytes=CHUNK, attempts=8, wait_s=0.0, disk_margin_bytes=0)).run()
    assert content_of(tmp_path) == LARGE
    # the rest of the chunk in which a connection was cut is the most that comes twice
    assert small_hub.sent_bytes <= len(LARGE) + 6 * CHUNK
    assert small_hub.cuts == 0


def test_a_fetch_that_failed_goes_on_where_it_ended(small_hub: SmallHub, tmp_path: Path) -> None:
    small_hub.cuts_after, small_hub.cuts = 100 * KIB, 10**6
    with pytest.raises(UnavailableError) as caught:
        fetch_of(
            small_hub, tmp_path, limits=Limits(chunk_bytes=CHUNK, attempts=1, wait_s=0.0, disk_margin_bytes=0)
        ).run()
    assert caught.value.code == "hub_unreachable"
    assert not (tmp_path / "org" / "m" / "m.gguf").exists()
    whole = part_of(tmp_path).done_bytes
    assert whole > 0
    small_hub.cuts, small_hub.sent = 0, {}
    before = small_hub.sent_bytes
    fetch_of(small_hub, tmp_path).run()
    assert content_of(tmp_path) == LARGE
    assert small_hub.sent_bytes - before == len(LARGE) - whole


def part_of(tmp_path: Path) -> PartFile:
    with PartFile(tmp_path / ".parts", part_key(REPO, card_of().files[0]), len(LARGE), chunk_bytes=CHUNK) as part:
        return part


def test_a_server_that_ignores_ranges_never_has_its_bytes_put_in_the_wrong_place(
    small_hub: SmallHub, tmp_path: Path
) -> None:
    small_hub.ignores_ranges = True
    fetch_of(small_hub, tmp_path, limits=Limits(chunk_bytes=CHUNK, attempts=20, wait_s=0.05, disk_margin_bytes=0)).run()
    assert content_of(tmp_path) == LARGE


def test_a_200_in_the_middle_of_a_resumed_file(small_hub: SmallHub, tmp_path: Path) -> None:
    small_hub.cuts_after, small_hub.cuts = 100 * KIB, 10**6
    with pytest.raises(SkulkError):
        fetch_of(
            small_hub, tmp_path, limits=Limits(chunk_bytes=CHUNK, attempts=1, wait_s=0.0, disk_margin_bytes=0)
        ).run()
    small_hub.cuts, small_hub.ignores_ranges = 0, True
    fetch_of(small_hub, tmp_path, limits=Limits(chunk_bytes=CHUNK, attempts=20, wait_s=0.05, disk_margin_bytes=0)).run()
    assert content_of(tmp_path) == LARGE


def lies(small_hub: SmallHub) -> None:
    small_hub.lies_about_ranges = True


def spoils(small_hub: SmallHub) -> None:
    small_hub.spoiled = {"m.gguf"}


@pytest.mark.parametrize(
    ("failure", "says"), [(lies, "answered with the range"), (spoils, "came with the sha256")], ids=["range", "hash"]
)
def test_wrong_bytes_never_get_the_file_s_name(
    small_hub: SmallHub, tmp_path: Path, failure: Callable[[SmallHub], None], says: str
) -> None:
    failure(small_hub)
    with pytest.raises(ServiceError, match=says) as caught:
        fetch_of(small_hub, tmp_path).run()
    assert caught.value.code == "download_failed"
    assert not (tmp_path / "org" / "m" / "m.gguf").exists()
    small_hub.lies_about_ranges, small_hub.spoiled = False, set()
    fetch_of(small_hub, tmp_path).run()
    assert content_of(tmp_path) == LARGE


def test_a_wrong_hash_is_given_one_more_try(small_hub: SmallHub, tmp_path: Path) -> None:
    small_hub.spoiled = {"m.gguf"}
    # the first pass over the whole file is spoiled, the second isn't
    small_hub.on_block = lambda sent: small_hub.spoiled.clear() if sent >= len(LARGE) else None
    fetch_of(small_hub, tmp_path).run()
    assert content_of(tmp_path) == LARGE


def test_a_wrong_small_file_is_noticed_by_git_s_name_for_it(small_hub: SmallHub, tmp_path: Path) -> None:
    small_hub.repositories[REPO].files["config.json"] = b'{"a": 2}'
    with pytest.raises(ServiceError, match="came with the git id"):
        fetch_of(small_hub, tmp_path, card_of(companions=(companion(),))).run()
    assert not (tmp_path / "org" / "m" / "config.json").exists()


def test_busy_and_broken_answers_are_waited_out(small_hub: SmallHub, tmp_path: Path) -> None:
    small_hub.retry_after = "0"
    small_hub.busy, small_hub.broken = 2, 3
    fetch_of(small_hub, tmp_path, limits=Limits(chunk_bytes=CHUNK, attempts=8, wait_s=0.01, disk_margin_bytes=0)).run()
    assert content_of(tmp_path) == LARGE


def test_a_silent_connection_is_given_up_and_the_file_gone_on_with(
    small_hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "ANSWER_S", 0.3)
    small_hub.stalls = True

    def go_on(sent: int) -> None:
        small_hub.stalls = sent < 200 * KIB

    small_hub.on_block = go_on
    fetch_of(
        small_hub, tmp_path, limits=Limits(chunk_bytes=16 * KIB, attempts=30, wait_s=0.01, disk_margin_bytes=0)
    ).run()
    assert content_of(tmp_path) == LARGE


def test_a_gated_repository_fails_at_once(small_hub: SmallHub, tmp_path: Path) -> None:
    small_hub.repositories[REPO].gated = True
    with pytest.raises(SkulkError) as caught:
        fetch_of(small_hub, tmp_path).run()
    assert caught.value.code == "model_gated"
    assert small_hub.sent_bytes == 0


def test_too_little_room_is_said_with_both_numbers_before_anything_is_fetched(
    small_hub: SmallHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 400 * KIB})
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ServiceError, match=r"needs 976\.6 KiB more .* 400\.0 KiB are free") as caught:
        fetch_of(small_hub, tmp_path).run()
    assert caught.value.code == "disk_full"
    assert small_hub.sent_bytes == 0


def test_without_hub_and_neighbours_the_reason_is_said(tmp_path: Path) -> None:
    fetch = Fetch(card_of(), tmp_path, tmp_path / ".parts", no_hub="this node is offline", limits=LIMITS)
    with pytest.raises(UnavailableError, match="no node of the cluster gives org/m, and this node is offline"):
        fetch.run()


def test_several_files_come_at_once(small_hub: SmallHub, tmp_path: Path) -> None:
    names = [f"m-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    bodies = {name: random.Random(name).randbytes(200_000) for name in names}
    small_hub.repositories[REPO].files = bodies
    files = tuple(
        ModelFile(name=name, size_bytes=200_000, sha256=hashlib.sha256(body).hexdigest())
        for name, body in bodies.items()
    )
    fetch_of(small_hub, tmp_path, card_of(files=files)).run()
    assert {name: (tmp_path / "org" / "m" / name).read_bytes() for name in names} == bodies


def test_a_finished_file_is_never_written_into_by_another_fetch_of_the_same_content(tmp_path: Path) -> None:
    first = PartFile(tmp_path, "k", 4)
    first.write(0, b"abcd")
    first.mark(0)
    first.finish(tmp_path / "final")
    with PartFile(tmp_path, "k", 4) as second:
        assert not second.is_whole
        second.write(0, b"xxxx")
    first.close()
    assert (tmp_path / "final").read_bytes() == b"abcd"
