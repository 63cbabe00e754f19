"""``<home>/mesh.json``: how it stands with each peer of the running node. The launcher writes it, ``doctor`` reads."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from skulk.discovery.peers import Standing
from skulk.errors import SkulkError
from skulk.files import write_atomic

MESH_FILE: Final = "mesh.json"

log = logging.getLogger("skulk.mesh")


class MeshFile(msgspec.Struct, frozen=True, kw_only=True):
    """The peers of a running node."""

    peers: tuple[Standing, ...] = ()


def write_mesh_file(home: Path, peers: tuple[Standing, ...]) -> None:
    """Writes the file whole or not at all; where it can't be written, a log line tells: only ``doctor`` needs it."""
    body = msgspec.json.format(msgspec.json.encode(MeshFile(peers=peers)), indent=2) + b"\n"
    try:
        write_atomic(home / MESH_FILE, body, mode=0o644, fsync=False)
    except (OSError, SkulkError) as error:
        log.warning("how it stands with the peers isn't on disk: %s", error)


def remove_mesh_file(home: Path) -> None:
    """Removes the file; it may be gone already."""
    with suppress(FileNotFoundError):
        (home / MESH_FILE).unlink()


def read_mesh_file(home: Path) -> tuple[Standing, ...] | None:
    """What the running node of a home wrote; None where it wrote nothing readable."""
    try:
        return msgspec.json.decode((home / MESH_FILE).read_bytes(), type=MeshFile).peers
    except (OSError, msgspec.DecodeError):
        return None
