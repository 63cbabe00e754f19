"""The parts of a node that have to do with weights, put together: shelf, downloads, store service, files server.

Settings ──> storehouse() ──> Storehouse: shelf, downloads, store; what the beat says; the files server's child
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from skulk.bus.port import Bus
from skulk.bus.replica import Replica
from skulk.clock import Clock
from skulk.models.catalogue import Catalogue
from skulk.models.file_server import files_credential
from skulk.models.foreign import lm_studio_folders
from skulk.models.shelf import Shelf
from skulk.models.sources import Neighbour
from skulk.node.children import HubChildren
from skulk.node.downloads import Downloads, Rules
from skulk.node.files_process import FilesSpec
from skulk.node.measuring import MachineMeter
from skulk.node.store import Store
from skulk.settings import Settings
from skulk.supervision.child import ChildSpec, Ledger
from skulk.wire.base import encode
from skulk.wire.model import ModelCard

MAX_NEIGHBOURS: Final = 4
FILES_DRAIN_S: Final = 1.0


class Storehouse:
    """A node's weights: what lies here, what is coming, and who gets it from here.

    Args:
        replica: tells which neighbours have what, and what is placed here.
        meter: looks at the models anew when files came or went.
    """

    def __init__(
        self,
        settings: Settings,
        node_id: str,
        bus: Bus,
        replica: Replica,
        clock: Clock,
        catalogue: Catalogue,
        meter: MachineMeter,
        ledger: Ledger | None,
    ) -> None:
        self._settings = settings
        self._node_id = node_id
        self._replica = replica
        self._credential = files_credential(settings.cluster_token)
        self._tasks = HubChildren(settings, ledger)
        self.shelf: Final = Shelf(Path(settings.models_dir))
        self.downloads: Final = Downloads(
            self.shelf,
            catalogue,
            self._tasks,
            clock,
            rules=Rules(no_hub=why_no_hub(settings), budget_bytes=settings.models_budget_bytes),
            neighbours=self.neighbours,
            in_use=self.in_use,
            on_change=meter.look_at_models,
        )
        self.store: Final = Store(
            bus,
            node_id,
            clock,
            shelf=self.shelf,
            catalogue=catalogue,
            tasks=self._tasks,
            downloads=self.downloads,
            in_use=self.in_use,
            on_change=meter.look_at_models,
        )

    @property
    def may_use_hub(self) -> bool:
        """Whether this node fetches from the hub."""
        return not self.downloads.rules.no_hub

    def in_use(self) -> frozenset[str]:
        """The models that are placed on this node."""
        instances = self._replica.view.state.instances.values()
        return frozenset(
            found.model_id
            for found in instances
            if found.assignment is not None and found.assignment.node_id == self._node_id
        )

    def neighbours(self, card: ModelCard) -> tuple[Neighbour, ...]:
        """Where a model is served, some places at most; not by nodes with other bytes under its id.

        Each node's first address comes before the others of any: it serves on all that its routes name.
        """
        wanted = card.files[0].sha256
        found: list[str] = []
        others: list[str] = []
        for node_id, node in sorted(self._replica.view.nodes.items()):
            if node_id == self._node_id or not node.beat.files:
                continue
            held = next((held for held in node.beat.models if held.model_id == card.model_id), None)
            if held is not None and (held.sha256 or wanted) == (wanted or held.sha256):
                found.append(node.beat.files)
                others += other_addresses(node.beat.files, node.beat.routes)
        return tuple(
            Neighbour(url=f"http://{address}", credential=self._credential)
            for address in (*found, *others)[:MAX_NEIGHBOURS]
        )

    def files_child(self, port: int, folders: CatalogueFolders) -> ChildSpec:
        """The child that serves weights to neighbours."""
        settings = self._settings
        spec = FilesSpec(
            host=settings.api_host,
            port=port,
            models_dir=settings.models_dir,
            verified_file=str(Path(settings.home) / "verified-files.json"),
            credential=self._credential,
            models_path=tuple(map(str, folders.models_path)),
            card_dirs=tuple(map(str, folders.card_dirs)),
            ollama_dir=str(folders.ollama_dir or ""),
            log_format=settings.log_format,
            log_level=settings.log_level,
        )
        return ChildSpec(
            name="files",
            argv=(sys.executable, "-m", "skulk", "_files"),
            stdin=encode(spec),
            log_path=Path(settings.home) / "logs" / "files.log",
            nice=5,
            drain_s=FILES_DRAIN_S,
        )


def other_addresses(files: str, routes: Sequence[str]) -> list[str]:
    """``host:port`` of a files server on the other hosts that a node's routes name."""
    own, _, port = files.rpartition(":")
    hosts = (route.rpartition(":")[0] for route in routes)
    return [f"{host}:{port}" for host in dict.fromkeys(hosts) if host != own]


class CatalogueFolders:
    """Where a node looks for models beside its own folder.

    Attributes:
        models_path: read-only folders: those that were set, then LM Studio's.
        ollama_dir: Ollama's store; None: it isn't looked at.
    """

    def __init__(self, settings: Settings, user_home: Path, card_dirs: tuple[Path, ...]) -> None:
        given = tuple(Path(folder) for folder in settings.models_path)
        self.card_dirs: Final = card_dirs
        if settings.foreign_caches:
            self.models_path = (*given, *lm_studio_folders(user_home))
            self.ollama_dir: Path | None = Path(settings.ollama_models or user_home / ".ollama" / "models")
        else:
            self.models_path = given
            self.ollama_dir = None


def why_no_hub(settings: Settings) -> str:
    """Why this node must not ask the hub; empty: it may."""
    return "this node is offline (SKULK_OFFLINE)" if settings.offline else ""
