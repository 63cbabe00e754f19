"""The peers that a node remembers: ``<home>/peers.json``, read at the start, written when they change."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import msgspec

from skulk.discovery.peers import Neighbour
from skulk.errors import SkulkError
from skulk.files import write_atomic

PEERS_FILE: Final = "peers.json"
MAX_BYTES: Final = 4 * 1024 * 1024

_LOG: Final = logging.getLogger(__name__)


class Remembered(msgspec.Struct, frozen=True, kw_only=True):
    """What outlives a restart.

    Attributes:
        cluster: whose peers these are; those of another cluster are forgotten.
        route_port: the own one, taken again where a free one is asked for: others have it on their disks.
    """

    cluster: str
    route_port: int = 0
    peers: tuple[Neighbour, ...] = ()


def load_peers(home: Path, cluster: str) -> Remembered:
    """What is remembered of this cluster; nothing where the file is missing or damaged, which a log line tells."""
    path = home / PEERS_FILE
    try:
        with open(path, "rb") as file:
            found = msgspec.json.decode(file.read(MAX_BYTES), type=Remembered)
    except FileNotFoundError:
        return Remembered(cluster=cluster)
    except (OSError, msgspec.DecodeError) as error:
        _LOG.warning("%s isn't readable, peers are found anew: %s", path, error)
        return Remembered(cluster=cluster)
    return found if found.cluster == cluster else Remembered(cluster=cluster)


def save_peers(home: Path, remembered: Remembered) -> bool:
    """Writes the file whole or not at all; False, and a log line, where it can't be written: the node goes on."""
    body = msgspec.json.format(msgspec.json.encode(remembered), indent=2) + b"\n"
    try:
        write_atomic(home / PEERS_FILE, body)
    except (OSError, SkulkError) as error:
        _LOG.warning("the peers aren't on disk: %s", error)
        return False
    return True
