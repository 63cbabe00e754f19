"""What a model is and what it needs, as placement, runners and catalogues speak of it."""

from __future__ import annotations

from typing import Literal

from skulk.wire.base import Wire

ModelFormat = Literal["gguf", "mlx"]


class ModelFile(Wire, frozen=True, kw_only=True):
    """One file of a model's weights.

    Attributes:
        name: path inside the repository, ``/`` between its parts.
        size_bytes: size of the whole file.
        sha256: pinned digest, hexadecimal; None where nothing pins it.
        git_oid: the digest that git gives a small file of the hub (SHA-1 over a header and the content); None: none.
    """

    name: str
    size_bytes: int
    sha256: str | None = None
    git_oid: str | None = None


class SamplingDefaults(Wire, frozen=True, kw_only=True):
    """What a card wants where a request says nothing; None: it says nothing either. Names as in `Sampling`."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class ModelCard(Wire, frozen=True, kw_only=True):
    """A model as the catalogue knows it. Sizes are bytes, lengths are tokens.

    Attributes:
        model_id: what requests name, ``org/repo`` or the stem of a bare file.
        name: for people.
        family: ``general.architecture`` of a GGUF (``llama``, ``qwen3``), ``model_type`` of an MLX model.
        backends: accepted ``<engine>-<compute>`` tags, preferred first; a hard filter, its order a soft one.
        files: the files to load, the first part first.
        context_length: window the model was trained for.
        max_context_tokens: the most that may be admitted, where the card limits it.
        weights_bytes: sum of the tensors' sizes.
        kv_bytes_per_token: of one token in one sequence's cache, 16-bit, all layers.
        window: tokens that the layers with a sliding window see; 0: no layer has one.
        window_kv_bytes_per_token: the part of ``kv_bytes_per_token`` that those layers have.
        activations: 32-bit values that one row of a step needs at most; 0: unknown.
        recurrent_bytes: state of one sequence that doesn't grow with its length.
        source: page or file the card was read from.
        repo: ``org/repo`` on the hub that has the files; empty: none is known.
        revision: the commit of ``repo`` that is pinned.
        min_vram_gib: a node whose GPU has less memory doesn't get it; 0: no such limit.
        reasoning_format, tool_format: how it marks reasoning and calls (`skulk.models.hints`); empty: not told.
        sampling: what requests get that don't say.
        projector: the vision part, where the model has one.
        companions: what goes with the weights: configuration, tokenizer, templates.
    """

    model_id: str
    name: str
    family: str
    format: ModelFormat = "gguf"
    backends: tuple[str, ...]
    files: tuple[ModelFile, ...]
    quantization: str = ""
    context_length: int
    max_context_tokens: int | None = None
    weights_bytes: int
    kv_bytes_per_token: int
    window: int = 0
    window_kv_bytes_per_token: int = 0
    recurrent_bytes: int = 0
    activations: int = 0
    layers: int = 0
    embedding_length: int = 0
    vocabulary_size: int = 0
    tasks: tuple[str, ...] = ("TextGeneration",)
    capabilities: tuple[str, ...] = ("text",)
    tags: tuple[str, ...] = ()
    license: str = ""
    source: str = ""
    repo: str = ""
    revision: str = ""
    min_vram_gib: float = 0.0
    reasoning_format: str = ""
    tool_format: str = ""
    sampling: SamplingDefaults = SamplingDefaults()
    projector: ModelFile | None = None
    companions: tuple[ModelFile, ...] = ()

    @property
    def embeds(self) -> bool:
        """Whether it gives vectors or scores, and no text."""
        return "TextGeneration" not in self.tasks

    @property
    def all_files(self) -> tuple[ModelFile, ...]:
        """Weights, projector and companions."""
        return (*self.files, *(() if self.projector is None else (self.projector,)), *self.companions)

    @property
    def size_bytes(self) -> int:
        """Bytes on disk of all files."""
        return sum(file.size_bytes for file in self.all_files)


class HeldModel(Wire, frozen=True, kw_only=True):
    """A model whose weights lie whole on a node's disk, since ``added_at`` (seconds since the epoch; 0: unknown)."""

    model_id: str
    size_bytes: int
    sha256: str | None = None
    added_at: float = 0.0
