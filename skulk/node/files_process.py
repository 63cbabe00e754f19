"""The process that serves weights to neighbours: apart from the launcher, so that a slow disk delays no heartbeat."""

from __future__ import annotations

import asyncio
import logging
import signal
from pathlib import Path
from typing import Literal

import msgspec

from skulk.errors import ServiceError, SkulkError, StartError
from skulk.logs import configure_logging
from skulk.models.catalogue import Catalogue
from skulk.models.file_server import FileServer
from skulk.models.listening import listening
from skulk.supervision.ready import announce_error, announce_ready, parent_gone, read_spec
from skulk.wire.base import decode

log = logging.getLogger("skulk.files")


class FilesSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A files server's whole instruction: where to listen, what callers must show, where weights lie."""

    host: str
    port: int
    models_dir: str
    verified_file: str
    credential: str = ""
    models_path: tuple[str, ...] = ()
    card_dirs: tuple[str, ...] = ()
    ollama_dir: str = ""
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def main() -> int:
    """Serves until it is told to leave; returns the exit status."""
    try:
        spec = decode(read_spec(), FilesSpec)
        configure_logging(
            spec.log_format, spec.log_level, "files", secrets=(spec.credential,) if spec.credential else ()
        )
        asyncio.run(serve(spec))
    except SkulkError as error:
        refused = error if not isinstance(error, ServiceError) else StartError("config_invalid", error.detail)
        announce_error(refused)
        log.error("%s", refused)
        return refused.exit_status
    return 0


async def serve(spec: FilesSpec) -> None:
    """Listens and serves until SIGTERM, SIGINT or the parent's end.

    Raises:
        StartError: ``port_in_use``, ``config_invalid``.
    """
    catalogue = Catalogue(
        Path(spec.models_dir),
        tuple(Path(folder) for folder in spec.models_path),
        verified_file=Path(spec.verified_file),
        card_dirs=tuple(Path(folder) for folder in spec.card_dirs),
        ollama_dir=Path(spec.ollama_dir) if spec.ollama_dir else None,
    )
    async with listening(FileServer(catalogue, spec.credential).app(), spec.host, spec.port) as (host, port):
        await asyncio.to_thread(catalogue.rescan)
        announce_ready({"host": host, "port": port})
        leave = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, leave.set)
        waits = [asyncio.create_task(leave.wait()), asyncio.create_task(parent_gone())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
