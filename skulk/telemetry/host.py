"""Processor, disk and load of this machine."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from pathlib import Path
from typing import Final

import psutil

from skulk.wire.beats import Accelerator, DiskFacts, SystemFacts

ROOT: Final = Path("/")


def system_facts(accelerators: tuple[Accelerator, ...] = (), root: Path = ROOT) -> SystemFacts:
    """What this machine is; it doesn't change while it runs, save for the GPUs' use."""
    return SystemFacts(
        hostname=socket.gethostname(),
        os=_os_name(),
        architecture=platform.machine(),
        chip=_chip(root, accelerators),
        physical_cores=physical_cores(root),
        accelerators=accelerators,
    )


def physical_cores(root: Path = ROOT) -> int:
    """Cores that this process may use: two threads of one core count once, cores outside its affinity not at all."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # macOS has no affinity
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    cores = {_core_of(root, thread) for thread in allowed}
    return max(1, len(cores))


def _core_of(root: Path, thread: int) -> tuple[str, str]:
    topology = root / f"sys/devices/system/cpu/cpu{thread}/topology"
    try:
        return (topology / "physical_package_id").read_text().strip(), (topology / "core_id").read_text().strip()
    except OSError:
        return "", f"thread {thread}"


def load_average() -> float:
    """The one-minute load average; 0.0 where the system has none."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return 0.0


def disk_facts(folder: Path) -> DiskFacts:
    """The disk that holds, or would hold, a folder; zeros where nothing can be told."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if existing is None:
        return DiskFacts(total_bytes=0, available_bytes=0)
    try:
        usage = shutil.disk_usage(existing)
    except OSError:
        return DiskFacts(total_bytes=0, available_bytes=0)
    return DiskFacts(total_bytes=usage.total, available_bytes=usage.free)


def _os_name() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return f"{platform.system()} {platform.release()}"


def _chip(root: Path, accelerators: tuple[Accelerator, ...]) -> str:
    apple = next((one.name for one in accelerators if one.vendor == "apple"), None)
    if apple is not None:
        return apple
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
