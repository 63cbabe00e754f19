"""The models that this node knows: built-in and own cards, and what lies in its folders.

    cards (TOML) ──┐                          ┌──> entries()   every model, held or not
                   ├──rescan──> one snapshot ─┼──> find(id)    or a sentence with the nearest names
    folders ───────┘                          ├──> held()      whose weights lie here, whole
                                              └──> problems()  what was found and can't be used, and why

Precedence of one id: built-in cards, own cards, the models folder, then `SKULK_MODELS_PATH` in its order.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import stat
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec

from skulk.errors import RequestError
from skulk.models.card import CardFile, card_from_gguf, read_card
from skulk.models.folders import FoundModel, scan_folder
from skulk.models.gguf import GgufHeader, read_header
from skulk.models.quantization import normal
from skulk.models.verification import VerificationCache
from skulk.wire.model import HeldModel, ModelCard, ModelFile

log = logging.getLogger(__name__)

BUILT_IN_CARDS: Final = Path(__file__).with_name("cards")
EMBEDDED_MODEL: Final = "HuggingFaceTB/SmolLM2-135M-Instruct-GGUF"
MAX_CLOSE_NAMES: Final = 3


class CatalogueEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One model.

    Attributes:
        paths: its files here, in the card's order; empty where they aren't.
        problem: why the files can't be used, in a sentence; None: they can, or there are none.
    """

    card: ModelCard
    paths: tuple[Path, ...] = ()
    problem: str | None = None

    @property
    def path(self) -> Path | None:
        """The file to load: the first part."""
        return self.paths[0] if self.paths else None

    @property
    def is_held(self) -> bool:
        """Whether it could be loaded here and now."""
        return bool(self.paths) and self.problem is None


class CatalogueProblem(msgspec.Struct, frozen=True, kw_only=True):
    """A card or file that can't be used. ``model_id``: what it would have been; empty where that isn't known."""

    path: Path
    reason: str
    model_id: str = ""


class _Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    entries: dict[str, CatalogueEntry] = {}
    problems: tuple[CatalogueProblem, ...] = ()


class Catalogue:
    """See the module. Every method may be called from any thread; `rescan` and `verify` read files and block.

    Args:
        models_dir: the node's own models folder; it need not exist.
        models_path: more folders, read only.
        card_dirs: folders of own cards, ``*.toml``.
        verified_file: where taken hashes are kept.
    """

    def __init__(
        self,
        models_dir: Path,
        models_path: Sequence[Path] = (),
        *,
        verified_file: Path,
        card_dirs: Sequence[Path] = (),
    ) -> None:
        self._folders = (models_dir, *models_path)
        self._card_dirs = (BUILT_IN_CARDS, *card_dirs)
        self._verified = VerificationCache(verified_file)
        self._headers: dict[tuple[str, int, int], GgufHeader | str] = {}
        self._old_headers: dict[tuple[str, int, int], GgufHeader | str] = {}
        self._scan_lock = threading.Lock()
        self._snapshot = _Snapshot()

    def rescan(self) -> None:
        """Looks at cards and folders again; headers of unchanged files aren't read again."""
        with self._scan_lock:
            # Files that are gone leave with the scan after.
            self._headers, self._old_headers = {}, self._headers
            scan = _Scan(self._header_of, self._verified, self._folders)
            for card_dir in self._card_dirs:
                scan.add_cards(card_dir)
            for folder in self._folders:
                scan.add_folder(folder)
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
            )
            for entry in self.entries()
            if entry.is_held
        )

    def is_verified(self, entry: CatalogueEntry) -> bool:
        """Whether all pinned files were hashed as they are now, and have their hashes. Looks at dates and sizes."""
        return bool(entry.paths) and all(
            file.sha256 is None or self._verified.known(path) == file.sha256.lower()
            for file, path in zip(entry.card.files, entry.paths, strict=True)
        )

    def verify(self, entry: CatalogueEntry, on_block: Callable[[int], None] | None = None) -> tuple[str, ...]:
        """The digests of a model's files, taken now where they aren't known, and compared with the card's.

        Raises:
            RequestError: ``model_file_invalid``: a file has another hash than its card pins, or can't be read;
                ``model_not_found``: it has no files here.
        """
        self.path_of(entry.card.model_id)
        digests: list[str] = []
        for file, path in zip(entry.card.files, entry.paths, strict=True):
            digest = self._verified.sha256(path, on_block)
            if (problem := _hash_problem(path, file, digest)) is not None:
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


class _Scan:
    """One look at everything. First come, first kept."""

    def __init__(
        self,
        header_of: Callable[[Path], GgufHeader | str],
        verified: VerificationCache,
        folders: Sequence[Path],
    ) -> None:
        self._header_of = header_of
        self._verified = verified
        self._folders = folders
        self._entries: dict[str, CatalogueEntry] = {}
        self._problems: list[CatalogueProblem] = []
        self._carded: set[Path] = set()

    def snapshot(self) -> _Snapshot:
        return _Snapshot(entries=dict(self._entries), problems=tuple(self._problems))

    def add_cards(self, card_dir: Path) -> None:
        for path in sorted(card_dir.glob("*.toml")):
            try:
                card = read_card(path)
            except RequestError as error:
                self._problem(path, error.detail)
                continue
            if card.model_id in self._entries:
                self._problem(path, f"the card {path} names {card.model_id}, which another card has.")
                continue
            self._add_card(card)

    def _add_card(self, card: CardFile) -> None:
        paths, problem = self._locate(card)
        if (
            paths
            and problem is None
            and card.format == "gguf"
            and any(b.startswith("llama_cpp") for b in card.backends)
        ):
            broken = next((found for path in paths if isinstance(found := self._header_of(path), str)), None)
            problem = broken or self._known_hash_problem(card.files, paths)
        if problem is not None and paths:
            self._problem(paths[0], problem, card.model_id)
        self._carded.update(paths)
        self._entries[card.model_id] = CatalogueEntry(card=card.to_card(), paths=paths, problem=problem)

    def _locate(self, card: CardFile) -> tuple[tuple[Path, ...], str | None]:
        """The first place that has all of the card's files in their sizes; else the first with one of another size."""
        places = [folder / card.model_id for folder in self._folders]
        if card.package and (place := _package_dir(card.package)) is not None:
            places.append(place)
        wrong: tuple[tuple[Path, ...], str] | None = None
        for place in places:
            paths = tuple(place / file.name for file in card.files)
            if not all(path.is_file() for path in paths):
                continue
            try:
                problem = _size_problem(card.files, paths)
            except OSError as error:
                problem = f"{place} can't be read: {error.strerror}."
            if problem is None:
                return paths, None
            wrong = wrong or (paths, problem)
        return wrong or ((), None)

    def _known_hash_problem(self, files: Sequence[ModelFile], paths: Sequence[Path]) -> str | None:
        for file, path in zip(files, paths, strict=True):
            known = self._verified.known(path)
            if known is not None and (problem := _hash_problem(path, file, known)) is not None:
                return problem
        return None

    def add_folder(self, folder: Path) -> None:
        scan = scan_folder(folder)
        for path, reason in scan.problems:
            self._problem(path, reason)
        for found in scan.models:
            if not self._carded.intersection(found.paths):
                self._add_found(found)

    def _add_found(self, found: FoundModel) -> None:
        if found.problem is not None:
            self._problem(found.paths[0], found.problem, found.model_id)
            return
        model_id = found.model_id
        if model_id in self._entries and ":" not in model_id and found.quantization:
            model_id = f"{model_id}:{found.quantization}"
        if model_id in self._entries:
            known = self._entries[model_id].path
            if known not in found.paths:
                reason = (
                    f"{found.paths[0]} would be {model_id}, but {known or 'a card'} already is; rename or remove one."
                )
                self._problem(found.paths[0], reason)
            return
        try:
            card = self._card_of(found, model_id)
        except RequestError as error:
            self._problem(found.paths[0], error.detail, model_id)
            return
        except OSError as error:
            self._problem(found.paths[0], f"{error.filename} can't be read: {error.strerror}.", model_id)
            return
        self._entries[model_id] = CatalogueEntry(card=card, paths=found.paths)

    def _card_of(self, found: FoundModel, model_id: str) -> ModelCard:
        headers: list[GgufHeader] = []
        files: list[ModelFile] = []
        for path in found.paths:
            header = self._header_of(path)
            if isinstance(header, str):
                raise RequestError("model_file_invalid", header)
            headers.append(header)
            name = path.relative_to(found.folder).as_posix()
            files.append(ModelFile(name=name, size_bytes=path.stat().st_size))
        return card_from_gguf(headers, model_id=model_id, files=files, source=str(found.paths[0]))

    def _problem(self, path: Path, reason: str, model_id: str = "") -> None:
        self._problems.append(CatalogueProblem(path=path, reason=reason, model_id=model_id))


def _package_dir(package: str) -> Path | None:
    """Where a package lies, without importing it; top-level names only, for a dotted one imports its parent."""
    if not package.isidentifier():
        return None
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _size_problem(files: Sequence[ModelFile], paths: Sequence[Path]) -> str | None:
    for file, path in zip(files, paths, strict=True):
        size = path.stat().st_size
        if size != file.size_bytes:
            return f"{path} has {size:,} bytes, its card says {file.size_bytes:,}; copy or download it again."
    return None


def _hash_problem(path: Path, file: ModelFile, digest: str) -> str | None:
    if file.sha256 is None or digest == file.sha256.lower():
        return None
    return (
        f"{path} has the sha256 {digest}, but its card pins {file.sha256}: it is damaged or another file; copy or "
        "download it again."
    )


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
