"""`tools/make_model.py`: llama.cpp loads what it writes, of every architecture and every type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from skulk.engines.llama_cpp.loader import load
from skulk.engines.protocol import LoadSpec
from skulk.models.gguf import read_header
from skulk.wire.generation import TextPrompt
from tests.support.gguf import embedded_model, vocabulary_file
from tests.support.model_shapes import ARCHITECTURES, Shape
from tools.make_model import QUANTIZATIONS, write_model

ROOT = Path(__file__).parents[2]
SMALL = Shape(layers=2, width=256, heads=4, kv_heads=2, key_length=64, value_length=64, feed_forward=512)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a small vocabulary: the real one takes a second to write and to load."""
    return vocabulary_file(tmp_path_factory.mktemp("vocabulary") / "v.gguf")


def tokens_of(path: Path, text: str) -> tuple[int, ...]:
    """Loads a model, which computes a chunk and some steps, and has it read a text."""
    spec = LoadSpec(path=str(path), backend="llama_cpp-cpu", context_length=256, kv_cells=256, n_ubatch=32, n_threads=1)
    engine = load(spec, lambda _: True)
    try:
        return tuple(engine.tokens_of(TextPrompt(text=text)))
    finally:
        engine.close()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads(tmp_path: Path, tokenizer: Path, architecture: str) -> None:
    assert tokens_of(write_model(tmp_path / "m.gguf", architecture, SMALL, tokenizer=tokenizer), "ab a")


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_every_type_loads_and_is_what_the_header_says(tmp_path: Path, tokenizer: Path, quantization: str) -> None:
    path = write_model(tmp_path / "m.gguf", "llama", SMALL, quantization=quantization, tokenizer=tokenizer)
    assert tokens_of(path, "ab a")
    body = path.read_bytes()
    header = read_header(lambda offset, length: body[offset : offset + length], len(body), "m.gguf")
    assert {tensor.type_name for tensor in header.tensors if len(tensor.shape) > 1} == {quantization}


def test_it_reads_text_as_the_embedded_model_does(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", "llama", SMALL._replace(width=64, layers=1), quantization="Q8_0")
    text = "Name three rivers of Österreich, 12345 km long."
    assert tokens_of(path, text) == tokens_of(embedded_model(), text)


def test_the_program_writes_equal_files_for_equal_flags_and_holes_on_demand(tmp_path: Path) -> None:
    def made(name: str, *flags: str) -> Path:
        path = tmp_path / name
        program = [sys.executable, str(ROOT / "tools/make_model.py"), str(path), "--layers", "2", "--width", "128"]
        done = subprocess.run([*program, *flags], check=True, capture_output=True, text=True, timeout=60)
        assert f"{path.stat().st_size:,} bytes" in done.stdout
        return path

    first, again = made("a.gguf", "--quantization", "Q8_0"), made("b.gguf", "--quantization", "Q8_0")
    assert first.read_bytes() == again.read_bytes()
    hole = made("c.gguf", "--quantization", "Q8_0", "--sparse")
    assert hole.stat().st_size == first.stat().st_size
    assert hole.stat().st_blocks * 512 < first.stat().st_size // 2
