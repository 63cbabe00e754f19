"""Loading: what can be wrong with a file or a machine, each with its sentence, and nothing left behind."""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from skulk.engines.llama_cpp import loader
from skulk.engines.llama_cpp.loader import load
from skulk.engines.llama_cpp.native import library
from skulk.engines.llama_cpp.probe import Probe, computes_of, probe
from skulk.engines.protocol import LoadCancelled
from skulk.engines.registry import loader_for
from skulk.errors import RequestError, ServiceError, StartError
from tests.support.engines import small_spec
from tests.support.gguf import TENSORS, embedded_model, gguf_bytes, llama_metadata, with_metadata
from tools.make_model import write_model


def refusal(path: Path, **changes: object) -> str:
    with pytest.raises(RequestError) as caught:
        load(small_spec(path, **changes), lambda _: True)
    assert caught.value.code == "model_file_invalid"
    assert str(path) in caught.value.detail
    return caught.value.detail


def cut(length: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with embedded_model().open("rb") as file:
            path.write_bytes(file.read(length))

    return write


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (cut(50_000_000), "cut short: it has 50,000,000 bytes"),
        (cut(500_000), "cut short: it has 500,000 bytes"),
        (cut(30), "cut short"),
        (cut(0), "not a GGUF"),
        (lambda path: path.write_bytes(b"<!DOCTYPE html>" * 99), "starts with b'<!DO'"),
        (lambda path: path.write_bytes(gguf_bytes(llama_metadata(), TENSORS)), "llama.cpp can't load"),
        (
            lambda path: path.write_bytes(gguf_bytes(llama_metadata(general__architecture="lxxma"), TENSORS)),
            "architecture 'lxxma', which the installed engine doesn't know (llama-cpp-python ",
        ),
        (lambda path: path.mkdir(), "can't be read"),
        (lambda path: None, "can't be read: No such file"),
    ],
)
def test_bad_files_have_their_sentence(tmp_path: Path, write: Callable[[Path], object], says: str) -> None:
    path = tmp_path / "bad.gguf"
    write(path)
    assert says in refusal(path)


def test_a_wrong_hash_is_found_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_load_model", lambda *_: pytest.fail("loaded"))
    says = refusal(embedded_model(), sha256="0" * 64)
    assert hashlib.sha256(embedded_model().read_bytes()).hexdigest() in says and "0" * 64 in says


def test_the_right_hash_loads_and_progress_is_told() -> None:
    told: list[float] = []
    digest = hashlib.sha256(embedded_model().read_bytes()).hexdigest()
    engine = load(small_spec(sha256=digest.upper()), lambda done: not told.append(done))
    engine.close()
    engine.close()
    assert told[0] == 0.0 and told[-1] == 1.0 and told == sorted(told)


@pytest.mark.parametrize("stop_at", [0.0, 0.3, 1.0])
def test_a_load_can_be_stopped_at_any_time(stop_at: float) -> None:
    with pytest.raises(LoadCancelled):
        load(small_spec(sha256="0" * 64 if stop_at == 0 else None), lambda done: done < stop_at)


def test_an_exception_of_the_progress_callback_comes_out() -> None:
    def progress(done: float) -> bool:
        raise KeyError(done)

    with pytest.raises(KeyError):
        load(small_spec(), progress)


def grants_any_memory() -> bool:
    """Whether the kernel promises memory that it doesn't have; then only touching it would tell."""
    setting = Path("/proc/sys/vm/overcommit_memory")
    return setting.exists() and setting.read_text().strip() == "1"


@pytest.mark.skipif(grants_any_memory(), reason="this kernel grants any allocation")
def test_a_context_that_cannot_be_allocated_has_numbers() -> None:
    cells = 2**24
    with pytest.raises(ServiceError, match="16,777,216 cells for 2 sequences with a f32 cache") as caught:
        load(small_spec(context_length=cells // 2, kv_cells=cells, kv_type="f32"), lambda _: True)
    assert caught.value.code == "runner_failed" and "shorter context" in caught.value.detail


def test_an_unknown_cache_type_is_a_setting_at_fault() -> None:
    with pytest.raises(StartError, match="SKULK_LLAMA_CPP_KV_TYPE"):
        load(small_spec(kv_type="q3"), lambda _: True)


def test_a_quantized_cache_works() -> None:
    engine = load(small_spec(kv_type="q8_0"), lambda _: True)
    engine.close()


def test_a_quantized_cache_without_flash_attention_is_a_setting_at_fault() -> None:
    with pytest.raises(StartError, match="SKULK_LLAMA_CPP_FLASH_ATTN") as caught:
        load(small_spec(kv_type="q8_0", flash_attention="off"), lambda _: True)
    assert caught.value.code == "config_invalid", "no restart mends it"


@pytest.mark.parametrize(("n_parallel", "is_known"), [(2, True), (1, False)])
def test_what_an_idle_cell_costs_is_measured_where_sequences_share_cells(n_parallel: int, is_known: bool) -> None:
    engine = load(small_spec(n_parallel=n_parallel, context_length=1024, kv_cells=1024), lambda _: True)
    info = engine.info
    engine.close()
    assert info.is_unified and (info.cell_s > 0.0) is is_known


@pytest.mark.skipif(probe().computes[0] != "cpu", reason="this machine has a GPU that llama.cpp can use")
def test_a_backend_that_is_not_there_says_what_is() -> None:
    with pytest.raises(StartError, match="no vulkan device on this machine \\(it has: CPU\\)") as caught:
        load(small_spec(backend="llama_cpp-vulkan"), lambda _: True)
    assert caught.value.code == "engine_missing" and "SKULK_LLAMA_CPP_BACKENDS" in caught.value.detail


def test_an_encoder_is_no_generator(tmp_path: Path) -> None:
    """A header alone suffices: llama.cpp refuses it, or we do; either way it is the file that is named."""
    path = tmp_path / "bert.gguf"
    path.write_bytes(gguf_bytes(llama_metadata(general__architecture="clip"), TENSORS))
    assert refusal(path)


@pytest.mark.parametrize("how", ["missing", "broken"])
def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    real = library.__wrapped__

    def fail(name: str) -> object:
        if how == "missing":
            raise ModuleNotFoundError(f"No module named {name!r}")
        raise RuntimeError("Failed to load shared library 'libllama.so': libcuda.so.1: cannot open")

    monkeypatch.setattr("skulk.engines.llama_cpp.native.importlib.import_module", fail)
    with pytest.raises(StartError, match="pip install 'llama-cpp-python") as caught:
        real()
    assert caught.value.code == "engine_missing"
    assert ("libcuda" in caught.value.detail) == (how == "broken")


def test_llama_cpps_log_is_ours(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.gguf"
    cut(500_000)(path)
    with caplog.at_level(logging.DEBUG, logger="skulk.engines.llama_cpp.native"):
        refusal(path)
    lines = [record.getMessage() for record in caplog.records if record.name == "skulk.engines.llama_cpp.native"]
    assert any("failed to read key-value pairs" in line for line in lines)
    assert all("\n" not in line for line in lines)
    assert capfd.readouterr().err == "", "nothing goes to stderr past the log"


def test_the_loader_of_the_tag_is_this_one() -> None:
    assert loader_for("llama_cpp-cpu") is load and loader_for("llama_cpp-vulkan") is load


def test_a_renamed_model_keeps_its_weights(tmp_path: Path) -> None:
    """The test's own writer: a rewritten header leads to the same tensors."""
    path = with_metadata(embedded_model(), tmp_path / "copy.gguf", {"general.name": "x" * 1000})
    engine = load(small_spec(path), lambda _: True)
    engine.close()


class TestProbe:
    def test_as_a_program_it_prints_json(self) -> None:
        command = [sys.executable, "-m", "skulk.engines.llama_cpp.probe"]
        done = subprocess.run(command, capture_output=True, timeout=120, check=True, cwd=Path(__file__).parents[2])
        found = msgspec.json.decode(done.stdout, type=Probe)
        assert found.installed and found.computes[-1] == "cpu" and found.cores >= 1
        assert found.gpu_offload == bool(library().llama_supports_gpu_offload())
        assert {device.registry for device in found.devices} >= {"CPU"}

    def test_computes_come_from_devices(self) -> None:
        device = probe().devices[0]
        gpu = msgspec.structs.replace(device, registry="Vulkan")
        both = (device, gpu, msgspec.structs.replace(device, registry="ROCm"))
        assert computes_of(both) == ("vulkan", "rocm", "cpu")
        assert computes_of(()) == ("cpu",)

    def test_a_missing_library_is_a_finding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing() -> object:
            raise StartError("engine_missing", "install it")

        monkeypatch.setattr(sys.modules[probe.__module__], "library", missing)
        found = probe()
        assert not found.installed and found.problem == "install it" and found.computes == ()


@pytest.mark.skipif(b"REPACK = 1" not in library().llama_print_system_info(), reason="this build repacks no weights")
def test_a_build_that_would_crash_in_its_tiles_loads_without_repacked_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_model(tmp_path / "q.gguf", quantization="Q4_0")

    def is_repacked(can_use_tiles: bool) -> bool:
        monkeypatch.setattr(loader, "can_use_tiles", lambda: can_use_tiles)
        caplog.clear()
        with caplog.at_level(logging.DEBUG):
            load(small_spec(model), lambda _: True).close()
        buffers = [record.message for record in caplog.records if "model buffer size" in record.message]
        assert buffers, "llama.cpp no longer tells where the weights are"
        return any("REPACK" in line or "AMX" in line for line in buffers)

    assert [is_repacked(True), is_repacked(False)] == [True, False]
