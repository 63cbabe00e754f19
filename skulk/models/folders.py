"""Finds GGUF files in model folders and groups them to models. Looks at names only; opens nothing.

<folder>/<org>/<repo>/**.gguf     -> org/repo          (the preferred quantization)
                                     org/repo:Q8_0     (each one, where there are several)
<folder>/<name>.gguf              -> name
…-00001-of-00003.gguf             -> one model of three parts
<folder>/<org>/<repo>/mmproj-….gguf -> no model: the vision part of the repository's models
<folder>/<org>/<repo>/config.json and *.safetensors, no GGUF -> org/repo, for MLX
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from skulk.models.quantization import FileName, parse_file_name, preferred, whole_stem

MAX_FILES: Final = 10_000
MAX_DEPTH: Final = 5


class FoundModel(msgspec.Struct, frozen=True, kw_only=True):
    """Files that make up one model, the first part first.

    Attributes:
        folder: what the names of the card's files are relative to.
        projector: the vision part that lies with it.
        config: the ``config.json`` of a model in safetensors; None: a GGUF.
        problem: why they make up none, in a sentence.
    """

    model_id: str
    folder: Path
    paths: tuple[Path, ...]
    quantization: str = ""
    projector: Path | None = None
    config: Path | None = None
    problem: str | None = None


class FolderScan(msgspec.Struct, frozen=True, kw_only=True):
    """What one folder holds; ``problems``: (path, reason) of what could not be looked at."""

    models: tuple[FoundModel, ...]
    problems: tuple[tuple[Path, str], ...]


def scan_folder(folder: Path) -> FolderScan:
    """All models of one folder, by id. A folder that isn't there holds none."""
    problems: list[tuple[Path, str]] = []
    groups: dict[tuple[str, Path], list[tuple[FileName, Path]]] = defaultdict(list)
    projectors: dict[Path, list[Path]] = defaultdict(list)
    for count, path in enumerate(_gguf_files(folder, problems)):
        if count >= MAX_FILES:
            problems.append((folder, f"{folder} holds more than {MAX_FILES:,} GGUF files; the rest is left out."))
            break
        name = parse_file_name(path.name)
        if name.is_projector:
            projectors[_home_of(folder, path)[1]].append(path)
            continue
        groups[_home_of(folder, path)].append((name, path))
    models: list[FoundModel] = []
    for (model_id, home), files in sorted(groups.items()):
        # in a folder of bare files nobody knows which model a projector belongs to
        projector = min(projectors[home], default=None) if home != folder and home in projectors else None
        found = _models_of(model_id, home, files)
        models.extend(msgspec.structs.replace(model, projector=projector) for model in found)
    models.extend(_safetensors_of(folder, {home for _, home in groups}))
    return FolderScan(models=tuple(models), problems=tuple(problems))


def _safetensors_of(folder: Path, taken: set[Path]) -> Iterator[FoundModel]:
    """Models in safetensors: repositories with a configuration and no GGUF."""
    for count, config in enumerate(sorted(folder.glob("*/*/config.json"))):
        if count >= MAX_FILES:
            return
        home = config.parent
        org, repo = home.parent.name, home.name
        if home in taken or org.startswith(".") or repo.startswith(".") or not _is_text(home):
            continue
        weights = tuple(sorted(path for path in home.glob("*.safetensors") if not path.name.startswith(".")))
        if weights:
            yield FoundModel(model_id=f"{org}/{repo}", folder=home, paths=weights, config=config)


def _gguf_files(folder: Path, problems: list[tuple[Path, str]]) -> Iterator[Path]:
    """GGUF files in a stable order, at most `MAX_DEPTH` folders deep, each folder once; not the hidden."""

    def note(error: OSError) -> None:
        if Path(str(error.filename)) != folder or not isinstance(error, FileNotFoundError):
            problems.append((Path(str(error.filename)), f"{error.filename} can't be looked into: {error.strerror}."))

    seen: set[str] = set()
    for place, folders, files in os.walk(folder, onerror=note, followlinks=True):
        real = os.path.realpath(place)
        depth = len(Path(place).relative_to(folder).parts)
        if real in seen or depth > MAX_DEPTH:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.lower().endswith(".gguf") or name.startswith("."):
                continue
            path = Path(place) / name
            if _is_text(path):
                yield path
            else:
                problems.append((path, f"{str(path)!a} has a name that is no UTF-8; rename it."))


def _is_text(path: Path) -> bool:
    """Whether a path can stand in a message: file systems allow bytes that are no text."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _home_of(folder: Path, path: Path) -> tuple[str, Path]:
    """The model id that a file's place gives it, and the folder that its name is relative to."""
    parts = path.relative_to(folder).parts
    if len(parts) >= 3:
        return f"{parts[0]}/{parts[1]}", folder / parts[0] / parts[1]
    return whole_stem(path.name), path.parent


def _models_of(model_id: str, home: Path, files: list[tuple[FileName, Path]]) -> list[FoundModel]:
    """The models among the files of one place: one for each quantization, the preferred one under the plain id."""
    by_kind: dict[tuple[str, str], list[tuple[FileName, Path]]] = defaultdict(list)
    for name, path in files:
        by_kind[(name.quantization, name.base)].append((name, path))
    bases: dict[str, str] = {}
    for quantization, base in sorted(by_kind):
        bases.setdefault(quantization, base)
    found = [
        _group(model_id, home, quantization, by_kind[(quantization, base)], is_first=bases[quantization] == base)
        for quantization, base in sorted(by_kind)
    ]
    usable = [model for model in found if model.problem is None]
    if not usable:
        return [msgspec.structs.replace(found[0], model_id=model_id), *found[1:]]
    best = preferred(model.quantization for model in usable)
    if len(usable) == 1:
        return [msgspec.structs.replace(m, model_id=model_id) if m is usable[0] else m for m in found]
    plain = next(model for model in usable if model.quantization == best)
    return [msgspec.structs.replace(plain, model_id=model_id), *found]


def _group(
    model_id: str, home: Path, quantization: str, files: list[tuple[FileName, Path]], *, is_first: bool
) -> FoundModel:
    """One quantization: its parts in order, or what is wrong with them."""
    ordered = sorted(files, key=lambda file: (file[0].part, file[1]))
    parts = ordered[0][0].parts
    have = [name.part for name, _ in ordered]
    problem: str | None = None
    names = ", ".join(str(path.relative_to(home)) for _, path in ordered)
    if not is_first:
        problem = f"{names} is the same quantization as another file there; put it into a folder of its own."
    elif any(name.parts != parts for name, _ in ordered) or have != list(range(1, parts + 1)):
        missing = sorted(set(range(1, parts + 1)) - set(have))
        problem = (
            f"{ordered[0][1]} is one of {parts} parts; {len(missing)} are missing (the first: {missing[0]}); copy all."
            if missing
            else f"{names} don't fit together as parts of one model; remove what doesn't belong."
        )
    return FoundModel(
        model_id=f"{model_id}:{quantization}" if quantization else model_id,
        folder=home,
        paths=tuple(path for _, path in ordered),
        quantization=quantization,
        problem=problem,
    )
