"""Which loader serves a backend tag. Engines are imported when they are asked for: a node may lack some."""

from __future__ import annotations

from skulk.engines.protocol import Loader
from skulk.errors import StartError


def loader_for(backend: str) -> Loader:
    """The loader of ``<engine>-<compute>``.

    Raises:
        StartError: ``engine_missing``: no such engine, or its library can't be loaded.
    """
    engine, _, _compute = backend.partition("-")
    match engine:
        case "llama_cpp":
            from skulk.engines.llama_cpp.loader import load

            return load
        case "fake":
            from skulk.engines.fake import load

            return load
        case _:
            raise StartError(
                "engine_missing",
                f"no engine serves the backend {backend!r}; this version has llama_cpp (llama_cpp-cpu, "
                "llama_cpp-vulkan, llama_cpp-rocm, llama_cpp-cuda, llama_cpp-metal).",
            )
