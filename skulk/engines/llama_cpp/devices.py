"""Which compute devices llama.cpp has, and which of them a backend tag means."""

from __future__ import annotations

import ctypes
from typing import Any, Final

import msgspec

from skulk.engines.llama_cpp.native import INSTALL_HINT, library
from skulk.errors import StartError

# Names of ggml's backend registries, by the compute part of a tag.
REGISTRIES: Final[dict[str, frozenset[str]]] = {
    "vulkan": frozenset({"Vulkan"}),
    "rocm": frozenset({"ROCm", "HIP"}),
    "cuda": frozenset({"CUDA"}),
    "metal": frozenset({"MTL", "Metal"}),
}


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One device of ggml.

    Attributes:
        registry: the backend it belongs to, ``CPU``, ``Vulkan``, …
        free_bytes: memory free now; 0 where the backend doesn't tell.
    """

    registry: str
    name: str
    description: str
    free_bytes: int
    total_bytes: int


def _ggml() -> Any:
    # The handle of libllama also resolves the symbols of the ggml libraries that it is linked to.
    ggml = library()._lib
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    for name in ("ggml_backend_dev_get", "ggml_backend_dev_backend_reg"):
        getattr(ggml, name).restype = ctypes.c_void_p
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description", "ggml_backend_reg_name"):
        getattr(ggml, name).restype = ctypes.c_char_p
        getattr(ggml, name).argtypes = [ctypes.c_void_p]
    ggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    ggml.ggml_backend_dev_backend_reg.argtypes = [ctypes.c_void_p]
    size_p = ctypes.POINTER(ctypes.c_size_t)
    ggml.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size_p, size_p]
    ggml.ggml_backend_dev_memory.restype = None
    return ggml


def _handles(ggml: Any) -> tuple[int, ...]:
    return tuple(ggml.ggml_backend_dev_get(index) for index in range(ggml.ggml_backend_dev_count()))


def _registry(ggml: Any, device: int) -> str:
    return ggml.ggml_backend_reg_name(ggml.ggml_backend_dev_backend_reg(device)).decode()


def devices() -> tuple[Device, ...]:
    """All devices of this build on this machine. It starts GPU drivers: ask in a process of its own (`probe`)."""
    ggml = _ggml()
    found: list[Device] = []
    for handle in _handles(ggml):
        free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
        ggml.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
        found.append(
            Device(
                registry=_registry(ggml, handle),
                name=ggml.ggml_backend_dev_name(handle).decode("utf-8", "replace"),
                description=ggml.ggml_backend_dev_description(handle).decode("utf-8", "replace"),
                free_bytes=free.value,
                total_bytes=total.value,
            )
        )
    return tuple(found)


def free_bytes(compute: str) -> int:
    """Memory that is free now on a compute's devices, where only the devices themselves can tell; else 0.

    AMD's and Intel's kernel drivers tell what each process has (`skulk.telemetry.processes`), and a device in main
    memory is part of what the process takes there.
    """
    if compute not in ("cuda", "rocm"):
        return 0
    return sum(device.free_bytes for device in devices() if device.registry in REGISTRIES[compute])


def device_list(compute: str) -> Any:
    """The NULL-terminated array for ``llama_model_params.devices``; for ``cpu`` it is empty: no GPU is touched.

    Raises:
        StartError: ``engine_missing``: this build, or this machine, has no such device.
    """
    if compute == "cpu":
        return (ctypes.c_void_p * 1)(None)
    ggml = _ggml()
    by_handle = {handle: _registry(ggml, handle) for handle in _handles(ggml)}
    wanted = [handle for handle, registry in by_handle.items() if registry in REGISTRIES.get(compute, ())]
    if not wanted:
        raise StartError(
            "engine_missing",
            f"the installed llama-cpp-python has no {compute} device on this machine (it has: "
            f"{', '.join(sorted(set(by_handle.values()))) or 'none'}); declare only what it can do in "
            f"SKULK_LLAMA_CPP_BACKENDS, or {INSTALL_HINT}.",
        )
    return (ctypes.c_void_p * (len(wanted) + 1))(*wanted, None)
