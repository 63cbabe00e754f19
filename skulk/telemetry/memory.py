"""How much memory models may still take here: one rule for each kind of machine.

    pool                                     usable
    CPU alone, Apple silicon                 min(available, 0.75 x total)
    discrete GPUs                            sum of min(free, 0.90 x VRAM); beside it main memory, as above, for the CPU
    APU with unified memory (Strix Halo):    VRAM free + min(max(0, RAM available - 16 GiB), GTT free)
      GTT > VRAM and GTT >= RAM

Then at most ``SKULK_MEMORY_LIMIT``. What our own runners take already is part of every share and of the limit, so it
comes off these; ``available`` and ``free`` lack it by themselves, save for weights mapped from files, which the
kernel goes on calling available. Which pool counts is decided by the advertised backends: a GPU that the engine can't
use is no memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

import psutil

from skulk.telemetry.cgroups import memory_limits
from skulk.telemetry.processes import NOTHING, ProcessMemory
from skulk.units import GIB
from skulk.wire.beats import Accelerator, MemoryFacts

ROOT: Final = Path("/")
UNIFIED_RESERVE: Final = 16 * GIB
"""Main memory that an APU's models leave to everything else."""
_VENDORS: Final[dict[str, frozenset[str]]] = {
    "vulkan": frozenset({"amd", "nvidia"}),
    "rocm": frozenset({"amd"}),
    "cuda": frozenset({"nvidia"}),
}


class Ram(NamedTuple):
    """Main memory in bytes, as far as this process may use it."""

    total_bytes: int
    available_bytes: int


def ram(root: Path = ROOT) -> Ram:
    """Main memory within the limits of the control groups."""
    machine = psutil.virtual_memory()
    groups = memory_limits(root)
    return Ram(
        total_bytes=min(machine.total, *(group.limit_bytes for group in groups), machine.total),
        available_bytes=min(machine.available, *(group.available_bytes for group in groups), machine.available),
    )


def memory_facts(
    tags: tuple[str, ...],
    accelerators: tuple[Accelerator, ...],
    *,
    limit_bytes: int = 0,
    own: Iterable[ProcessMemory] = (),
    root: Path = ROOT,
) -> MemoryFacts:
    """Memory now.

    Args:
        tags: the advertised backends.
        accelerators: the GPUs, read just now.
        limit_bytes: ``SKULK_MEMORY_LIMIT``; 0: none.
        own: what each of the node's runners takes, read just now; what their statuses in the same beat say.
        root: where ``/proc`` and ``/sys`` hang; another one in tests.
    """
    now = ram(root)
    taken = sum(own, NOTHING)
    return MemoryFacts(
        total_bytes=now.total_bytes,
        available_bytes=now.available_bytes,
        usable_bytes=usable_bytes(now, tags, accelerators, limit_bytes=limit_bytes, own=taken),
        cpu_usable_bytes=cpu_usable_bytes(now, tags, accelerators, limit_bytes=limit_bytes, own=taken),
    )


def usable_bytes(
    now: Ram,
    tags: tuple[str, ...],
    accelerators: tuple[Accelerator, ...],
    *,
    limit_bytes: int = 0,
    own: ProcessMemory = NOTHING,
) -> int:
    """The module's rule; pure. Bytes, never negative."""
    gpus = tuple(gpu for gpu in accelerators if gpu.vram_total_bytes and _is_usable(gpu, tags))
    discrete = tuple(gpu for gpu in gpus if not is_unified(gpu, now))
    if discrete:  # llama.cpp leaves an integrated GPU alone beside a discrete one
        usable = _discrete(discrete, own)
    elif gpus:
        usable = sum(_unified(gpu, now.available_bytes - own.file_bytes) for gpu in gpus[:1])
    else:
        usable = _main(now, own)
    if limit_bytes:
        usable = min(usable, limit_bytes - own.total_bytes)
    return max(0, usable)


def cpu_usable_bytes(
    now: Ram,
    tags: tuple[str, ...],
    accelerators: tuple[Accelerator, ...],
    *,
    limit_bytes: int = 0,
    own: ProcessMemory = NOTHING,
) -> int | None:
    """Main memory for backends on the CPU, where a discrete GPU has a pool of its own; None: there is one pool."""
    gpus = (gpu for gpu in accelerators if gpu.vram_total_bytes and _is_usable(gpu, tags))
    if all(is_unified(gpu, now) for gpu in gpus):
        return None
    usable = _main(now, own)
    if limit_bytes:
        usable = min(usable, limit_bytes - own.total_bytes)
    return max(0, usable)


def _main(now: Ram, own: ProcessMemory) -> int:
    return min(now.available_bytes - own.file_bytes, now.total_bytes * 3 // 4 - own.resident_bytes)


def is_unified(gpu: Accelerator, now: Ram) -> bool:
    """Whether a GPU is an APU's that computes in main memory."""
    return gpu.gtt_total_bytes > gpu.vram_total_bytes and gpu.gtt_total_bytes >= now.total_bytes


def _is_usable(gpu: Accelerator, tags: tuple[str, ...]) -> bool:
    computes = {tag.partition("-")[2] for tag in tags}
    return any(gpu.vendor in _VENDORS.get(compute, ()) for compute in computes)


def _discrete(gpus: tuple[Accelerator, ...], own: ProcessMemory) -> int:
    free = sum(max(0, gpu.vram_total_bytes - gpu.vram_used_bytes) for gpu in gpus)
    share = sum(gpu.vram_total_bytes * 9 // 10 for gpu in gpus)
    return min(free, share - own.device_bytes)


def _unified(gpu: Accelerator, available: int) -> int:
    vram_free = max(0, gpu.vram_total_bytes - gpu.vram_used_bytes)
    gtt_free = max(0, gpu.gtt_total_bytes - gpu.gtt_used_bytes)
    return vram_free + min(max(0, available - UNIFIED_RESERVE), gtt_free)
