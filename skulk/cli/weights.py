"""What a node's settings say of weights: where they lie, how neighbours reach them, and which model a name means."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final

from skulk.errors import RequestError, SkulkError, error_of
from skulk.models.catalogue import Catalogue
from skulk.models.reference import is_reference
from skulk.models.tasks import ResolveTask
from skulk.node.children import HubChildren
from skulk.node.storehouse import CatalogueFolders, why_no_hub
from skulk.settings import Settings
from skulk.wire.model import ModelCard

VERIFIED_FILE: Final = "verified.json"
CARDS_FOLDER: Final = "cards"


def reachable_host(host: str) -> str:
    """How neighbours reach an address that is listened on: this machine's own one where it is all of them."""
    if host not in {"0.0.0.0", "::"}:  # noqa: S104 - compared, not bound
        return f"[{host}]" if ":" in host else host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # picks the address that leads out; a datagram socket sends nothing by connecting
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


async def card_of(settings: Settings, catalogue: Catalogue, model_id: str) -> ModelCard:
    """A model to place: what lies here, else what the hub says of the name.

    Raises:
        SkulkError: ``model_not_found``; what the hub answered.
    """
    try:
        return catalogue.find(model_id).card
    except RequestError as error:
        if error.code != "model_not_found" or not is_reference(model_id) or why_no_hub(settings):
            raise
    try:
        return await HubChildren(settings, None).ask(ResolveTask(name=model_id), ModelCard)
    except SkulkError as error:
        detail = f"{model_id} doesn't lie here, and the hub was no help: {error.detail}"
        raise error_of(error.code, detail, param=error.param, retry_after_s=error.retry_after_s) from error


def catalogue_of(settings: Settings) -> Catalogue:
    """Every model that lies here, looked at once."""
    folders = folders_of(settings)
    catalogue = Catalogue(
        Path(settings.models_dir),
        folders.models_path,
        verified_file=Path(settings.home) / VERIFIED_FILE,
        card_dirs=folders.card_dirs,
        ollama_dir=folders.ollama_dir,
    )
    catalogue.rescan()
    return catalogue


def folders_of(settings: Settings) -> CatalogueFolders:
    """Where models lie, other programs' caches included."""
    return CatalogueFolders(settings, Path.home(), (Path(settings.home) / CARDS_FOLDER,))
