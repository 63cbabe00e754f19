"""One look at all that makes up a catalogue: cards, the shelf, folders, Ollama's store. First come, first kept."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from skulk.errors import RequestError
from skulk.models.card import CardFile, card_from_gguf, read_card, with_vision
from skulk.models.config_json import card_from_config, is_vision_config, read_config
from skulk.models.folders import FoundModel, scan_folder
from skulk.models.foreign import OllamaModel
from skulk.models.gguf import GgufHeader
from skulk.models.hints import CardHint, with_hint
from skulk.models.reference import repo_of
from skulk.models.shelf import Shelf
from skulk.models.verification import VerificationCache
from skulk.wire.model import ModelCard, ModelFile


class CatalogueEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One model.

    Attributes:
        paths: its weights here, in the card's order; empty where they aren't.
        projector: its vision part here.
        others: what else of it lies here (`ModelCard.companions`).
        problem: why the files can't be used, in a sentence; None: they can, or there are none.
    """

    card: ModelCard
    paths: tuple[Path, ...] = ()
    projector: Path | None = None
    others: tuple[Path, ...] = ()
    problem: str | None = None

    @property
    def all_paths(self) -> tuple[Path, ...]:
        """All its files here, in the order of `ModelCard.all_files`."""
        return (*self.paths, *(() if self.projector is None else (self.projector,)), *self.others)

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


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """What a look found."""

    entries: dict[str, CatalogueEntry] = {}
    problems: tuple[CatalogueProblem, ...] = ()
    hints: dict[str, CardHint] = {}


class Scan:
    """See the module."""

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
        self._hints: dict[str, CardHint] = {}

    def snapshot(self) -> Snapshot:
        return Snapshot(entries=dict(self._entries), problems=tuple(self._problems), hints=dict(self._hints))

    def add_cards(self, card_dir: Path, *, are_built_in: bool = False) -> None:
        """The cards of a folder; a built-in one yields to one of one's own in silence, which is what that is for."""
        for path in sorted(card_dir.glob("*.toml")):
            try:
                card = read_card(path)
            except RequestError as error:
                self._problem(path, error.detail)
                continue
            if card.model_id in self._entries or card.model_id in self._hints:
                if not are_built_in:
                    self._problem(path, f"the card {path} names {card.model_id}, which another card has.")
                continue
            if isinstance(card, CardHint):
                self._hints[card.model_id] = card
            else:
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

    def add_shelved(self, card: ModelCard, shelf: Shelf) -> None:
        """A card of the shelf: its files lie where it says, whole, or it has none yet."""
        if card.model_id in self._entries:
            return
        everything = shelf.files_of(card)
        self._carded.update(everything)
        entry = CatalogueEntry(card=card)
        if all(path.is_file() for path in everything):
            weights = everything[: len(card.files)]
            has_projector = card.projector is not None
            entry = CatalogueEntry(
                card=card,
                paths=weights,
                projector=everything[len(weights)] if has_projector else None,
                others=everything[len(weights) + has_projector :],
                problem=self._shelf_problem(card, everything),
            )
            if entry.problem is not None:
                self._problem(everything[0], entry.problem, card.model_id)
        self._entries[card.model_id] = entry

    def _shelf_problem(self, card: ModelCard, paths: Sequence[Path]) -> str | None:
        try:
            problem = _size_problem(card.all_files, paths)
        except OSError as error:
            return f"{paths[0].parent} can't be read: {error.strerror}."
        ggufs = [path for path in paths if path.suffix.lower() == ".gguf"] if card.format == "gguf" else []
        broken = (
            None if problem else next((told for path in ggufs if isinstance(told := self._header_of(path), str)), None)
        )
        return problem or broken or self._known_hash_problem(card.all_files, paths)

    def add_ollama(self, model: OllamaModel) -> None:
        """A model of Ollama's store."""
        if model.model_id in self._entries:
            return
        if model.problem:
            self._problem(model.path, model.problem, model.model_id)
            return
        header = self._header_of(model.path)
        if isinstance(header, str):
            self._problem(model.path, header, model.model_id)
            return
        try:
            file = ModelFile(name=model.path.name, size_bytes=model.path.stat().st_size, sha256=model.sha256)
            card = card_from_gguf([header], model_id=model.model_id, files=(file,), source=str(model.path))
        except RequestError as error:
            self._problem(model.path, error.detail, model.model_id)
            return
        projector = model.projector if model.projector is not None and model.projector.is_file() else None
        if projector is not None:
            eyes = ModelFile(name=projector.name, size_bytes=projector.stat().st_size, sha256=model.projector_sha256)
            card = with_vision(msgspec.structs.replace(card, projector=eyes))
        self._entries[model.model_id] = CatalogueEntry(card=card, paths=(model.path,), projector=projector)

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
            if known is not None and (problem := hash_problem(path, file, known)) is not None:
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
            if (hint := self._hints.get(repo_of(model_id))) is not None:
                card = with_hint(card, hint)
        except RequestError as error:
            self._problem(found.paths[0], error.detail, model_id)
            return
        except OSError as error:
            self._problem(found.paths[0], f"{error.filename} can't be read: {error.strerror}.", model_id)
            return
        self._entries[model_id] = CatalogueEntry(card=card, paths=found.paths, projector=found.projector)

    def _card_of(self, found: FoundModel, model_id: str) -> ModelCard:
        if found.config is not None:
            weights = [_file_of(path, found.folder) for path in found.paths]
            config = read_config(found.config.read_bytes(), str(found.config))
            return card_from_config(config, model_id=model_id, files=weights, source=str(found.config))
        headers: list[GgufHeader] = []
        files: list[ModelFile] = []
        for path in found.paths:
            header = self._header_of(path)
            if isinstance(header, str):
                raise RequestError("model_file_invalid", header)
            headers.append(header)
            files.append(_file_of(path, found.folder))
        card = card_from_gguf(headers, model_id=model_id, files=files, source=str(found.paths[0]))
        beside = found.folder / "config.json"
        if found.projector is None:
            return with_vision(card) if beside.is_file() and is_vision_config(beside.read_bytes()) else card
        return with_vision(msgspec.structs.replace(card, projector=_file_of(found.projector, found.folder)))

    def _problem(self, path: Path, reason: str, model_id: str = "") -> None:
        self._problems.append(CatalogueProblem(path=path, reason=reason, model_id=model_id))


def _file_of(path: Path, folder: Path) -> ModelFile:
    return ModelFile(name=path.relative_to(folder).as_posix(), size_bytes=path.stat().st_size)


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


def hash_problem(path: Path, file: ModelFile, digest: str) -> str | None:
    """What is wrong with a file's hash, in a sentence; None: nothing, or nothing pins it."""
    if file.sha256 is None or digest == file.sha256.lower():
        return None
    return (
        f"{path} has the sha256 {digest}, but its card pins {file.sha256}: it is damaged or another file; copy or "
        "download it again."
    )
