"""A GPU build of llama-cpp-python survives every set-up and sync, shown with stand-in builds; the wheel cache holds.

The stand-ins are wheels of a few lines that answer as the real bindings do. Each test works in a copy of the clone.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import amx_flags
import engine_guard
import engine_wheel
import lock_entries
import pytest

from skulk.engines.llama_cpp import amx

ROOT = Path(__file__).resolve().parents[2]
LOCKED = next(entry for entry in lock_entries.read_lock(ROOT / "requirements.lock") if entry.name == "llama-cpp-python")
CLONE = ["pyproject.toml", "requirements.lock", "README.md", "LICENSE", "MANIFEST.in", "skulk", "tools"]
TIMEOUT_S = 100
SAME, OTHER, LOCAL = LOCKED.version, "0.3.30", "0.3.99+vulkan"
ASK = "import llama_cpp as l; print(l.__version__, l.llama_supports_gpu_offload())"


class Clone(NamedTuple):
    """A copy of the project with an environment that holds nothing yet."""

    root: Path
    uv: str

    @property
    def environment(self) -> Path:
        return self.root / ".venv"

    def run(self, *command: str) -> str:
        """Run a command in the copy; gives everything it printed."""
        names = ("VIRTUAL_ENV", "UV_PROJECT_ENVIRONMENT", "PYTHONPATH", "XDG_CACHE_HOME")
        kept = {name: value for name, value in os.environ.items() if name not in names}
        path = f"{Path(self.uv).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            command,
            cwd=self.root,
            env=kept | {"XDG_CACHE_HOME": str(self.root / "cache"), "PATH": path} | uv_cache(self.uv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def python(self, code: str) -> str:
        return self.run(str(self.environment / "bin" / "python"), "-I", "-c", code).strip()

    def install(self, wheel: Path) -> None:
        self.run(self.uv, "pip", "install", "--quiet", "--no-deps", "--reinstall", str(wheel))

    def set_up(self) -> str:
        return self.run(sys.executable, "tools/setup_env.py")


@cache
def uv_cache(uv: str) -> dict[str, str]:
    """uv keeps its usual cache although the copies have a cache folder of their own."""
    done = subprocess.run([uv, "cache", "dir"], check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    return {"UV_CACHE_DIR": done.stdout.strip()}


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = Path(sys.executable).with_name("uv")
    if found.exists():
        return str(found)
    if elsewhere := shutil.which("uv"):
        return elsewhere
    environment = tmp_path_factory.mktemp("uv")
    subprocess.run([sys.executable, "-m", "venv", environment], check=True, timeout=TIMEOUT_S)
    pip = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "uv"]
    if subprocess.run(pip, timeout=TIMEOUT_S).returncode != 0:
        pytest.skip("uv is not installed and pip could not bring it")
    return str(environment / "bin" / "uv")


def copy_of_the_clone(folder: Path, uv: str) -> Clone:
    for name in CLONE:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    return Clone(folder, uv)


@pytest.fixture
def fresh_clone(tmp_path: Path, uv: str) -> Clone:
    """As git gives it: the first sync resolves the dependencies."""
    made = copy_of_the_clone(tmp_path, uv)
    made.run(uv, "venv", "--quiet", "--python", sys.executable, ".venv")
    return made


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory, uv: str) -> Path:
    """The ``uv.lock`` that a sync of a fresh clone makes."""
    made = copy_of_the_clone(tmp_path_factory.mktemp("resolved"), uv)
    made.run(uv, "lock")
    return made.root / "uv.lock"


@pytest.fixture
def clone(fresh_clone: Clone, resolved: Path) -> Clone:
    """One whose dependencies were resolved before, so that a sync has less to do."""
    shutil.copy2(resolved, fresh_clone.root)
    return fresh_clone


def stand_in(folder: Path, version: str, *, gpu: bool) -> Path:
    """A wheel that says it is llama-cpp-python of this version, with or without GPU offload."""
    code = f"__version__ = {version!r}\ndef llama_supports_gpu_offload():\n    return {gpu}\n"
    return write_wheel(folder, version, {"llama_cpp/__init__.py": code, "llama_cpp/lib/libggml-base.so": ""})


def write_wheel(folder: Path, version: str, files: dict[str, str]) -> Path:
    metadata = f"llama_cpp_python-{version}.dist-info"
    files = files | {
        f"{metadata}/METADATA": f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {version}\n",
        f"{metadata}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},"
        f"{len(text.encode())}\n"
        for name, text in files.items()
    )
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"llama_cpp_python-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in (files | {f"{metadata}/RECORD": f"{record}{metadata}/RECORD,,\n"}).items():
            archive.writestr(name, text)
    return wheel


# --- the GPU build stays ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [SAME, OTHER])
@pytest.mark.parametrize("flags", [[], ["--inexact"]], ids=["exact", "inexact"])
def test_no_uv_sync_replaces_or_removes_a_gpu_build(clone: Clone, version: str, flags: list[str]) -> None:
    clone.install(stand_in(clone.root / "wheels", version, gpu=True))
    clone.run(clone.uv, "sync", *flags)
    assert clone.python(ASK) == f"{version} True"
    clone.run(clone.uv, "sync", *flags)
    assert clone.python(ASK) == f"{version} True"
    assert clone.python("import importlib.metadata as m; print(m.version('llama-cpp-python'))") == version


def test_no_extra_brings_an_engine(clone: Clone) -> None:
    clone.install(stand_in(clone.root / "wheels", OTHER, gpu=True))
    assert "llama-cpp-python" not in clone.run(clone.uv, "sync", "--inexact", "--all-extras", "--dry-run")


def test_a_gpu_build_installed_after_a_sync_survives_the_next_one(fresh_clone: Clone) -> None:
    clone = fresh_clone
    clone.run(clone.uv, "sync")
    clone.install(stand_in(clone.root / "wheels", OTHER, gpu=True))
    clone.run(clone.uv, "sync")
    assert clone.python(ASK) == f"{OTHER} True"
    # Built anew by hand over the held one: the old metadata must not shadow the new.
    clone.install(stand_in(clone.root / "wheels", LOCAL, gpu=True))
    clone.run(clone.uv, "sync")
    assert clone.python(ASK) == f"{LOCAL} True"
    assert clone.python("import importlib.metadata as m; print(m.version('llama-cpp-python'))") == LOCAL


@pytest.mark.parametrize(("version", "is_tested"), [(SAME, True), (OTHER, False)])
def test_the_set_up_keeps_a_gpu_build_and_tells_an_untested_version(
    clone: Clone, version: str, is_tested: bool
) -> None:
    clone.install(stand_in(clone.root / "wheels", version, gpu=True))
    said = clone.set_up()
    assert f"Keeping llama-cpp-python {version}: it has GPU offload" in said
    assert ("outside the tested range" in said) is not is_tested
    assert clone.python(ASK) == f"{version} True"
    assert clone.set_up() == "", "a second set-up has nothing to do"
    clone.run(clone.uv, "sync")
    assert clone.python(ASK) == f"{version} True"


def test_a_gpu_build_whose_driver_is_gone_is_known_by_its_libraries(clone: Clone) -> None:
    files = {
        "llama_cpp/__init__.py": "raise OSError('libvulkan.so.1: not found')",
        "llama_cpp/lib/libggml-vulkan.so": "",
    }
    clone.install(write_wheel(clone.root / "wheels", OTHER, files))
    engine = engine_guard.protect(clone.environment)
    assert engine == engine_guard.Engine(OTHER, gpu=True, error="OSError: libvulkan.so.1: not found")
    clone.run(clone.uv, "sync")
    assert engine_guard.installed_engine(clone.environment / "bin" / "python") == engine


def test_a_released_gpu_build_can_be_dropped(clone: Clone) -> None:
    clone.install(stand_in(clone.root / "wheels", SAME, gpu=True))
    engine_guard.protect(clone.environment)
    clone.run(sys.executable, "tools/setup_env.py", "--release-gpu")
    clone.run(clone.uv, "pip", "uninstall", "llama-cpp-python")
    assert engine_guard.installed_engine(clone.environment / "bin" / "python") is None


# --- and the CPU build comes and goes as locked -----------------------------------------------------------------------


def test_uv_sync_works_from_a_clone_and_prunes_a_cpu_build(fresh_clone: Clone) -> None:
    clone = fresh_clone
    clone.install(stand_in(clone.root / "wheels", OTHER, gpu=False))
    clone.run(clone.uv, "sync")
    assert clone.python("import skulk, nats, aiohttp, msgspec; print(skulk.__name__)") == "skulk"
    assert (clone.environment / "bin" / "skulk").exists()
    assert clone.python("import importlib.util as u; print(u.find_spec('llama_cpp'))") == "None"


def test_the_set_up_installs_the_locked_cpu_build_from_the_cache(clone: Clone) -> None:
    clone.install(stand_in(clone.root / "wheels", OTHER, gpu=False))
    folder = clone.root / "cache" / "skulk" / "wheels" / engine_wheel.cache_key(LOCKED)
    wheel = stand_in(folder, LOCKED.version, gpu=False)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    wheel.with_name(wheel.name + ".sha256").write_text(digest, encoding="ascii")
    said = clone.set_up()
    assert "Compiling" not in said
    assert clone.python(ASK) == f"{LOCKED.version} False"
    # What a plain sync then prunes, the next set-up notices and brings back.
    clone.run(clone.uv, "sync")
    assert clone.python("import importlib.util as u; print(u.find_spec('llama_cpp'))") == "None"
    clone.set_up()
    assert clone.python(ASK) == f"{LOCKED.version} False"


# --- the compiled wheel's cache ---------------------------------------------------------------------------------------

BACKEND = """
import os, shutil, sys
def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    print("flags", os.environ.get("CFLAGS"), "and", os.environ.get("CXXFLAGS"), flush=True)
    for step in range(1, 5):
        print(f"[{step}/4] Building C object {step}.o", flush=True)
    name = "WHEEL_NAME"
    shutil.copy(name, wheel_directory)
    return name
"""


class Source(NamedTuple):
    """A stand-in source distribution in a folder that pip is told to look at, and the environment that compiles it."""

    entry: lock_entries.Entry
    archive: Path
    python: Path


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    name = f"llama_cpp_python-{LOCKED.version}"
    tree = tmp_path / name
    wheel = stand_in(tree, LOCKED.version, gpu=False)
    (tree / "backend.py").write_text(BACKEND.replace("WHEEL_NAME", wheel.name), encoding="utf-8")
    (tree / "pyproject.toml").write_text(
        "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n", encoding="utf-8"
    )
    (tree / "PKG-INFO").write_text(
        f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {LOCKED.version}\n", encoding="utf-8"
    )
    archive = tmp_path / "links" / f"{name}.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, arcname=name)
    text = f"llama-cpp-python=={LOCKED.version} --hash=sha256:{hashlib.sha256(archive.read_bytes()).hexdigest()}\n"
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Source(LOCKED._replace(text=text), archive, python_with_pip(tmp_path))


def python_with_pip(tmp_path: Path) -> Path:
    if importlib.util.find_spec("pip"):
        return Path(sys.executable)
    environment = tmp_path / "pip"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True, timeout=TIMEOUT_S)
    return environment / "bin" / "python"


def test_the_engine_is_compiled_once_in_sight_and_a_damaged_wheel_again(
    source: Source, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = engine_wheel.wheel_for(source.entry, source.python)
    said = capsys.readouterr().out
    assert "about 6 minutes" in said and "[1/4]" in said and "[4/4]" in said
    assert engine_wheel.wheel_for(source.entry, source.python) == wheel
    assert capsys.readouterr().out == "", "the second time it comes from the cache"
    wheel.write_bytes(wheel.read_bytes()[:-100])
    again = engine_wheel.wheel_for(source.entry, source.python)
    assert "damaged" in capsys.readouterr().out
    assert zipfile.ZipFile(again).testzip() is None


def test_a_source_with_another_hash_is_refused(source: Source) -> None:
    with source.archive.open("ab") as file:
        file.write(b"x")
    with pytest.raises(engine_wheel.BuildError, match="did not compile"):
        engine_wheel.wheel_for(source.entry, source.python)


def test_a_missing_compiler_is_one_sentence(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(engine_wheel.BuildError, match="no no-such-compiler was found"):
        engine_wheel.wheel_for(source.entry, source.python)


def test_the_key_of_the_cache_tells_flags_and_cpus_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = engine_wheel.cache_key(LOCKED)
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_VULKAN=on")
    vulkan = engine_wheel.cache_key(LOCKED)
    monkeypatch.delenv("CMAKE_ARGS")
    monkeypatch.setattr(engine_wheel, "_cpu", lambda: "another CPU")
    assert len({plain, vulkan, engine_wheel.cache_key(LOCKED)}) == 3


def test_a_compiler_that_miscompiles_tiles_is_told_to_leave_them_out(
    source: Source, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXXFLAGS", "-O2")
    monkeypatch.setattr(engine_wheel, "flags_for", lambda _: ())
    plain = engine_wheel.wheel_for(source.entry, source.python)
    monkeypatch.setattr(engine_wheel, "flags_for", lambda _: amx_flags.WITHOUT_TILES)
    without = engine_wheel.wheel_for(source.entry, source.python)
    assert without.parent != plain.parent, "another binary: not the one that crashes"
    assert "flags None and -O2\n" in (plain.parent / "build.log").read_text(encoding="utf-8")
    tiles = " ".join(amx_flags.WITHOUT_TILES)
    assert f"flags {tiles} and -O2 {tiles}\n" in (without.parent / "build.log").read_text(encoding="utf-8")
    assert f"left out ({tiles})" in capsys.readouterr().out


def test_without_tiles_no_compiler_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert amx_flags.flags_for("flags : sse2 avx2 avx512f") == ()
    assert amx_flags.flags_for("flags : sse2 amx_tile") == (), "one that isn't there compiles nothing wrongly"


@pytest.mark.skipif("amx_tile" not in engine_wheel._cpu().split(), reason="this processor has no matrix tiles")
def test_a_gcc_that_drops_the_tile_configuration_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug needs the removal of dead stores; without that pass every GCC compiles it rightly."""
    monkeypatch.setenv("CXX", "g++ -fno-tree-dse -fno-dse -fno-tree-dce")
    assert amx_flags.flags_for("amx_tile") == ()
    monkeypatch.setenv("CXX", "g++")
    version = subprocess.run(["g++", "-dumpfullversion"], check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    is_old = amx.is_miscompiled(f"GCC: (g++) {version.stdout.strip()}".encode())
    assert bool(amx_flags.flags_for("amx_tile")) == is_old
