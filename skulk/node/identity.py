"""Who a node is, kept in its home folder over restarts."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec

from skulk.errors import StartError
from skulk.files import write_atomic
from skulk.ids import is_token, new_incarnation, new_node_id


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    node_id: str


class NodeIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """A node's names.

    Attributes:
        node_id: made once, kept in ``<home>/identity.json``.
        incarnation: new at each start.
        name: for people; the host's.
    """

    node_id: str
    incarnation: str
    name: str


def load_identity(home: Path) -> NodeIdentity:
    """The node's identity; made and kept at the first start.

    Raises:
        StartError: ``config_invalid``: the file is damaged; ``home_not_writable``: it can't be read or written.
        ServiceError: ``disk_full``.
    """
    path = home / "identity.json"
    node_id = _read(path)
    if node_id is None:
        node_id = new_node_id()
        try:
            write_atomic(path, msgspec.json.encode(_Kept(node_id=node_id)))
        except OSError as error:
            raise _unusable(path, error) from error
    return NodeIdentity(node_id=node_id, incarnation=new_incarnation(), name=socket.gethostname())


def _read(path: Path) -> str | None:
    try:
        body = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        node_id = msgspec.json.decode(body, type=_Kept).node_id
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _damaged(path) from error
    if not is_token(node_id):
        raise _damaged(path)
    return node_id


def _unusable(path: Path, error: OSError) -> StartError:
    return StartError(
        "home_not_writable",
        f"{path}, which holds this node's identity, can't be used: {error.strerror or error}. "
        "Make it readable and writable for this user, or choose another home with --home DIR.",
    )


def _damaged(path: Path) -> StartError:
    return StartError(
        "config_invalid",
        f"{path} holds no node identity; restore it from a backup, or remove it to become a new node "
        "(the cluster then sees another machine)",
    )
