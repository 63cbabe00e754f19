"""The models that this node knows: built-in and own cards, and what lies in its folders.

    cards (TOML) ──┐                          ┌──> entries()   every model, held or not
                   ├──rescan──> one snapshot ─┼──> find(id)    or a sentence with the nearest names
    folders ───────┘                          ├──> held()      whose weights lie here, whole
                                              └──> problems()  what was found and can't be used, and why

Precedence of one id: own cards, built-in cards, what was fetched (`skulk.models.shelf`), the models folder,
`SKULK_MODELS_PATH` in its order, then Ollama's store.
"""

from __future__ import annotations

import difflib
import logging
import stat
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote

from skulk.errors import RequestError
from skulk.models.foreign import ollama_models
from skulk.models.gguf import GgufHeader, read_header
from skulk.models.hints import CardHint
from skulk.models.quantization import normal
from skulk.models.scanning import CatalogueEntry, CatalogueProblem, Scan, Snapshot, hash_problem
from skulk.models.shelf import Shelf
from skulk.models.verification import VerificationCache
from skulk.wire.model import HeldModel, ModelFile

log = logging.getLogger(__name__)

BUILT_IN_CARDS: Final = Path(__file__).with_name("cards")
EMBEDDED_MODEL: Final = "HuggingFaceTB/SmolLM2-135M-Instruct-GGUF"
MAX_CLOSE_NAMES: Final = 3


class Catalogue:
    """See the module. Every method may be called from any thread; `rescan` and `verify` read files and block.

    Args:
        models_dir: the node's own models folder; it need not exist.
        models_path: more folders, read only.
        card_dirs: folders of own cards, ``*.toml``.
        verified_file: where taken hashes are kept.
        ollama_dir: Ollama's store, read only; None: it isn't looked at.
    """

    def __init__(
        self,
        models_dir: Path,
        models_path: Sequence[Path] = (),
        *,
        verified_file: Path,
        card_dirs: Sequence[Path] = (),
        ollama_dir: Path | None = None,
    ) -> None:
        self._folders = (models_dir, *models_path)
        self._shelf = Shelf(models_dir)
        self._ollama_dir = ollama_dir
        self._card_dirs = tuple(card_dirs)
        self._verified = VerificationCache(verified_file)
        self._headers: dict[tuple[str, int, int], GgufHeader | str] = {}
        self._old_headers: dict[tuple[str, int, int], GgufHeader | str] = {}
        self._scan_lock = threading.Lock()
        self._snapshot = Snapshot()

    def rescan(self) -> None:
        """Looks at cards and folders again; headers of unchanged files aren't read again."""
        with self._scan_lock:
            # Files that are gone leave with the scan after.
            self._headers, self._old_headers = {}, self._headers
            scan = Scan(self._header_of, self._verified, self._folders)
            for card_dir in self._card_dirs:
                scan.add_cards(card_dir)
            scan.add_cards(BUILT_IN_CARDS, are_built_in=True)
            for shelved in self._shelf.all():
                scan.add_shelved(shelved.card, self._shelf)
            for folder in self._folders:
                scan.add_folder(folder)
            for model in () if self._ollama_dir is None else ollama_models(self._ollama_dir):
                scan.add_ollama(model)
            fresh = scan.snapshot()
            for problem in set(fresh.problems) - set(self._snapshot.problems):
                log.warning("%s", problem.reason)
            self._snapshot = fresh

    def entries(self) -> tuple[CatalogueEntry, ...]:
        """All models, by id."""
        return tuple(entry for _, entry in sorted(self._snapshot.entries.items()))

    def problems(self) -> tuple[CatalogueProblem, ...]:
        """What was found and can't be used, with the reason; never skipped in silence."""
        return self._snapshot.problems

    def find(self, model_id: str) -> CatalogueEntry:
        """The model of an id, ``org/repo``, ``org/repo:QUANT`` or a bare name.

        Raises:
            RequestError: ``model_not_found``: with the search call to make and near names; ``model_file_invalid``: it
                lies here but can't be used.
        """
        snapshot = self._snapshot
        entry = snapshot.entries.get(model_id) or _with_quantization(snapshot.entries, model_id)
        if entry is not None:
            return entry
        broken = next((problem for problem in snapshot.problems if problem.model_id == model_id), None)
        if broken is not None:
            raise RequestError("model_file_invalid", broken.reason, param="model")
        raise RequestError("model_not_found", _not_found(model_id, snapshot.entries), param="model")

    def hint_of(self, repo: str) -> CardHint | None:
        """What a card without files says of a repository of the hub."""
        return self._snapshot.hints.get(repo)

    def hints(self) -> tuple[CardHint, ...]:
        """All of them, by repository."""
        return tuple(hint for _, hint in sorted(self._snapshot.hints.items()))

    def path_of(self, model_id: str) -> Path:
        """The file to load for a model.

        Raises:
            RequestError: as `find`; ``model_file_invalid``: its file can't be used; ``model_not_found``: it isn't here.
        """
        entry = self.find(model_id)
        if entry.problem is not None:
            raise RequestError("model_file_invalid", entry.problem, param="model")
        if entry.path is None:
            raise RequestError(
                "model_not_found",
                f"the weights of {model_id} don't lie on this node; put {entry.card.files[0].name} into "
                f"{self._folders[0] / entry.card.model_id}, or download the model.",
                param="model",
            )
        return entry.path

    def held(self) -> tuple[HeldModel, ...]:
        """The models whose weights lie here, whole; the digest of the first file where it is known or pinned."""
        return tuple(
            HeldModel(
                model_id=entry.card.model_id,
                size_bytes=entry.card.size_bytes,
                sha256=self._verified.known(entry.paths[0]) or entry.card.files[0].sha256,
                added_at=_modified_at(entry.paths[0]),
            )
            for entry in self.entries()
            if entry.is_held
        )

    def is_verified(self, entry: CatalogueEntry) -> bool:
        """Whether all pinned files were hashed as they are now, and have their hashes. Looks at dates and sizes."""
        return bool(entry.paths) and all(
            file.sha256 is None or self._verified.known(path) == file.sha256.lower() for file, path in _files_of(entry)
        )

    def note_verified(self, path: Path, sha256: str) -> None:
        """Takes down a hash that was taken elsewhere, of a file as it is now."""
        self._verified.note(path, sha256)

    def forget_digests(self, entry: CatalogueEntry) -> None:
        """Has the files of a model hashed anew by the next `verify`."""
        for path in entry.all_paths:
            self._verified.forget(path)

    def known_digest(self, path: Path) -> str | None:
        """The sha256 of a file, where it was taken before and the file is unchanged."""
        return self._verified.known(path)

    def verify(self, entry: CatalogueEntry, on_block: Callable[[int], None] | None = None) -> tuple[str, ...]:
        """The digests of a model's files, taken now where they aren't known, and compared with the card's.

        Raises:
            RequestError: ``model_file_invalid``: a file has another hash than its card pins, or can't be read;
                ``model_not_found``: it has no files here.
        """
        self.path_of(entry.card.model_id)
        digests: list[str] = []
        for file, path in _files_of(entry):
            digest = self._verified.sha256(path, on_block)
            if (problem := hash_problem(path, file, digest)) is not None:
                raise RequestError("model_file_invalid", problem)
            digests.append(digest)
        return tuple(digests)

    def _header_of(self, path: Path) -> GgufHeader | str:
        """A file's header, or what is wrong with it."""
        try:
            facts = path.stat()
            if not stat.S_ISREG(facts.st_mode):
                # opening a pipe would wait for ever
                return f"{path} is no regular file; remove it."
            key = (str(path), facts.st_size, facts.st_mtime_ns)
            header = self._headers.get(key) or self._old_headers.get(key) or _read(path, facts.st_size)
            self._headers[key] = header
            return header
        except OSError as error:
            return f"{path} can't be read: {error.strerror}; check its permissions."


def _read(path: Path, size_bytes: int) -> GgufHeader | str:
    with path.open("rb") as file:

        def read_at(offset: int, length: int) -> bytes:
            file.seek(offset)
            return file.read(length)

        try:
            return read_header(read_at, size_bytes, str(path))
        except RequestError as error:
            return error.detail


def _files_of(entry: CatalogueEntry) -> Iterable[tuple[ModelFile, Path]]:
    return zip(entry.card.all_files, entry.all_paths, strict=True)


def _modified_at(path: Path) -> float:
    try:
        return round(path.stat().st_mtime, 3)
    except OSError:
        return 0.0


def _with_quantization(entries: Mapping[str, CatalogueEntry], model_id: str) -> CatalogueEntry | None:
    """``org/repo:Q4_1`` also names the plain entry, where that is its quantization."""
    plain, _, quantization = model_id.rpartition(":")
    entry = entries.get(plain)
    if entry is None or not quantization or normal(quantization) != normal(entry.card.quantization):
        return None
    return entry


def _near_names(lowered_id: str, known_ids: Iterable[str]) -> list[str]:
    """Ids that hold the text, else ids whose whole or last part looks like it."""
    ids = sorted(known_ids)
    holding = [known for known in ids if lowered_id and lowered_id in known.lower()]
    if holding:
        return holding[:MAX_CLOSE_NAMES]
    by_name = {known.lower(): known for known in ids} | {known.rsplit("/", 1)[-1].lower(): known for known in ids}
    names = (lowered_id, lowered_id.rsplit("/", 1)[-1])
    near = (match for name in names for match in difflib.get_close_matches(name, by_name, n=MAX_CLOSE_NAMES))
    return list(dict.fromkeys(by_name[match] for match in near))[:MAX_CLOSE_NAMES]


def _not_found(model_id: str, entries: Mapping[str, CatalogueEntry]) -> str:
    near = _near_names(model_id[:200].lower(), entries)
    hint = f" Near names: {', '.join(near)}." if near else ""
    query = quote(model_id.rsplit("/", 1)[-1][:100], safe="")
    return (
        f"no model {model_id[:200]!r} is known here.{hint} GET /models lists what is known, "
        f"GET /models/search?query={query} finds others."
    )
