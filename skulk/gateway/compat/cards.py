"""Model cards in the clients' words: inside shards, and as entries of ``/v1/models``."""

from __future__ import annotations

from typing import Any

from skulk.units import MIB
from skulk.wire.model import ModelCard
from skulk.wire.store import FoundModel


def card_json(card: ModelCard) -> dict[str, Any]:
    """A card as ``modelCard`` stands in shards and replies."""
    return {
        "modelId": card.model_id,
        "name": card.name,
        "family": card.family,
        "quantization": card.quantization,
        "storageSize": {"inBytes": card.size_bytes},
        "nLayers": card.layers,
        "hiddenSize": card.embedding_length,
        "contextLength": card.context_length,
        "supportsTensor": False,
        "tasks": list(card.tasks),
        "capabilities": list(card.capabilities),
        "compatibleBackends": list(card.backends),
    }


def model_json(card: ModelCard, state: str, problem: str) -> dict[str, Any]:
    """A model as an entry of ``/v1/models``: OpenAI's four fields, the clients' and ours."""
    entry: dict[str, Any] = {
        "id": card.model_id,
        "object": "model",
        "created": 0,
        "owned_by": card.model_id.partition("/")[0] if "/" in card.model_id else "skulk",
        "model_id": card.model_id,
        "hugging_face_id": card.model_id,
        "name": card.name,
        "family": card.family,
        "quantization": card.quantization,
        "tags": list(card.tags),
        "tasks": list(card.tasks),
        "capabilities": list(card.capabilities),
        "context_length": card.context_length,
        "storage_size_megabytes": card.size_bytes // MIB,
        "resolved_capabilities": {
            "supports_thinking_toggle": "thinking" in card.capabilities,
            "supports_image_input": False,
            "reasoning_format": card.reasoning_format,
            "tool_format": card.tool_format,
            "supports_tool_calling": False,
        },
        "state": state,
    }
    if problem:
        entry["problem"] = problem
    return entry


def found_json(found: FoundModel) -> dict[str, Any]:
    """A repository that only the hub knows, as an entry of ``/models/search``: nothing of it was read yet."""
    return {
        "id": found.repo,
        "object": "model",
        "created": 0,
        "owned_by": found.repo.partition("/")[0],
        "model_id": found.repo,
        "hugging_face_id": found.repo,
        "name": found.repo.rpartition("/")[2],
        "tags": list(found.tags),
        "downloads": found.downloads,
        "likes": found.likes,
        "state": "available",
    }
