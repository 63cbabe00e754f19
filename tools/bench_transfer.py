"""How fast weights go from node to node: our fetch against curl, of the same file from the same process, in turns.

Both sides write the file to the same folder. curl reads and writes; ours also hashes each chunk, the server too, and at
the end the whole. Run it on a machine that does nothing else; figures belong into skulk/models/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from skulk.models.shelf import Shelf  # noqa: E402
from skulk.models.sources import Neighbour  # noqa: E402
from skulk.models.tasks import FetchTask  # noqa: E402
from skulk.node.children import HubChildren  # noqa: E402
from skulk.node.files_process import FilesSpec  # noqa: E402
from skulk.settings import Settings  # noqa: E402
from skulk.supervision.child import Child, ChildSpec  # noqa: E402
from skulk.units import MIB, format_bytes  # noqa: E402
from skulk.wire.base import encode  # noqa: E402
from skulk.wire.model import ModelCard, ModelFile  # noqa: E402

MODEL: Final = "bench/transfer"
FILE: Final = "noise.json"


def main(arguments: list[str]) -> int:
    """Measures and prints; 1 where curl is missing or a copy is wrong."""
    parser = argparse.ArgumentParser(prog="tools/bench_transfer.py", description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the file, MiB (default: 1024)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--folder", type=Path, help="where both nodes' files lie (default: a temporary folder)")
    flags = parser.parse_args(arguments)
    curl = shutil.which("curl")
    if curl is None:
        print("curl is missing")
        return 1
    with tempfile.TemporaryDirectory(dir=flags.folder) as place:
        return asyncio.run(measure(Path(place), curl, flags.mib * MIB, flags.rounds))


async def measure(place: Path, curl: str, size: int, rounds: int) -> int:
    """Serves one file from a process of its own; fetches it by both sides in turns."""
    card = make_model(place / "a", size)
    spec = FilesSpec(host="127.0.0.1", port=0, models_dir=str(place / "a"), verified_file=str(place / "verified.json"))
    server = Child(
        ChildSpec(
            name="files", argv=(sys.executable, "-m", "skulk", "_files"), stdin=encode(spec), cwd=ROOT, drain_s=1.0
        )
    )
    ready = await server.start()
    url = f"http://127.0.0.1:{ready.fields['port']}"
    ours: list[float] = []
    theirs: list[float] = []
    try:
        for turn in range(rounds):
            theirs.append(await by_curl(curl, place, url, card))
            seconds, moved = await by_us(place, url, card)
            ours.append(moved)
            print(
                f"{turn + 1}: curl {rate(size, theirs[-1])}, ours {rate(size, moved)} "
                f"({rate(size, seconds)} with the process's start and the hash of the whole)",
                flush=True,
            )
    finally:
        await server.stop()
    best, median = min(theirs) / min(ours), statistics.median(theirs) / statistics.median(ours)
    print(
        f"ours / curl: {median:.2f} (medians), {best:.2f} (best of each); {format_bytes(size)}, {os.cpu_count()} CPUs"
    )
    return 0


def make_model(folder: Path, size: int) -> ModelCard:
    """A file of noise, as a fetched model of the shelf."""
    path = folder / "bench" / "transfer" / FILE
    path.parent.mkdir(parents=True)
    digest = hashlib.sha256()
    block = random.Random(1).randbytes(MIB)
    with path.open("wb") as file:
        for number in range(size // MIB):
            piece = number.to_bytes(8, "little") + block[8:]
            digest.update(piece)
            file.write(piece)
    card = ModelCard(
        model_id=MODEL,
        name="noise",
        family="none",
        format="mlx",
        backends=("mlx-metal",),
        files=(ModelFile(name=FILE, size_bytes=size // MIB * MIB, sha256=digest.hexdigest()),),
        context_length=1,
        weights_bytes=size,
        kv_bytes_per_token=1,
    )
    Shelf(folder).keep(card, time.time())
    return card


async def by_curl(curl: str, place: Path, url: str, card: ModelCard) -> float:
    """Seconds that curl needs, from its start to its end."""
    target = place / "curl.copy"
    began = time.perf_counter()
    address = f"{url}/v1/content/{card.files[0].sha256}"
    process = await asyncio.create_subprocess_exec(curl, "--silent", "--fail", "--output", str(target), address)
    assert await process.wait() == 0
    elapsed = time.perf_counter() - began
    assert target.stat().st_size == card.files[0].size_bytes
    target.unlink()
    return elapsed


async def by_us(place: Path, url: str, card: ModelCard) -> tuple[float, float]:
    """Seconds of the whole fetch with its process, and seconds from its first byte to its last one."""
    folder = place / "b"
    settings = Settings(home=str(place), models_dir=str(folder))
    task = FetchTask(
        card=card, folder=str(folder), parts=str(folder / ".parts"), neighbours=(Neighbour(url=url),), no_hub="none"
    )
    moved: list[float] = []
    began = time.perf_counter()
    await HubChildren(settings, None).fetch(task, lambda progress: moved.append(progress.moving_s))
    elapsed = time.perf_counter() - began
    shutil.rmtree(folder)
    return elapsed, max(moved)


def rate(size: int, seconds: float) -> str:
    """Bytes a second for people."""
    return f"{format_bytes(int(size / seconds))}/s"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
