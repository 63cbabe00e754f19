"""The rule for usable memory as a table, and what is read from control groups and processes, on made-up trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from skulk.telemetry.cgroups import GroupMemory, memory_limits
from skulk.telemetry.memory import Ram, memory_facts, usable_bytes
from skulk.telemetry.processes import MemoryWatch, ProcessMemory, process_memory
from skulk.units import GIB, KIB, MIB
from skulk.wire.beats import Accelerator

CPU = ("llama_cpp", "llama_cpp-cpu")
VULKAN = ("llama_cpp", "llama_cpp-vulkan")
CUDA = ("llama_cpp", "llama_cpp-cuda")
METAL = ("llama_cpp", "llama_cpp-metal")


def gpu(vendor: str, vram_gib: float, used_gib: float = 0, gtt_gib: float = 0, gtt_used_gib: float = 0) -> Accelerator:
    return Accelerator(
        vendor=vendor,
        name=vendor,
        vram_total_bytes=int(vram_gib * GIB),
        vram_used_bytes=int(used_gib * GIB),
        gtt_total_bytes=int(gtt_gib * GIB),
        gtt_used_bytes=int(gtt_used_gib * GIB),
    )


STRIX = gpu("amd", 0.5, 0.25, gtt_gib=128)
RADEON = gpu("amd", 16, 1, gtt_gib=16)
GEFORCE = gpu("nvidia", 20, 1)


@pytest.mark.parametrize(
    ("case", "total", "available", "tags", "gpus", "expected_gib"),
    [
        ("CPU alone, plenty free", 32, 30, CPU, (), 24),
        ("CPU alone, little free", 32, 10, CPU, (), 10),
        ("Apple silicon", 64, 60, METAL, (Accelerator(vendor="apple", name="M"),), 48),
        ("discrete, empty", 64, 60, CUDA, (gpu("nvidia", 20),), 18),
        ("discrete, in use", 64, 60, CUDA, (gpu("nvidia", 20, 15),), 5),
        ("discrete AMD: its GTT is no reason to call it unified", 64, 60, VULKAN, (RADEON,), 14.4),
        ("two discrete", 64, 60, CUDA, (GEFORCE, GEFORCE), 36),
        ("Strix Halo", 124, 116, VULKAN, (STRIX,), 100.25),
        ("Strix Halo with little free memory", 124, 20, VULKAN, (STRIX,), 4.25),
        ("Strix Halo with less free than the reserve", 124, 8, VULKAN, (STRIX,), 0.25),
        ("unified with a small GTT left", 124, 116, VULKAN, (gpu("amd", 0.5, 0.5, 128, 100),), 28),
        ("GTT below RAM is no unified APU", 124, 116, VULKAN, (gpu("amd", 0.5, 0.25, gtt_gib=62),), 0.25),
        ("integrated beside discrete", 124, 116, VULKAN, (STRIX, RADEON), 14.4),
        ("GPU without an engine for it", 32, 30, CPU, (GEFORCE,), 24),
        ("GPU of another maker than the backend's", 32, 30, ("llama_cpp", "llama_cpp-rocm"), (GEFORCE,), 24),
        ("GPU backend without a GPU we know", 32, 30, VULKAN, (), 24),
    ],
)
def test_the_rule_by_machine(
    case: str, total: float, available: float, tags: tuple[str, ...], gpus: tuple[Accelerator, ...], expected_gib: float
) -> None:
    now = Ram(int(total * GIB), int(available * GIB))
    assert usable_bytes(now, tags, gpus) == pytest.approx(expected_gib * GIB, abs=2), case


def own(resident: float = 0, file: float = 0, device: float = 0) -> ProcessMemory:
    return ProcessMemory(resident_bytes=int(resident * GIB), file_bytes=int(file * GIB), device_bytes=int(device * GIB))


@pytest.mark.parametrize(
    ("case", "available", "limit", "taken", "expected_gib"),
    [
        ("the limit holds", 30, 8, own(), 8),
        ("a limit above the rule changes nothing", 30, 100, own(), 24),
        ("own runners use up the limit", 25, 8, own(resident=5), 3),
        ("own runners use up the share of the total", 28, 0, own(resident=4), 20),
        ("mapped weights are called available, but aren't", 10, 0, own(resident=6, file=4), 6),
        ("more than the limit is taken", 20, 4, own(resident=6), 0),
    ],
)
def test_what_own_runners_take_comes_off(
    case: str, available: float, limit: float, taken: ProcessMemory, expected_gib: float
) -> None:
    now = Ram(32 * GIB, int(available * GIB))
    assert usable_bytes(now, CPU, (), limit_bytes=int(limit * GIB), own=taken) == expected_gib * GIB, case


def test_own_runners_use_up_the_share_of_a_gpu() -> None:
    card = gpu("nvidia", 20, 10)
    assert usable_bytes(Ram(32 * GIB, 30 * GIB), CUDA, (card,), own=own(device=9)) == 9 * GIB


def put(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_no_control_groups_are_no_limits(tmp_path: Path) -> None:
    assert memory_limits(tmp_path) == ()


def test_version_2_limits_of_the_group_and_its_parents(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "0::/outer/inner\n")
    put(tmp_path, "sys/fs/cgroup/outer/memory.max", f"{8 * GIB}\n")
    put(tmp_path, "sys/fs/cgroup/outer/memory.current", f"{5 * GIB}\n")
    put(tmp_path, "sys/fs/cgroup/outer/memory.stat", f"anon {2 * GIB}\nfile {3 * GIB}\nshmem {GIB}\n")
    put(tmp_path, "sys/fs/cgroup/outer/inner/memory.max", "max\n")
    put(tmp_path, "sys/fs/cgroup/outer/inner/memory.current", f"{GIB}\n")
    assert memory_limits(tmp_path) == (GroupMemory(8 * GIB, 3 * GIB),)
    assert memory_limits(tmp_path)[0].available_bytes == 5 * GIB


def test_version_2_inside_a_container(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "0::/\n")
    put(tmp_path, "sys/fs/cgroup/memory.max", str(4 * GIB))
    put(tmp_path, "sys/fs/cgroup/memory.current", str(6 * GIB))
    (limit,) = memory_limits(tmp_path)
    assert limit.available_bytes == 0


def test_version_1_limits(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "5:cpuset:/\n4:memory:/box\n0::/\n")
    put(tmp_path, "sys/fs/cgroup/memory/box/memory.limit_in_bytes", str(2 * GIB))
    put(tmp_path, "sys/fs/cgroup/memory/box/memory.usage_in_bytes", str(GIB))
    put(tmp_path, "sys/fs/cgroup/memory/box/memory.stat", f"total_cache {512 * MIB}\ntotal_shmem 0\nodd line here\n")
    assert memory_limits(tmp_path) == (GroupMemory(2 * GIB, 512 * MIB),)


def test_a_tight_limit_is_what_counts(tmp_path: Path) -> None:
    put(tmp_path, "proc/self/cgroup", "0::/\n")
    put(tmp_path, "sys/fs/cgroup/memory.max", str(64 * MIB))
    put(tmp_path, "sys/fs/cgroup/memory.current", str(24 * MIB))
    facts = memory_facts(CPU, (), root=tmp_path)
    assert (facts.total_bytes, facts.available_bytes, facts.usable_bytes) == (64 * MIB, 40 * MIB, 40 * MIB)


def test_a_process_is_measured_by_its_share_of_what_it_shares(tmp_path: Path) -> None:
    put(
        tmp_path,
        "proc/42/smaps_rollup",
        "5581-7fff ---p 00000000 00:00 0  [rollup]\nRss:  9000 kB\nPss:  3000 kB\nPss_File:  1000 kB\n",
    )
    assert process_memory(42, tmp_path) == ProcessMemory(resident_bytes=3000 * KIB, file_bytes=1000 * KIB)


def test_a_process_s_gpu_memory_counts_once_a_client(tmp_path: Path) -> None:
    put(tmp_path, "proc/42/smaps_rollup", "Pss:  3000 kB\n")
    usage = "pos:\t0\ndrm-client-id:\t7\ndrm-memory-vram:\t2048 KiB\ndrm-memory-gtt: \t1024 KiB\n"
    put(tmp_path, "proc/42/fdinfo/3", usage)
    put(tmp_path, "proc/42/fdinfo/4", usage)
    put(tmp_path, "proc/42/fdinfo/5", usage.replace("7", "8"))
    put(tmp_path, "proc/42/fdinfo/6", "pos:\t0\n")
    assert process_memory(42, tmp_path).device_bytes == 2 * 3 * MIB


def test_without_the_kernel_s_sum_resident_memory_is_taken_and_a_gone_process_has_none(tmp_path: Path) -> None:
    assert process_memory(os.getpid(), tmp_path).resident_bytes > MIB
    assert process_memory(2**22 + 1, tmp_path) == ProcessMemory()


def test_a_watched_process_is_read_again_after_it_changed(tmp_path: Path) -> None:
    watch = MemoryWatch(tmp_path)

    def seen(pages: int, pss_kb: int, vram_kb: int) -> tuple[int, int]:
        put(tmp_path, "proc/42/statm", f"9000 {pages} 0 0 0 0 0\n")
        put(tmp_path, "proc/42/smaps_rollup", f"Pss:  {pss_kb} kB\n")
        put(tmp_path, "proc/42/fdinfo/3", f"drm-client-id:\t7\ndrm-memory-vram:\t{vram_kb} KiB\n")
        taken = watch.look((42,))[42]
        return taken.resident_bytes // KIB, taken.device_bytes // KIB

    assert seen(1000, 3000, 10) == (3000, 10)
    assert seen(1005, 3100, 20) == (3000, 20), "the same to a hundredth; what a GPU holds is always read"
    assert seen(1020, 3200, 20) == (3200, 20)
    assert seen(0, 3300, 20) == (3300, 20), "a kernel that doesn't tell"
    assert watch.look(()) == {}


def test_sums_of_processes() -> None:
    assert own(1, 0.5, 2) + own(2) == own(3, 0.5, 2)
    assert own(1, 0.5, 2).total_bytes == 3 * GIB
