"""What the installed llama.cpp can do here. ``python -m skulk.engines.llama_cpp.probe`` prints it as JSON.

Looking at GPUs starts their drivers, which may hang or crash: the node runs this in a process of its own.
"""

from __future__ import annotations

import sys

import msgspec

from skulk.engines.llama_cpp.devices import REGISTRIES, Device, devices
from skulk.engines.llama_cpp.native import build_id, engine_version, gpu_libraries, library, package_version
from skulk.engines.llama_cpp.threads import physical_cores
from skulk.errors import StartError


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """The findings.

    Attributes:
        installed: the library can be loaded; else ``problem`` says why not and what to do.
        gpu_offload: GPU support is compiled in, whether or not a GPU is there.
        computes: what can be served here and now: ``cpu``, and each GPU backend with a device.
        cores: physical cores within affinity and quota.
        build: names the installed build.
        process_bytes: of a runner that has loaded this library and no model; 0: whoever asked doesn't know.
    """

    installed: bool
    problem: str = ""
    package_version: str = ""
    version: str = ""
    gpu_offload: bool = False
    computes: tuple[str, ...] = ()
    devices: tuple[Device, ...] = ()
    cores: int = 1
    system_info: str = ""
    build: str = ""
    process_bytes: int = 0


def computes_of(found: tuple[Device, ...]) -> tuple[str, ...]:
    """The computes that these devices make possible; ``cpu`` always, and last."""
    registries = {device.registry for device in found}
    return (*(compute for compute, names in REGISTRIES.items() if names & registries), "cpu")


def probe() -> Probe:
    """Looks once. Takes a second or two where GPU drivers start."""
    try:
        lib = library()
    except StartError as error:
        return Probe(installed=False, problem=error.detail, package_version=package_version(), cores=physical_cores())
    found = devices()
    return Probe(
        installed=True,
        package_version=package_version(),
        version=engine_version(),
        build=build_id(),
        # llama.cpp itself says no where a driver is away, and a rebuild wouldn't bring it back
        gpu_offload=bool(lib.llama_supports_gpu_offload()) or bool(gpu_libraries()),
        computes=computes_of(found),
        devices=found,
        cores=physical_cores(),
        system_info=lib.llama_print_system_info().decode("utf-8", "replace").strip(),
    )


def main() -> int:
    """Prints the findings as one line of JSON."""
    sys.stdout.buffer.write(msgspec.json.encode(probe()) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
