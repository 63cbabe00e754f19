"""Which compute backends this node advertises: what was declared, as far as the installed engine can do it here.

    declared          the engine has                        advertised          warning
    nothing           GPU devices                           them                -
    nothing           none                                  cpu                 -
    cpu               anything                              cpu                 -
    a GPU compute     that device                           it                  -
    a GPU compute     no GPU support compiled in            cpu                 gpu_offload_missing
    a GPU compute     GPU support, but no such device       cpu                 gpu_device_missing
    an unknown word   anything                              without it          backend_unknown
    anything          the library doesn't load              nothing             engine_missing

Where some of several declared computes hold, those are advertised and the others warned of. The engine is asked in a
process of its own, because that starts GPU drivers, which may hang or crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import msgspec

from skulk.placement.backends import COMPUTES, tags_for
from skulk.telemetry.children import ask
from skulk.wire.beats import HealthReason

ENGINE: Final = "llama_cpp"
PROBE_TIMEOUT_S: Final = 30.0
_SWITCHES: Final = {
    "vulkan": "-DGGML_VULKAN=on",
    "rocm": "-DGGML_HIP=on",
    "cuda": "-DGGML_CUDA=on",
    "metal": "-DGGML_METAL=on",
}
_DRIVERS: Final = {
    "vulkan": "'vulkaninfo --summary' must list the GPU",
    "rocm": "'rocminfo' must list the GPU",
    "cuda": "'nvidia-smi' must list the GPU",
    "metal": "Metal needs macOS",
}


class EngineProbe(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine's own probe printed, as far as it matters here.

    Attributes:
        installed: the library can be loaded; else ``problem`` says why not and what to do.
        gpu_offload: GPU support is compiled in, whether or not a GPU is there.
        computes: what can be served here and now.
        build: names the installed build.
        process_bytes: of a runner that has loaded it and no model; 0: not measured.
    """

    installed: bool
    problem: str = ""
    package_version: str = ""
    version: str = ""
    gpu_offload: bool = False
    computes: tuple[str, ...] = ()
    build: str = ""
    process_bytes: int = 0


class Advertised(NamedTuple):
    """Tags for the beat, and what an operator should know about them."""

    tags: tuple[str, ...]
    warnings: tuple[HealthReason, ...]


async def probe_engine(argv: Sequence[str], *, timeout_s: float = PROBE_TIMEOUT_S) -> EngineProbe:
    """Asks the engine's probe, a program that prints one JSON object; whatever goes wrong is a ``problem``."""
    answer = await ask(argv, timeout_s=timeout_s)
    if answer.problem:
        return EngineProbe(installed=False, problem=f"the engine's probe failed: {answer.problem}")
    try:
        return msgspec.json.decode(answer.output, type=EngineProbe)
    except msgspec.DecodeError as error:
        return EngineProbe(installed=False, problem=f"the engine's probe printed no findings: {error}")


def tags_of(declared: tuple[str, ...], probe: EngineProbe) -> Advertised:
    """The module's table; pure.

    Args:
        declared: ``SKULK_LLAMA_CPP_BACKENDS``; empty: detect.
        probe: the engine's findings.
    """
    if not probe.installed:
        return Advertised((), (_engine_missing(probe),))
    if not declared:
        return Advertised(tags_for(ENGINE, _detected(probe)), ())
    unknown = tuple(name for name in declared if name not in COMPUTES)
    wanted = tuple(name for name in declared if name in COMPUTES)
    kept = tuple(name for name in wanted if name == "cpu" or name in probe.computes)
    lost = tuple(name for name in wanted if name not in kept)
    warnings = [_unknown(name) for name in unknown] + [_lost(name, probe) for name in lost]
    return Advertised(tags_for(ENGINE, kept or ("cpu",)), tuple(warnings))


def _detected(probe: EngineProbe) -> tuple[str, ...]:
    gpus = tuple(name for name in probe.computes if name != "cpu")
    # Automatic cards of GGUF models accept no Metal, so a Mac's llama.cpp stays useful by its CPU.
    return ("metal", "cpu") if gpus == ("metal",) else gpus or ("cpu",)


def _engine_missing(probe: EngineProbe) -> HealthReason:
    return HealthReason(
        level="error",
        code="engine_missing",
        message=f"This node can't serve GGUF models: {probe.problem}",
        remediation="Install llama-cpp-python into the environment that Skulk runs in: uv pip install llama-cpp-python",
    )


def _lost(compute: str, probe: EngineProbe) -> HealthReason:
    if not probe.gpu_offload:
        return HealthReason(
            level="warn",
            code="gpu_offload_missing",
            message=f"{compute} is declared, but the installed llama-cpp-python {probe.package_version} was built "
            f"without GPU offload: {ENGINE}-{compute} is not offered.",
            remediation=f'Build it for the GPU: CMAKE_ARGS="{_SWITCHES[compute]}" uv pip install --force-reinstall '
            "--no-cache-dir --no-binary llama-cpp-python llama-cpp-python",
        )
    found = ", ".join(probe.computes) or "none"
    return HealthReason(
        level="warn",
        code="gpu_device_missing",
        message=f"{compute} is declared, but llama.cpp sees no {compute} device here (it sees: {found}): "
        f"{ENGINE}-{compute} is not offered.",
        remediation=f"Look at the driver ({_DRIVERS[compute]}), build llama-cpp-python with {_SWITCHES[compute]}, "
        "or declare what is there in SKULK_LLAMA_CPP_BACKENDS",
    )


def _unknown(name: str) -> HealthReason:
    return HealthReason(
        level="warn",
        code="backend_unknown",
        message=f"SKULK_LLAMA_CPP_BACKENDS names {name!r}, which is no backend.",
        remediation=f"Use a comma list of {', '.join(COMPUTES)}",
    )
