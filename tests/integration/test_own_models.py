"""Models of one's own: folders named by ``skulk.toml``, served like the embedded one; a broken file harms nothing."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import psutil

from skulk.models.catalogue import Catalogue
from tests.support.whole_node import MODEL, skulk, whole_node

OWN, CUT, NO_GGUF = "org/own", "org/cut", "org/noise"
QUESTION = [{"role": "user", "content": "Name three rivers."}]


def lay_out(folder: Path, scratch: Path) -> None:
    """A whole model under a name of its own, one that is cut short, and a file that is no model."""
    catalogue = Catalogue(scratch, verified_file=scratch / "verified.json")
    catalogue.rescan()
    weights = Path(catalogue.path_of(MODEL))
    for name in (OWN, CUT, NO_GGUF):
        (folder / name).mkdir(parents=True)
    (folder / OWN / "own-Q4_1.gguf").symlink_to(weights)
    with weights.open("rb") as file:
        (folder / CUT / "cut-Q4_1.gguf").write_bytes(file.read(4_000_000))
    (folder / NO_GGUF / "noise-Q4_1.gguf").write_bytes(b"no model at all " * 100)


async def test_a_folder_of_ones_own_is_served_and_its_broken_files_are_refused(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "models"
    home.mkdir()
    lay_out(folder, tmp_path)
    (home / "skulk.toml").write_text(f"models_path = [{json.dumps(str(folder))}]\n")
    async with whole_node(home, "--place", OWN) as node:
        node_id = node.facts["node_id"]
        await node.wait_ready()
        asked = {"model": OWN, "messages": QUESTION, "temperature": 0, "max_tokens": 4}
        status, answer = await node.call("POST", "/v1/chat/completions", asked)
        assert (status, answer["model"]) == (200, OWN)
        assert answer["usage"]["completion_tokens"] == 4
        for broken, why in ((CUT, "cut short"), (NO_GGUF, "not a GGUF file")):
            status, refused = await node.call("POST", "/place_instance", {"model_id": broken})
            assert (status, refused["error"]["code"]) == (400, "model_file_invalid")
            assert why in refused["error"]["message"]
        health = (await node.state())["nodeHealth"][node_id]
        told = " ".join(reason["message"] for reason in health["reasons"])
        assert "cut-Q4_1.gguf" in told and "noise-Q4_1.gguf" in told
        assert (await node.call("POST", "/v1/chat/completions", asked))[0] == 200, "the others go on"

        shown = await asyncio.to_thread(skulk, home, "config")
        (row,) = (line.split() for line in shown.stdout.splitlines() if line.startswith("models_path"))
        assert row[1] == str(folder) and row[-1].endswith("skulk.toml")

        children = [psutil.Process(pid) for pid in node.children().values()]
        assert await node.stop(signal.SIGINT) == 0
        assert not [child for child in children if child.is_running()]

    async with whole_node(home) as again:
        assert again.facts["node_id"] == node_id
        await again.wait_ready()
        assert (await again.call("POST", "/v1/chat/completions", asked))[0] == 200
