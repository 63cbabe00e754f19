"""Which files of a repository are fetched: exactly one quantization, one projector, never code. Pure.

files of the repository
 ├── *.gguf ── grouped by (folder, name, quantization), parts complete ── wanted or preferred ── one group
 │       └──── mmproj-*.gguf ──────────────────────────────────────────── one projector
 └── no GGUF: config.json and *.safetensors ── every part of the index, and what goes with them (MLX)
"""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import msgspec

from skulk.errors import RequestError
from skulk.models.quantization import FileName, normal, parse_file_name, rank
from skulk.wire.model import ModelFile

MAX_FILES: Final = 20_000
MAX_NAME: Final = 1024
_WEIGHTS: Final = (".gguf", ".safetensors")
_COMPANION: Final = re.compile(
    r"[A-Za-z0-9._-]+\.json|tokenizer\.model|vocab\.txt|merges\.txt|[A-Za-z0-9._-]+\.(?:jinja|tiktoken)"
)
_IMATRIX: Final = re.compile(r"(^|[-._])imatrix([-._]|$)", re.IGNORECASE)
# Models that were trained in this format: there it is no loss, and every other quantization is a second one.
_NATIVE_MXFP4: Final = re.compile(r"(^|[-._/])gpt-?oss", re.IGNORECASE)
_PROJECTORS: Final = ("F16", "BF16", "Q8_0", "F32")


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """What to fetch.

    Attributes:
        weights: the first part first.
        quantization: as the names tell it; empty where they don't.
        companions: configuration, tokenizer and templates, for formats whose weights don't hold them.
    """

    format: Literal["gguf", "mlx"]
    weights: tuple[ModelFile, ...]
    quantization: str = ""
    projector: ModelFile | None = None
    companions: tuple[ModelFile, ...] = ()


class _Group(msgspec.Struct, frozen=True, kw_only=True):
    """Files that are one quantization of one model."""

    folder: str
    base: str
    quantization: str
    is_dynamic: bool
    parts: int
    files: tuple[tuple[int, ModelFile], ...]

    @property
    def is_whole(self) -> bool:
        return [part for part, _ in self.files] == list(range(1, self.parts + 1))

    @property
    def weights(self) -> tuple[ModelFile, ...]:
        return tuple(file for _, file in self.files)


def is_wanted_kind(name: str) -> bool:
    """Whether a file may be fetched at all: weights, configuration, tokenizer, template; never code, never outside."""
    if not name or len(name) > MAX_NAME or name.startswith("/") or "\\" in name or not name.isprintable():
        return False
    parts = name.split("/")
    if any(part in ("", ".", "..") or part.startswith(".") for part in parts):
        return False
    return name.lower().endswith(_WEIGHTS) or _COMPANION.fullmatch(parts[-1]) is not None


def select(repo: str, files: Sequence[ModelFile], quantization: str = "", *, file: str = "") -> Selection:
    """Chooses.

    Args:
        repo: for the texts of errors, and for what models are known to be.
        files: everything that the repository lists.
        quantization: what was asked for; empty: the preferred one.
        file: the weights' only or first file, whatever its name tells; empty: chosen by quantization.

    Raises:
        RequestError: ``quantization_not_found``, with those that there are; ``model_file_invalid``: nothing to load.
    """
    allowed = sorted((file for file in files[:MAX_FILES] if is_wanted_kind(file.name)), key=lambda file: file.name)
    ggufs = [file for file in allowed if file.name.lower().endswith(".gguf")]
    if ggufs:
        return _select_gguf(repo, ggufs, quantization, file)
    return _select_safetensors(repo, allowed, quantization)


def has_projector(files: Iterable[ModelFile]) -> bool:
    """Whether there is a vision part among the files."""
    return any(_parsed(file).is_projector for file in files if file.name.lower().endswith(".gguf"))


def _select_gguf(repo: str, ggufs: list[ModelFile], quantization: str, file: str) -> Selection:
    groups = _groups(ggufs)
    whole = [group for group in groups if group.is_whole]
    native = _NATIVE_MXFP4.search(repo) is not None
    if file:
        pinned = next((group for group in whole if group.weights[0].name == file), None)
        if pinned is None:
            raise RequestError(
                "quantization_not_found", f"{repo} has no {file}, which its card pins; mend the card.", param="model_id"
            )
        chosen = pinned
    elif quantization:
        chosen = _named(repo, groups, quantization)
    elif whole:
        chosen = min(whole, key=lambda group: _preference(group, is_native_mxfp4=native))
    else:
        raise _nothing(repo, groups)
    return Selection(
        format="gguf",
        weights=chosen.weights,
        quantization=chosen.quantization,
        projector=_projector(ggufs, chosen.folder),
    )


def _groups(ggufs: list[ModelFile]) -> list[_Group]:
    found: dict[tuple[str, str, str, bool], list[tuple[FileName, ModelFile]]] = defaultdict(list)
    for file in ggufs:
        folder, name = posixpath.split(file.name)
        parsed = parse_file_name(name)
        if parsed.is_projector or _IMATRIX.search(parsed.base) or _IMATRIX.search(name[:-5]):
            continue
        # a folder may carry what its files don't: Q8_0/model-00001-of-00002.gguf
        named = parsed.quantization or parse_file_name(posixpath.basename(folder)).quantization
        is_dynamic = re.search(r"(^|[-._/])UD-", file.name, re.IGNORECASE) is not None
        found[(folder, parsed.base, named, is_dynamic)].append((parsed, file))
    groups: list[_Group] = []
    for (folder, base, named, is_dynamic), members in sorted(found.items()):
        parts = max(parsed.parts for parsed, _ in members)
        ordered = tuple(sorted(((parsed.part, file) for parsed, file in members), key=lambda one: one[0]))
        groups.append(
            _Group(folder=folder, base=base, quantization=named, is_dynamic=is_dynamic, parts=parts, files=ordered)
        )
    return groups


def _named(repo: str, groups: list[_Group], quantization: str) -> _Group:
    matching = [group for group in groups if normal(group.quantization) == normal(quantization) and group.quantization]
    whole = [group for group in matching if group.is_whole]
    if whole:
        wants_dynamic = quantization.upper().startswith("UD-")
        return min(whole, key=lambda group: (group.is_dynamic != wants_dynamic, *_name_order(group)))
    if matching:
        raise RequestError("quantization_not_found", _missing_parts(repo, matching[0]), param="model_id")
    offered = sorted({group.quantization for group in groups if group.quantization}, key=rank)
    told = f"it has {', '.join(offered)}" if offered else "its files name none"
    raise RequestError(
        "quantization_not_found",
        f"{repo} has no {quantization}; {told}. Name one of them after a colon.",
        param="model_id",
    )


def _preference(group: _Group, *, is_native_mxfp4: bool) -> tuple[int, bool, int, str, str]:
    is_native = is_native_mxfp4 and normal(group.quantization) == "MXFP4"
    return (-1 if is_native else rank(group.quantization), group.is_dynamic, *_name_order(group))


def _name_order(group: _Group) -> tuple[int, str, str]:
    """Among equals the shortest name: what is longer is a variant (a draft, a longer context)."""
    return len(group.base), group.base, group.folder


def _projector(ggufs: list[ModelFile], folder: str) -> ModelFile | None:
    projectors = [file for file in ggufs if _parsed(file).is_projector]

    def order(file: ModelFile) -> tuple[bool, int, str]:
        kind = _parsed(file).quantization
        preferred = _PROJECTORS.index(kind) if kind in _PROJECTORS else len(_PROJECTORS)
        return posixpath.dirname(file.name) not in (folder, ""), preferred, file.name

    return min(projectors, key=order, default=None)


def _parsed(file: ModelFile) -> FileName:
    return parse_file_name(posixpath.basename(file.name))


def _nothing(repo: str, groups: list[_Group]) -> RequestError:
    if groups:
        return RequestError("quantization_not_found", _missing_parts(repo, groups[0]), param="model_id")
    return RequestError(
        "model_file_invalid", f"{repo} holds GGUF files, but no model among them; choose another repository."
    )


def _missing_parts(repo: str, group: _Group) -> str:
    have = {part for part, _ in group.files}
    missing = [part for part in range(1, group.parts + 1) if part not in have]
    name = group.quantization or group.base
    if not missing:
        return f"{repo} has {name} twice under one name; choose another quantization or revision."
    return (
        f"{repo} has only {len(have)} of {group.parts} parts of {name} (the first missing one: {missing[0]}); "
        "choose another quantization or revision."
    )


def _select_safetensors(repo: str, allowed: list[ModelFile], quantization: str) -> Selection:
    top = [file for file in allowed if "/" not in file.name]
    weights = tuple(file for file in top if file.name.lower().endswith(".safetensors"))
    if quantization:
        raise RequestError(
            "quantization_not_found",
            f"{repo} holds no GGUF file, so no {quantization}; ask for {repo} alone.",
            param="model_id",
        )
    if not weights or all(file.name != "config.json" for file in top):
        raise RequestError(
            "model_file_invalid",
            f"{repo} holds neither GGUF files nor safetensors with a config.json; choose another repository.",
        )
    companions = tuple(file for file in top if file not in weights)
    return Selection(format="mlx", weights=weights, companions=companions)
