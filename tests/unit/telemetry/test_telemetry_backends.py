"""What is advertised, by what was declared and what the engine can do: the table of the module."""

from __future__ import annotations

import pytest

from skulk.telemetry.backends import EngineProbe, tags_of

PLAIN = EngineProbe(installed=True, package_version="0.3.36", computes=("cpu",))
NO_DEVICE = EngineProbe(installed=True, gpu_offload=True, computes=("cpu",))
VULKAN = EngineProbe(installed=True, gpu_offload=True, computes=("vulkan", "cpu"))
BOTH = EngineProbe(installed=True, gpu_offload=True, computes=("vulkan", "cuda", "cpu"))
METAL = EngineProbe(installed=True, gpu_offload=True, computes=("metal", "cpu"))
NONE = EngineProbe(installed=False, problem="libllama.so is missing")


@pytest.mark.parametrize(
    ("declared", "probe", "computes", "codes"),
    [
        ((), PLAIN, ("cpu",), ()),
        ((), NO_DEVICE, ("cpu",), ()),
        ((), VULKAN, ("vulkan",), ()),
        ((), BOTH, ("vulkan", "cuda"), ()),
        ((), METAL, ("metal", "cpu"), ()),
        (("cpu",), VULKAN, ("cpu",), ()),
        (("vulkan",), VULKAN, ("vulkan",), ()),
        (("vulkan", "cpu"), VULKAN, ("vulkan", "cpu"), ()),
        (("vulkan",), PLAIN, ("cpu",), ("gpu_offload_missing",)),
        (("vulkan",), NO_DEVICE, ("cpu",), ("gpu_device_missing",)),
        (("rocm", "vulkan"), VULKAN, ("vulkan",), ("gpu_device_missing",)),
        (("vulkan", "rocm"), PLAIN, ("cpu",), ("gpu_offload_missing", "gpu_offload_missing")),
        (("opencl", "vulkan"), VULKAN, ("vulkan",), ("backend_unknown",)),
        (("opencl",), VULKAN, ("cpu",), ("backend_unknown",)),
        ((), NONE, (), ("engine_missing",)),
        (("vulkan",), NONE, (), ("engine_missing",)),
    ],
)
def test_the_table(
    declared: tuple[str, ...], probe: EngineProbe, computes: tuple[str, ...], codes: tuple[str, ...]
) -> None:
    tags, warnings = tags_of(declared, probe)
    expected = ("llama_cpp", *(f"llama_cpp-{compute}" for compute in computes)) if computes else ()
    assert tags == expected
    assert tuple(warning.code for warning in warnings) == codes


def test_a_gpu_build_that_was_lost_says_how_to_build_it_again() -> None:
    (warning,) = tags_of(("vulkan",), PLAIN).warnings
    assert warning.level == "warn"
    assert "0.3.36 was built without GPU offload" in warning.message
    assert 'CMAKE_ARGS="-DGGML_VULKAN=on"' in warning.remediation
    assert "--no-binary llama-cpp-python" in warning.remediation


def test_a_library_that_does_not_load_is_an_error_with_its_reason() -> None:
    (warning,) = tags_of((), NONE).warnings
    assert warning.level == "error"
    assert "libllama.so is missing" in warning.message
