"""How many threads llama.cpp should compute with: the physical cores that this process may really use."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_OWN_TASKS = Path("/proc/self/task")


def physical_cores(cpus_dir: Path = _CPUS, quota_file: Path = _CGROUP_QUOTA) -> int:
    """Physical cores within this process' affinity and its container's quota; at least 1.

    A second thread of the same core adds nothing to matrix multiplication, and threads beyond what the kernel
    grants wait for each other at every barrier.
    """
    allowed = _allowed_cpus()
    if allowed is None:
        return max(1, psutil.cpu_count(logical=False) or os.cpu_count() or 1)
    cores = {_core_of(cpus_dir, cpu) for cpu in allowed}
    return max(1, min(len(cores), _quota(quota_file) or len(cores)))


def waited_s(tasks: Path = _OWN_TASKS) -> float:
    """Seconds that this process' threads have waited for a processor, all of them together; 0 where nothing tells."""
    total = 0
    try:
        for task in tasks.iterdir():
            total += int((task / "schedstat").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return total / 1e9


def _allowed_cpus() -> set[int] | None:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return None


def _core_of(cpus_dir: Path, cpu: int) -> tuple[str, str]:
    """What tells a core from others: package and core number; where the kernel doesn't say, the CPU itself."""
    topology = cpus_dir / f"cpu{cpu}" / "topology"
    try:
        return (topology / "physical_package_id").read_text().strip(), (topology / "core_id").read_text().strip()
    except OSError:
        return "cpu", str(cpu)


def _quota(quota_file: Path) -> int | None:
    """Whole CPUs that a cgroup grants; None: no limit (``max 100000``) or no such file."""
    try:
        granted, period = quota_file.read_text().split()[:2]
        return max(1, math.ceil(int(granted) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return None
