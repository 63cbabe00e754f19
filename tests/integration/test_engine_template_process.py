"""The template's process and its parent: neither outlives the other's end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]

PARENT = """
import sys, threading
from skulk.engines.template import TemplateRenderer, TemplateLimits
loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
source = loop if sys.argv[1] == "busy" else "x"
renderer = TemplateRenderer(source, TemplateLimits(cpu_s=1.0, wall_s=3.0))
renderer.start()
print(renderer._worker.pid, flush=True)
if sys.argv[1] == "busy":
    threading.Thread(target=renderer.render, args=({}, "1" * 40), daemon=True).start()
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_a_killed_parent_leaves_no_worker(state: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    with parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        assert "template_worker" in " ".join(worker.cmdline())
        parent.kill()
        assert worker.wait(timeout=30) is None or not worker.is_running()
