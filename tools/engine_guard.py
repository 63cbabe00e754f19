"""What is known about the installed llama-cpp-python, and how a build with GPU offload is put out of installers' reach.

A distribution whose metadata has no RECORD belongs to somebody else: the specification of installed projects forbids
tools to remove or change it. uv then warns and leaves it, pip refuses. Holding a GPU engine therefore means setting
its RECORD aside, and releasing it means putting the RECORD back. An exact `uv sync` cannot prune a held engine.

Standard library only: the build backend imports this in an empty environment.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

HELD = "RECORD.held"
METADATA = "llama_cpp_python-*.dist-info"
PROBE_TIMEOUT_S = 120
GPU_LIBRARY = re.compile(r"(lib)?ggml-(cann|cuda|hip|hipblas|kompute|metal|musa|opencl|sycl|vulkan|webgpu)\b")

# Two lines: what the files tell, then what the library itself tells. The second may end in a crash of native code.
PROBE = """
import importlib.metadata, importlib.util, json, pathlib
spec = importlib.util.find_spec("llama_cpp")
if spec is None or spec.origin is None:
    raise SystemExit(0)
try:
    version = importlib.metadata.version("llama-cpp-python")
except importlib.metadata.PackageNotFoundError:
    version = ""
libraries = sorted(path.name for path in pathlib.Path(spec.origin).parent.glob("lib/*"))
print("skulk-probe " + json.dumps({"version": version, "libraries": libraries}), flush=True)
try:
    import llama_cpp
    print("skulk-probe " + json.dumps({"gpu": bool(llama_cpp.llama_supports_gpu_offload())}), flush=True)
except Exception as error:
    print("skulk-probe " + json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
"""


class Engine(NamedTuple):
    """An installed llama-cpp-python; `error` says why it could not be asked, empty when it answered."""

    version: str
    gpu: bool
    error: str


def installed_engine(python: Path) -> Engine | None:
    """Ask the environment of this interpreter for its engine; None when it has none. Takes about a second.

    A build that does not import (its driver is gone, its CPU is another) is judged by the libraries it ships.
    """
    try:
        done = subprocess.run(
            [str(python), "-I", "-c", PROBE],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as expired:
        return _verdict((expired.stdout or b"").decode(errors="replace"), "it did not answer in time")
    return _verdict(done.stdout, f"its import ended the interpreter with status {done.returncode}")


def _verdict(output: str, silent: str) -> Engine | None:
    facts: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("skulk-probe "):
            facts |= json.loads(line.removeprefix("skulk-probe "))
    if "version" not in facts:
        return None
    if "gpu" in facts:
        return Engine(facts["version"], facts["gpu"], "")
    gpu = any(GPU_LIBRARY.match(name) for name in facts["libraries"])
    return Engine(facts["version"], gpu, facts.get("error", silent))


def site_packages(environment: Path) -> list[Path]:
    """The folders of a virtual environment that packages lie in."""
    return sorted(environment.glob("lib/python3.*/site-packages"))


def hold(environment: Path) -> list[Path]:
    """Set the RECORD of the installed engine aside; gives the metadata folders that were held by this call."""
    drop_leftovers(environment)
    held: list[Path] = []
    for folder in _metadata(environment):
        record = folder / "RECORD"
        if record.exists():
            record.replace(folder / HELD)
            held.append(folder)
    return held


def release(environment: Path) -> list[Path]:
    """Put the RECORD back, so that installers may replace the engine again; gives what was released."""
    released: list[Path] = []
    for folder in _metadata(environment):
        held = folder / HELD
        if held.exists():
            held.replace(folder / "RECORD")
            released.append(folder)
    return released


def drop_leftovers(environment: Path) -> None:
    """Remove the metadata of held engines that a person has since installed another one over."""
    folders = _metadata(environment)
    if any((folder / "RECORD").exists() for folder in folders):
        for folder in folders:
            if not (folder / "RECORD").exists():
                shutil.rmtree(folder)


def protect(environment: Path) -> Engine | None:
    """Hold the environment's engine if it has GPU offload; gives the engine, held or not."""
    python = environment / "bin" / "python"
    if not python.exists() or not _metadata(environment):
        return None
    engine = installed_engine(python)
    if engine is not None and engine.gpu:
        hold(environment)
    return engine


def is_installed_from(environment: Path, folder: Path) -> bool:
    """Whether the installed engine is a wheel of this folder (PEP 610)."""
    for metadata in _metadata(environment):
        try:
            url = json.loads((metadata / "direct_url.json").read_text(encoding="utf-8"))["url"]
        except (OSError, ValueError, KeyError):
            return False
        if not url.startswith(folder.as_uri() + "/"):
            return False
    return True


def _metadata(environment: Path) -> list[Path]:
    return [folder for packages in site_packages(environment) for folder in sorted(packages.glob(METADATA))]
