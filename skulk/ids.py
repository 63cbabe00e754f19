"""Names of things: how ids are made, derived and checked. An id never holds a dot: it is a subject token."""

from __future__ import annotations

import hashlib
import re
import secrets
import uuid
from typing import Final, NamedTuple

TOKEN: Final = re.compile(r"[a-z0-9_-]+")
_ENSURED: Final = uuid.UUID("5f3b9a3e-6f0a-5d0e-9b7a-7f6f0c2d1e55")
_COMMANDED: Final = uuid.UUID("b1d2c7c4-9f0e-5a53-8a77-3c1c5a0e6d21")


def is_token(text: str) -> bool:
    """Whether ``text`` may stand as one token of a subject."""
    return TOKEN.fullmatch(text) is not None


def new_node_id() -> str:
    """A node's identity, made once and kept in its home folder: 16 hexadecimal digits."""
    return secrets.token_hex(8)


def new_incarnation() -> str:
    """One life of a process: 8 hexadecimal digits, new at every start."""
    return secrets.token_hex(4)


def new_id() -> str:
    """An id of an instance, a command or a request: a random UUID in its usual form."""
    return str(uuid.uuid4())


def ensured_instance_id(model_id: str) -> str:
    """The instance id of "at least one instance of this model", the same on every node."""
    return str(uuid.uuid5(_ENSURED, model_id))


def commanded_instance_id(command_id: str) -> str:
    """The instance id of what a command places: a command that is repeated to another master makes no second one."""
    return str(uuid.uuid5(_COMMANDED, command_id))


def is_commanded(instance_id: str, command_id: str) -> bool:
    """Whether an instance has its id from this command: then nothing else ever has it."""
    return instance_id == commanded_instance_id(command_id)


def runner_id(instance_id: str, epoch: int) -> str:
    """The runner that serves one assignment of an instance."""
    assert epoch > 0
    return f"{instance_id}-{epoch}"


class RunnerName(NamedTuple):
    """The parts of a runner id."""

    instance_id: str
    epoch: int


def parse_runner_id(runner: str) -> RunnerName:
    """The instance and the epoch that a runner id names.

    Raises:
        ValueError: the text is no runner id.
    """
    instance_id, _, epoch = runner.rpartition("-")
    if not instance_id or not epoch.isdecimal():
        raise ValueError(f"{runner!r} is no runner id (<instance>-<epoch>)")
    return RunnerName(instance_id, int(epoch))


def digest64(body: bytes) -> str:
    """A 64-bit digest for comparing states, as 16 hexadecimal digits; not for security."""
    return hashlib.blake2b(body, digest_size=8).hexdigest()
