"""The engine's probe from inside a runner's own process: also what a runner takes before it loads a model.

``python -m skulk.runner.probe`` prints it as one line of JSON. The node runs it once for each build of the engine.
"""

from __future__ import annotations

import os
import sys

import msgspec

from skulk.engines.llama_cpp.probe import Probe, probe
from skulk.runner import process
from skulk.telemetry.processes import process_memory


def weighed() -> Probe:
    """The findings with ``process_bytes``: this process has imported what a runner imports, and started the drivers."""
    assert process.main is not None
    found = probe()
    return msgspec.structs.replace(found, process_bytes=process_memory(os.getpid()).total_bytes)


def main() -> int:
    """Prints the findings."""
    sys.stdout.buffer.write(msgspec.json.encode(weighed()) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
