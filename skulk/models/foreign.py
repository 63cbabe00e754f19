"""Models that other programs fetched: Ollama's store and LM Studio's folders. Read only; nothing is moved or written.

    LM Studio   <folder>/<publisher>/<repository>/*.gguf     our own layout: one more folder of the catalogue
    Ollama      <folder>/manifests/<host>/<namespace>/<name>/<tag>   JSON that names blobs by their sha256
                <folder>/blobs/sha256-<digest>                       the GGUF, and a projector where there is one

A model of Ollama's library is called as Ollama calls it, `llama3.2:1b`; of another namespace,
`<namespace>.<name>:<tag>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

MAX_MANIFESTS: Final = 2_000
MAX_MANIFEST_BYTES: Final = 1024 * 1024
_MODEL: Final = "application/vnd.ollama.image.model"
_PROJECTOR: Final = "application/vnd.ollama.image.projector"
_DIGEST: Final = re.compile(r"sha256:([0-9a-f]{64})")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


class OllamaModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model of Ollama's store; the digests are hexadecimal.

    Attributes:
        problem: why it can't be used, in a sentence; empty: it can.
    """

    model_id: str
    path: Path
    sha256: str = ""
    projector: Path | None = None
    projector_sha256: str = ""
    problem: str = ""


class _Layer(msgspec.Struct, frozen=True):
    mediaType: str = ""  # noqa: N815 - the manifest's word
    digest: str = ""


class _Manifest(msgspec.Struct, frozen=True):
    layers: tuple[_Layer, ...] = ()


def lm_studio_folders(home: Path) -> tuple[Path, ...]:
    """Where LM Studio keeps models, now and in earlier versions; folders that aren't there hold none."""
    return home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"


def ollama_models(folder: Path) -> Iterator[OllamaModel]:
    """Every model of Ollama's store, by its manifest's path; a folder that isn't there holds none."""
    manifests = folder / "manifests"
    for count, path in enumerate(sorted(manifests.glob("*/*/*/*"))):
        if count >= MAX_MANIFESTS:
            return
        _, namespace, name, tag = path.relative_to(manifests).parts
        if all(_NAME.fullmatch(part) for part in (namespace, name, tag)):
            prefix = "" if namespace == "library" else f"{namespace}."
            yield _read(folder, path, f"{prefix}{name}:{tag}")


def _read(folder: Path, path: Path, model_id: str) -> OllamaModel:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            return OllamaModel(model_id=model_id, path=path, problem=f"{path} is no manifest: it is too large.")
        manifest = msgspec.json.decode(path.read_bytes(), type=_Manifest)
    except OSError as error:
        return OllamaModel(model_id=model_id, path=path, problem=f"{path} can't be read: {error.strerror}.")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return OllamaModel(model_id=model_id, path=path, problem=f"{path} is no manifest: {error}.")
    found: dict[str, Any] = {}
    for layer in manifest.layers:
        digest = _DIGEST.fullmatch(layer.digest)
        if digest is not None and layer.mediaType in (_MODEL, _PROJECTOR):
            found.setdefault(layer.mediaType, digest[1])
    if _MODEL not in found:
        return OllamaModel(model_id=model_id, path=path, problem=f"{path} names no model; pull it again with ollama.")
    blob = _blob(folder, found[_MODEL])
    if not blob.is_file():
        return OllamaModel(model_id=model_id, path=blob, problem=f"{blob}, which {path} names, is not there.")
    projector = found.get(_PROJECTOR, "")
    return OllamaModel(
        model_id=model_id,
        path=blob,
        sha256=found[_MODEL],
        projector=_blob(folder, projector) if projector else None,
        projector_sha256=projector,
    )


def _blob(folder: Path, digest: str) -> Path:
    return folder / "blobs" / f"sha256-{digest}"
