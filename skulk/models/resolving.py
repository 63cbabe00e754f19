"""From a name to a pinned card, before any weight is fetched: list, choose, read headers by ranges. Blocks.

org/repo:Q8_0 ── Hub.repository ── select ──┬── GGUF: headers of all parts ──┬── ModelCard: revision, sha256,
                                            └── MLX: config.json, index ─────┘   memory, projector
"""

from __future__ import annotations

from typing import Final

import msgspec

from skulk.models.card import card_from_gguf, with_vision
from skulk.models.config_json import card_from_config, is_vision_config, read_config, read_index
from skulk.models.gguf import GgufHeader, read_header
from skulk.models.hub import Hub, RemoteFile, Repository
from skulk.models.reference import ModelReference
from skulk.models.selection import Selection, select
from skulk.wire.model import ModelCard

INDEX: Final = "model.safetensors.index.json"
CONFIG: Final = "config.json"


def resolve(hub: Hub, reference: ModelReference, *, quantization: str = "", file: str = "") -> ModelCard:
    """The card of a model of the hub, with its commit and the hashes of its files.

    ``quantization`` and ``file``: what is preferred where the reference names no quantization.

    Cost: two calls and a page more for every 1,000 files, then about the size of the headers (5 to 20 MiB).

    Raises:
        SkulkError: as `skulk.models.hub`; ``quantization_not_found``; ``model_file_invalid``.
    """
    repository = hub.repository(reference)
    if reference.quantization:
        chosen = select(repository.repo, repository.files, reference.quantization)
    else:
        chosen = select(repository.repo, repository.files, quantization, file=file)
    card = (
        _gguf_card(hub, reference, repository, chosen)
        if chosen.format == "gguf"
        else _mlx_card(hub, reference, repository, chosen)
    )
    return msgspec.structs.replace(
        card,
        repo=repository.repo,
        revision=repository.revision,
        license=card.license or repository.license,
        projector=chosen.projector,
        companions=chosen.companions,
    )


def _gguf_card(hub: Hub, reference: ModelReference, repository: Repository, chosen: Selection) -> ModelCard:
    headers: list[GgufHeader] = []
    for file in chosen.weights:
        remote = RemoteFile(hub, repository, file)
        headers.append(read_header(remote.read_at, file.size_bytes, f"{repository.repo}/{file.name}"))
    card = card_from_gguf(headers, model_id=reference.model_id, files=chosen.weights, source=hub_page(repository))
    is_vision = chosen.projector is not None or is_vision_config(_json(hub, repository, CONFIG))
    return with_vision(card) if is_vision else card


def _mlx_card(hub: Hub, reference: ModelReference, repository: Repository, chosen: Selection) -> ModelCard:
    config = read_config(_json(hub, repository, CONFIG), f"{repository.repo}/{CONFIG}")
    index = _json(hub, repository, INDEX)
    total = None if not index else read_index(index, f"{repository.repo}/{INDEX}").total_bytes
    return card_from_config(
        config, model_id=reference.model_id, files=chosen.weights, weights_bytes=total, source=hub_page(repository)
    )


def _json(hub: Hub, repository: Repository, name: str) -> bytes:
    """A small file of the repository; empty where there is none."""
    file = next((file for file in repository.files if file.name == name), None)
    return b"" if file is None else hub.small_file(repository.repo, repository.revision, file)


def hub_page(repository: Repository) -> str:
    """Where a person reads about the repository."""
    return f"https://huggingface.co/{repository.repo}"
