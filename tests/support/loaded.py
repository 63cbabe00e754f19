"""Engines that several tests of a module use, each loaded once, when it is first asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from skulk.engines.llama_cpp.engine import LlamaCppEngine
from tests.support.engines import load_small


class LoadedEngines:
    """A context manager; it closes what it loaded."""

    def __init__(self) -> None:
        self._engines: dict[object, LlamaCppEngine] = {}

    def __enter__(self) -> LoadedEngines:
        return self

    def __exit__(self, *_: object) -> None:
        while self._engines:
            self._engines.popitem()[1].close()

    def get(self, path: Path, **settings: Any) -> LlamaCppEngine:
        """The engine of this file with these settings (see `load_small`)."""
        key = (path, *sorted(settings.items()))
        if key not in self._engines:
            self._engines[key] = load_small(path, **settings)
        return self._engines[key]
