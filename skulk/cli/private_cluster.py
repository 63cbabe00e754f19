"""A node of one's own for one command: on loopback, free ports, a temporary home, gone with the command.

this command                              skulk up --local --place MODEL  (its own session)
  ── holds its stdin open ──────────────────>  ends when that closes, however this command ends
  <── announces the API's address ───────────
  ── stdin closed, TERM, KILL ──────────────>  `Child.stop`
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from skulk.cli.context import note
from skulk.errors import SkulkError, StartError
from skulk.files import write_atomic
from skulk.settings import Settings
from skulk.settings_load import CONFIG_NAME, toml_of
from skulk.settings_options import OPTIONS
from skulk.supervision.child import Child, ChildSpec, ExitReport

START_TIMEOUT_S: Final = 60.0
SHOWN_LINES: Final = 15
# Failures that its log explains better than their sentence.
_ITS_FAULT: Final = ("child_failed", "runner_failed", "stream_lost", "cluster_not_reached", "internal")
# What makes the user's node that node, and not another on the same machine.
_OWN: Final = (
    *("home", "cluster", "api", "api_url", "api_host", "api_port", "nats_port", "route_port", "files_port", "nats_url"),
    *("local", "mdns", "bootstrap_peers", "route_advertise", "participation", "place", "log_format", "events_stream"),
    *("cluster_token", "tls_cert", "tls_key", "tls_ca", "api_keys", "allowed_hosts"),
)
INHERITED: Final = tuple(option.field for option in OPTIONS if option.field not in _OWN)


@asynccontextmanager
async def private_cluster(
    settings: Settings, environ: Mapping[str, str], model_id: str, program: tuple[str, ...]
) -> AsyncGenerator[str]:
    """Starts a private node that places ``model_id``; yields the address of its API; leaves no process and no file.

    Args:
        settings: what the private node takes over: folders of models, the engine's and the hub's settings.
        environ: ours; its ``SKULK_*`` variables are kept from the private node.
        model_id: what it places.
        program: how ``skulk`` is started.

    Raises:
        StartError: the node's own, or ``child_failed``; the end of its log is shown on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="skulk-private-", ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        write_atomic(home / CONFIG_NAME, toml_of(settings, INHERITED).encode(), fsync=False)
        child = Child(_spec(home, environ, model_id, program))
        is_its_fault = False
        try:
            ready = await child.start()
            yield _address(ready.fields)
        except SkulkError as error:
            is_its_fault = error.code in _ITS_FAULT
            raise
        finally:
            if child.pid is not None:
                report = await child.stop()
                if is_its_fault:
                    _show_log(report)


def _spec(home: Path, environ: Mapping[str, str], model_id: str, program: tuple[str, ...]) -> ChildSpec:
    ports = [word for name in ("api", "nats", "route") for word in (f"--{name}-port", "0")]
    return ChildSpec(
        name="the private node",
        argv=(*program, "up", "--local", "--home", str(home), *ports, "--place", model_id),
        # An empty variable counts as one that isn't set.
        env={name: "" for name in environ if name.startswith("SKULK_")},
        stdin=b"",
        ready_timeout_s=START_TIMEOUT_S,
    )


def _address(fields: Mapping[str, object]) -> str:
    url = fields.get("api_url")
    if not isinstance(url, str) or not url:
        raise StartError("child_failed", "The private node didn't tell the address of its API.")
    return url


def _show_log(report: ExitReport) -> None:
    for line in report.last_lines[-SHOWN_LINES:]:
        note(f"log of the private node: {line}")
