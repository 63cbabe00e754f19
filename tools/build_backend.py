"""The build backend: setuptools, and before an editable build a hold on the GPU engine of the clone's environment.

`uv sync` is exact by default: it would prune an engine that somebody built for a GPU. It builds the editable package
before it removes anything, and `cache-keys` in pyproject.toml makes that build due whenever an engine was installed.
`engine_guard.py` tells what holding means. To see it at work: `python tools/setup_env.py --help`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import engine_guard
from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    build_wheel,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def build_editable(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Build the editable wheel after the hold (PEP 660); gives the wheel's file name."""
    environment = Path(os.environ.get("UV_PROJECT_ENVIRONMENT", ".venv"))
    engine = engine_guard.protect(environment)
    if engine is not None and engine.gpu:
        sys.stderr.write(f"llama-cpp-python {engine.version} has GPU offload: held, no sync removes it\n")
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
