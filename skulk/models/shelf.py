"""What was fetched into the models folder: its cards with their pins, who is pinned, what was used last, what may go.

    <models>/.cards/<hash of the id>.json    one `Shelved`: the card as it was resolved, and its use
    <models>/.parts/                         unfinished files
    <models>/<org>/<repo>/…                  the files, under the names that the repository gives them

Cards are kept before a download begins, so a restart still knows what was pinned. A copied models folder is complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Final

import msgspec

from skulk.errors import RequestError, ServiceError
from skulk.files import write_atomic
from skulk.models.reference import is_reference, parse_reference
from skulk.models.selection import is_wanted_kind
from skulk.units import format_bytes
from skulk.wire.model import ModelCard

log = logging.getLogger("skulk.models")

CARDS: Final = ".cards"
PARTS: Final = ".parts"
MAX_CARDS: Final = 10_000
MAX_CARD_BYTES: Final = 8 * 1024 * 1024


class Shelved(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the shelf.

    Attributes:
        pinned: a person wants it kept: it is never evicted.
        asked: a person asked for its files, and they haven't all come yet; a node that starts again goes on with it.
        added_at, used_at: seconds since the epoch.
    """

    card: ModelCard
    pinned: bool = False
    asked: bool = False
    added_at: float = 0.0
    used_at: float = 0.0


class Shelf:
    """The models folder as what was fetched into it. Any thread; every call reads or writes files.

    Args:
        folder: the node's own models folder; it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder: Final = folder
        self.parts: Final = folder / PARTS

    def place_of(self, card: ModelCard) -> Path:
        """Where a model's files belong.

        Raises:
            RequestError: ``invalid_request``: its id or its files name no place under the folder.
        """
        if wrong := next((file.name for file in card.all_files if not is_wanted_kind(file.name)), None):
            raise RequestError(
                "invalid_request", f"{card.model_id} names the file {wrong[:200]!r}, which is not fetched."
            )
        if is_reference(card.model_id):
            return self.folder / parse_reference(card.model_id).folder
        if "/" in card.model_id or "\\" in card.model_id or card.model_id.startswith(".") or not card.model_id:
            raise RequestError("invalid_request", f"{card.model_id[:200]!r} is no model's id.", param="model_id")
        return self.folder / card.model_id

    def all(self) -> tuple[Shelved, ...]:
        """Everything on the shelf, by id; what can't be read is logged and left out."""
        found: list[Shelved] = []
        for count, path in enumerate(sorted((self.folder / CARDS).glob("*.json"))):
            if count >= MAX_CARDS:
                log.warning("%s holds more than %d cards; the rest is left out", path.parent, MAX_CARDS)
                break
            try:
                # a longer one is cut, and so is no JSON any more
                with path.open("rb") as file:
                    shelved = msgspec.json.decode(file.read(MAX_CARD_BYTES), type=Shelved)
                self.place_of(shelved.card)
                found.append(shelved)
            except (OSError, ValueError, msgspec.DecodeError, RequestError) as error:
                log.warning("the card %s is not used: %s", path, error)
        return tuple(sorted(found, key=lambda one: one.card.model_id))

    def find(self, model_id: str) -> Shelved | None:
        """One model of the shelf."""
        try:
            return msgspec.json.decode(self._path(model_id).read_bytes(), type=Shelved)
        except (OSError, msgspec.DecodeError):
            return None

    def keep(self, card: ModelCard, now: float, *, pinned: bool | None = None, asked: bool | None = None) -> None:
        """Writes a card; ``pinned`` and ``asked`` None: as they were.

        Raises:
            ServiceError: ``disk_full``.
            OSError: the folder can't be written.
        """
        self.place_of(card)
        known = self.find(card.model_id)
        was = Shelved(card=card, added_at=now, used_at=now) if known is None else known
        pinned = was.pinned if pinned is None else pinned
        asked = was.asked if asked is None else asked
        self._write(msgspec.structs.replace(was, card=card, pinned=pinned, asked=asked))

    def touch(self, model_id: str, now: float) -> None:
        """Notes that a model is used now; nothing happens where it isn't on the shelf, or the disk takes no more."""
        if (known := self.find(model_id)) is not None:
            with contextlib.suppress(OSError, ServiceError):
                self._write(msgspec.structs.replace(known, used_at=now))

    def remove(self, model_id: str) -> int:
        """Removes a model's card and the files that no other model of the shelf shares; returns the bytes freed."""
        known = self.find(model_id)
        if known is None:
            return 0
        shared = {path for other in self.all() if other.card.model_id != model_id for path in self.files_of(other.card)}
        freed = 0
        for path in self.files_of(known.card):
            if path not in shared:
                freed += remove_file(path)
        self._path(model_id).unlink(missing_ok=True)
        remove_empty(self.place_of(known.card), self.folder)
        return freed

    def files_of(self, card: ModelCard) -> tuple[Path, ...]:
        """Where each of a model's files belongs."""
        place = self.place_of(card)
        return tuple(place / file.name for file in card.all_files)

    def held_bytes(self, card: ModelCard) -> int:
        """Bytes of a model's files that lie here."""
        return sum(path.stat().st_size for path in self.files_of(card) if path.is_file())

    def drop_parts(self, keys: Iterable[str]) -> int:
        """Removes unfinished files by their keys (`skulk.models.parts.part_key`); returns the bytes freed."""
        return sum(remove_file(self.parts / f"{key}{ending}") for key in keys for ending in (".part", ".done"))

    def _path(self, model_id: str) -> Path:
        return self.folder / CARDS / f"{hashlib.sha256(model_id.encode()).hexdigest()[:32]}.json"

    def _write(self, shelved: Shelved) -> None:
        path = self._path(shelved.card.model_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, msgspec.json.format(msgspec.json.encode(shelved)), mode=0o644)


def remove_file(path: Path) -> int:
    """Removes a file; returns the bytes it had on the disk, 0 where there is none."""
    try:
        size = path.stat().st_blocks * 512
        path.unlink()
    except FileNotFoundError:
        return 0
    return size


def remove_empty(place: Path, root: Path) -> None:
    """Removes folders that are empty now, from ``place`` up to below ``root``."""
    for folder in sorted((path for path in place.rglob("*") if path.is_dir()), reverse=True) if place.is_dir() else ():
        with contextlib.suppress(OSError):
            folder.rmdir()
    while place != root and root in place.parents:
        with contextlib.suppress(OSError):
            place.rmdir()
        place = place.parent


class OnDisk(msgspec.Struct, frozen=True, kw_only=True):
    """What the choice of evictions looks at."""

    model_id: str
    held_bytes: int
    used_at: float
    is_kept: bool = False


def evictions(models: Sequence[OnDisk], *, needed_bytes: int, budget_bytes: int, in_use: Set[str]) -> tuple[str, ...]:
    """Which models go so that ``needed_bytes`` more stay within the budget: the least recently used first. Pure.

    Pinned models and those in use never go; nothing goes that isn't needed.

    Raises:
        ServiceError: ``disk_full``: even without all that may go it is too much; with the numbers.
    """
    held = sum(model.held_bytes for model in models)
    if budget_bytes <= 0 or held + needed_bytes <= budget_bytes:
        return ()
    free = [model for model in models if not model.is_kept and model.model_id not in in_use and model.held_bytes]
    going: list[str] = []
    for model in sorted(free, key=lambda one: (one.used_at, one.model_id)):
        going.append(model.model_id)
        held -= model.held_bytes
        if held + needed_bytes <= budget_bytes:
            return tuple(going)
    raise ServiceError(
        "disk_full",
        f"{format_bytes(needed_bytes)} more don't fit into the {format_bytes(budget_bytes)} that models may take here: "
        f"{format_bytes(held)} are pinned or in use; remove a model, or raise SKULK_MODELS_BUDGET.",
    )
