"""Telemetry of the machine that runs the test, and programs that misbehave when asked."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import psutil
import pytest

from skulk.telemetry import (
    accelerators,
    disk_facts,
    load_average,
    memory_facts,
    probe_engine,
    process_memory,
    system_facts,
    tags_of,
)
from skulk.telemetry.children import MAX_OUTPUT, ask
from skulk.telemetry.gpus import nvidia
from skulk.telemetry.host import physical_cores
from skulk.units import MIB

PROBE = (sys.executable, "-m", "skulk.engines.llama_cpp.probe")


def test_the_facts_of_this_machine_hold_together(tmp_path: Path) -> None:
    facts = system_facts()
    assert facts.hostname
    assert facts.os
    assert facts.architecture
    assert 1 <= facts.physical_cores <= (os.cpu_count() or 1)
    memory = memory_facts(("llama_cpp", "llama_cpp-cpu"), ())
    assert 0 < memory.usable_bytes <= memory.available_bytes <= memory.total_bytes <= psutil.virtual_memory().total
    disk = disk_facts(tmp_path / "not" / "there" / "yet")
    assert 0 < disk.available_bytes <= disk.total_bytes
    assert load_average() >= 0


async def test_the_gpus_of_this_machine_have_names() -> None:
    for gpu in await accelerators():
        assert gpu.vendor in ("amd", "nvidia", "apple")
        assert gpu.name


def test_cores_without_topology_are_counted_by_thread(tmp_path: Path) -> None:
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("macOS has no affinity")
    assert physical_cores(tmp_path) == len(os.sched_getaffinity(0))


def test_memory_that_this_process_takes_is_seen() -> None:
    before = process_memory(os.getpid()).resident_bytes
    block = bytearray(os.urandom(1) * (64 * MIB))
    grown = process_memory(os.getpid()).resident_bytes - before
    assert grown > 60 * MIB
    assert len(block) == 64 * MIB


async def test_the_installed_engine_is_probed_for_real() -> None:
    probe = await probe_engine(PROBE)
    assert probe.installed, probe.problem
    assert "cpu" in probe.computes
    assert probe.package_version
    tags, warnings = tags_of(("cpu",), probe)
    assert tags == ("llama_cpp", "llama_cpp-cpu")
    assert warnings == ()
    if not probe.gpu_offload:
        assert tags_of(("vulkan",), probe).tags == tags


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("print('no json')", "printed no findings"),
        ("import sys; sys.exit('out of luck')", "ended with status 1: out of luck"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "was ended by SIGSEGV"),
        ("", "printed no findings"),
    ],
)
async def test_a_probe_that_fails_offers_nothing_and_says_why(code: str, problem: str) -> None:
    probe = await probe_engine((sys.executable, "-c", code))
    tags, (warning,) = tags_of((), probe)
    assert tags == ()
    assert problem in warning.message


async def test_a_missing_program_is_a_problem() -> None:
    answer = await ask(("/nowhere/at-all",), timeout_s=5)
    assert answer.problem == "/nowhere/at-all can't be started: No such file or directory"


async def test_a_program_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    os.mkfifo(pids)
    code = (
        "import os, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(600)\n"
    )
    asked = asyncio.create_task(ask((sys.executable, "-c", code), timeout_s=3))
    started = [int(pid) for pid in (await asyncio.to_thread(pids.read_text)).split()]
    answer = await asked
    assert answer.problem.endswith("didn't end within 3 s")
    _, alive = await asyncio.to_thread(psutil.wait_procs, [p for p in map(_process, started) if p], timeout=10)
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


async def test_a_program_that_floods_is_cut_off() -> None:
    code = "import sys\nwhile True: sys.stdout.write('x' * 65536)"
    answer = await ask((sys.executable, "-c", code), timeout_s=30)
    assert answer.problem.endswith(f"said more than {MAX_OUTPUT} bytes")


async def test_cancelling_ends_the_program(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    os.mkfifo(ready)
    code = f"import os, time; open({str(ready)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    asked = asyncio.create_task(ask((sys.executable, "-c", code), timeout_s=60))
    pid = int(await asyncio.to_thread(ready.read_text))
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert not psutil.pid_exists(pid)


async def test_nvidia_smi_is_asked_for_real(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho \"$1\" | grep -q memory.total && echo 'NVIDIA X, 1000, 10'\n")
    program.chmod(0o755)
    (gpu,) = await nvidia(str(program))
    assert gpu.vram_total_bytes == 1000 * MIB


async def test_an_nvidia_smi_that_fails_is_no_gpu(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA X, 1000, 10'\nexit 9\n")
    program.chmod(0o755)
    assert await nvidia(str(program)) == ()
