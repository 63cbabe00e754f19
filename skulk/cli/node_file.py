"""``<home>/node.json``: where the running node of a home answers. The launcher writes it, other commands read it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from skulk.files import write_atomic

NODE_FILE: Final = "node.json"


class NodeFile(msgspec.Struct, frozen=True, kw_only=True):
    """A running node. Ports are those in use, also where 0 was asked for.

    Attributes:
        pid: of the launcher.
        api_url: how this machine reaches its API; empty with ``--no-api``.
        nats_url: of its nats-server's client port, without credentials.
        route_port: 0 where there are no routes.
    """

    node_id: str
    pid: int
    version: str
    cluster: str
    started_at: float
    api_url: str = ""
    api_port: int = 0
    nats_url: str = ""
    nats_port: int = 0
    route_port: int = 0
    files_port: int = 0


def write_node_file(home: Path, node: NodeFile) -> None:
    """Writes the file whole or not at all.

    Raises:
        ServiceError: ``disk_full``.
        OSError: the home is not writable.
    """
    body = msgspec.json.format(msgspec.json.encode(node), indent=2)
    write_atomic(home / NODE_FILE, body + b"\n", mode=0o644, fsync=False)


def remove_node_file(home: Path) -> None:
    """Removes the file; it may be gone already."""
    with suppress(FileNotFoundError):
        (home / NODE_FILE).unlink()


def read_node_file(home: Path) -> NodeFile | None:
    """The running node of a home; None where none runs (no file, a damaged one, or one whose process is gone)."""
    try:
        node = msgspec.json.decode((home / NODE_FILE).read_bytes(), type=NodeFile)
    except (OSError, msgspec.DecodeError):
        return None
    return node if _is_alive(node.pid) else None


def _is_alive(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def has_running_node(home: str) -> bool:
    """Whether a node runs in this home that has an API."""
    node = read_node_file(Path(home))
    return node is not None and bool(node.api_url)
