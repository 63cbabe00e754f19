"""The node goes on where its machine doesn't: beats without measurements, a state that can't be written."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from skulk.bus.memory_bus import MemoryHub
from skulk.bus.subjects import MASTER_BEAT
from skulk.clock import SystemClock
from skulk.cluster.fold import state_hash
from skulk.cluster.merge import TOMBSTONE_S
from skulk.cluster.reconcile import Wanted
from skulk.errors import SkulkError, StartError, UnavailableError
from skulk.models.catalogue import Catalogue
from skulk.node.identity import load_identity
from skulk.node.measuring import MachineMeter
from skulk.node.processes import (
    HUGE_PAGES,
    SPINS_ALONE,
    SPINS_SHARED,
    TUNABLES,
    BusAddress,
    LocalMachine,
    environment_of,
)
from skulk.node.quarantine import Quarantine
from skulk.node.storage import StateFile, load_state
from skulk.settings import Settings
from skulk.wire.beats import MasterBeat
from skulk.wire.model import ModelFile
from tests.support.control_plane import FakeMachine, FakeNode, FrozenBus, running_node
from tests.support.gguf import write_model
from tests.support.states import TERM, assignment, instance, state_of


async def next_beat(node: FakeNode) -> float:
    """The moment of the next beat that is heard of the node."""
    before = node.replica.view.nodes[node.bus.name].heard_at
    assert await node.replica.wait_until(lambda view: view.nodes[node.bus.name].heard_at > before, 5.0)
    return node.replica.view.nodes[node.bus.name].heard_at


async def test_a_machine_that_cannot_be_measured_still_speaks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    machine = FakeMachine()
    async with running_node(tmp_path, machine=machine) as node:
        machine.measure_failure = OSError(24, "Too many open files")
        await next_beat(node)
        await next_beat(node)
        assert node.replica.view.nodes["aaaa"].beat.memory.total_bytes == machine.memory_bytes
        assert "Too many open files" in caplog.text


async def test_it_tells_whose_routes_are_closed(tmp_path: Path) -> None:
    closed: dict[str, float] = {}
    async with running_node(tmp_path, machine=FakeMachine(), closed=lambda: closed) as node:
        await next_beat(node)
        assert node.replica.view.nodes["aaaa"].beat.closed == {}
        closed["bbbb"] = node.bus.clock.now() - 1.0
        assert await node.replica.wait_until(lambda view: "bbbb" in view.nodes["aaaa"].beat.closed, 5.0)
        assert node.replica.view.nodes["aaaa"].beat.closed["bbbb"] >= 1.0


async def test_a_measurement_that_hangs_delays_no_beat(tmp_path: Path) -> None:
    machine = FakeMachine()
    async with running_node(tmp_path, machine=machine) as node:
        machine.measurable.clear()
        await next_beat(node)
        await next_beat(node)
        machine.memory_bytes //= 2
        machine.measurable.set()
        assert await node.replica.wait_until(
            lambda view: view.nodes["aaaa"].beat.memory.total_bytes == machine.memory_bytes, 5.0
        )


class DatedClock(SystemClock):
    """A clock whose date a test sets."""

    date = 1_000_000_000.0

    def wall(self) -> float:
        return self.date


async def test_without_a_master_for_thirty_days_a_node_runs_nothing_until_it_hears_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("skulk.bus.replica.SWEEP_S", 0.01)
    monkeypatch.setattr("skulk.bus.replica.MASTER_SILENT_S", 0.1)
    monkeypatch.setattr("skulk.node.node.NODE_BEAT_S", 0.05)
    state, clock, machine = state_of(instance(assigned=assignment())), DatedClock(), FakeMachine()
    bus = FrozenBus(MemoryHub(), cluster="test", name="aaaa", clock=clock)
    heard_at = clock.date - TOMBSTONE_S - 1.0
    file = StateFile(tmp_path)
    node = FakeNode(bus, file, "aaaa", machine, state=state, can_lead=False, master_heard_at=heard_at)
    await node.replica.start()
    task = asyncio.create_task(node.run(), name="fake-node")
    try:
        assert await node.replica.wait_until(lambda view: "aaaa" in view.nodes, 5.0)
        await next_beat(node)
        assert not machine.processes
        word = MasterBeat(node_id="bbbb", term=TERM, position=state.position, state_hash=state_hash(state), at=0.0)
        await bus.publish(MASTER_BEAT, word, node="bbbb")
        await asyncio.wait_for(machine.supervised.wait(), 5.0)
        (process,) = machine.processes.values()
        assert await node.replica.wait_until(lambda view: view.master is None, 5.0)
        clock.date += TOMBSTONE_S - 1.0
        await next_beat(node)
        await next_beat(node)
        assert not process.stopped.is_set(), "that is not yet thirty days"
        clock.date += 2.0
        await asyncio.wait_for(process.stopped.wait(), 5.0)
    finally:
        task.cancel()
        await asyncio.wait({task})
        await node.replica.close()
        await bus.close()


async def test_a_state_that_cannot_be_written_is_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("skulk.node.storage.RETRY_S", 0.01)
    failed, wrote, loop = asyncio.Event(), asyncio.Event(), asyncio.get_running_loop()
    is_broken = True

    def write(path: Path, body: bytes) -> None:
        if is_broken:
            loop.call_soon_threadsafe(failed.set)
            raise OSError(30, "Read-only file system", str(path))
        path.write_bytes(body)
        loop.call_soon_threadsafe(wrote.set)

    monkeypatch.setattr("skulk.node.storage.write_atomic", write)
    file = StateFile(tmp_path)
    task = asyncio.create_task(file.run(), name="state-file")
    try:
        file.offer(state_of(seq=7))
        await asyncio.wait_for(failed.wait(), 2.0)
        is_broken = False
        await asyncio.wait_for(wrote.wait(), 2.0)
    finally:
        task.cancel()
        await asyncio.wait({task})
    assert load_state(tmp_path, "test") == state_of(seq=7)
    assert "Read-only file system" in caplog.text


def test_files_that_cannot_be_read_are_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "state.json").mkdir()
    (tmp_path / "identity.json").mkdir()
    with pytest.raises(StartError, match="placements") as state:
        load_state(tmp_path, "test")
    with pytest.raises(StartError, match="identity") as identity:
        load_identity(tmp_path)
    assert state.value.code == identity.value.code == "home_not_writable"


def test_an_identity_that_cannot_be_written_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, body: bytes) -> None:
        del body
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr("skulk.node.identity.write_atomic", write)
    with pytest.raises(StartError, match="Read-only file system"):
        load_identity(tmp_path)


def test_text_that_is_no_utf8_is_damage_too(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_bytes(b'{"cluster":"\xff"}')
    assert load_state(tmp_path, "test") is None
    assert (tmp_path / "state.damaged.json").exists()
    (tmp_path / "identity.json").write_bytes(b'{"node_id":"\xff"}')
    with pytest.raises(StartError, match="no node identity"):
        load_identity(tmp_path)


def test_a_newer_versions_state_is_read(tmp_path: Path) -> None:
    body = msgspec.to_builtins(state_of(instance(assigned=assignment()), seq=7))
    body["a_new_field"] = {"x": 1}
    body["instances"]["i1"]["another"] = [1]
    (tmp_path / "state.json").write_bytes(msgspec.json.encode(body))
    state = load_state(tmp_path, "test")
    assert state is not None
    assert state.instances["i1"].assignment == assignment()


def machine_of(home: Path, catalogue: Catalogue, **changes: Any) -> LocalMachine:
    settings = msgspec.structs.replace(Settings(home=str(home), models_dir=str(home / "models")), **changes)
    meter = MachineMeter(
        SystemClock(), catalogue, models_dir=home, declared=("cpu",), limit_bytes=0, quarantine=Quarantine(home)
    )
    return LocalMachine(settings, "aaaa", BusAddress(url="nats://127.0.0.1:1"), catalogue, meter, None)


WANTED = Wanted(instance=instance(assigned=assignment()), assignment=assignment())


@pytest.mark.parametrize(
    ("n_threads", "runners", "spins"), [(0, 0, SPINS_ALONE), (0, 1, SPINS_SHARED), (8, 0, SPINS_SHARED)]
)
def test_only_threads_that_have_the_cores_to_themselves_wait_awake(n_threads: int, runners: int, spins: int) -> None:
    assert environment_of(n_threads, runners)["GOMP_SPINCOUNT"] == str(spins)


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ("", HUGE_PAGES),
        ("glibc.malloc.check=1", f"glibc.malloc.check=1:{HUGE_PAGES}"),
        ("glibc.malloc.hugetlb=0:glibc.malloc.check=1", "glibc.malloc.hugetlb=0:glibc.malloc.check=1"),
    ],
)
def test_a_runner_asks_for_huge_pages_unless_a_person_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, own: str, told: str
) -> None:
    monkeypatch.setenv(TUNABLES, own)
    assert environment_of(0, 0)[TUNABLES] == told


ALLOCATE = """
import ctypes, re
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
at = libc.malloc(ctypes.c_size_t(64 << 20))
for region in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", open("/proc/self/smaps").read()):
    if region and (lambda ends: int(ends[0], 16) <= at < int(ends[1], 16))(region.split()[0].split("-")):
        print("hg" in re.search(r"VmFlags:(.*)", region)[1].split())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one")
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
def test_large_memory_of_a_runner_is_marked_for_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    version = tuple(int(part) for part in platform.libc_ver()[1].split("."))
    monkeypatch.delenv(TUNABLES, raising=False)
    command = [sys.executable, "-c", ALLOCATE]
    environment = {**os.environ, **environment_of(0, 0)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == str(version >= (2, 35) and huge_pages() == "madvise")


def huge_pages() -> str:
    chosen = re.search(r"\[(\w+)\]", Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text())
    assert chosen is not None
    return chosen[1]


async def test_a_management_node_starts_nothing_that_an_old_state_gives_it(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "models", verified_file=tmp_path / "verified.json")
    with pytest.raises(UnavailableError, match="--no-worker"):
        await machine_of(tmp_path, catalogue, participation="management").prepare(WANTED)


async def test_weights_that_vanished_are_a_reason(tmp_path: Path) -> None:
    catalogue = Catalogue(tmp_path / "models", verified_file=tmp_path / "verified.json")
    with pytest.raises(SkulkError, match="org/model"):
        await machine_of(tmp_path, catalogue).prepare(WANTED)


async def test_a_check_that_is_not_needed_any_more_ends_its_thread(tmp_path: Path) -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    class SlowCatalogue:
        """Hashes until it is told that nobody waits."""

        def find(self, model_id: str) -> str:
            return model_id

        def verify(self, entry: str, on_block: Any) -> None:
            del entry
            begun.set()
            try:
                for _ in range(100):
                    go_on.wait(5.0)
                    on_block(1)
            except OSError:
                ended.set()
                raise

    machine = machine_of(tmp_path, cast("Catalogue", SlowCatalogue()))
    preparing = asyncio.create_task(machine.prepare(WANTED))
    assert await asyncio.to_thread(begun.wait, 2.0)
    preparing.cancel()
    await asyncio.wait({preparing})
    go_on.set()
    assert await asyncio.to_thread(ended.wait, 2.0)


async def test_other_bytes_under_the_same_name_are_not_loaded_for_a_placement_that_pins_them(tmp_path: Path) -> None:
    path = write_model(tmp_path / "models" / "org" / "model" / "model.gguf")
    catalogue = Catalogue(tmp_path / "models", verified_file=tmp_path / "verified.json")
    catalogue.rescan()
    pinned = ModelFile(name="model.gguf", size_bytes=path.stat().st_size, sha256="0" * 64)
    card = msgspec.structs.replace(WANTED.instance.request.card, files=(pinned,))
    request = msgspec.structs.replace(WANTED.instance.request, card=card)
    wanted = Wanted(instance=msgspec.structs.replace(WANTED.instance, request=request), assignment=WANTED.assignment)
    with pytest.raises(UnavailableError, match="the placement pins 0000") as caught:
        await machine_of(tmp_path, catalogue).prepare(wanted)
    assert caught.value.code == "refused_by_node"
    assert (await machine_of(tmp_path, catalogue).prepare(WANTED)).path == str(path)
