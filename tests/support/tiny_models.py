"""Tiny models with random weights, of architectures whose memory works in different ways, as llama.cpp loads them.

    llama       every token's keys and values are kept: memory can be cut anywhere
    gemma3      all layers but the last see a window of `WINDOW` tokens and forget what lies before it
    mamba       one state a sequence, that every token changes
    jamba       layers of both kinds: states, and keys and values
    lfm2        short convolutions, and keys and values
    qwen3next   a gated delta rule, experts, and keys and values

What they say means nothing; but it is a function of all tokens before it, so a wrong state shows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests.support.gguf import Tensor, gguf_bytes, vocabulary_metadata

WIDTH: Final = 64
LAYERS: Final = 4
HEADS: Final = 4
HEADS_KV: Final = 2
HEAD: Final = WIDTH // HEADS
INNER: Final = 2 * WIDTH
STATE: Final = 8
WINDOW: Final = 48
"""Tokens that the sliding layers of gemma3 see."""
VOCABULARY: Final = len(vocabulary_metadata()["tokenizer.ggml.tokens"])
_DEVIATION: Final = 0.12
_RMS: Final = "attention.layer_norm_rms_epsilon"

Shapes = dict[str, tuple[int, ...]]


def write_tiny(path: Path, architecture: str, *, seed: int = 1, **changes: Any) -> Path:
    """Writes a model of one of `ARCHITECTURES`; equal arguments, equal file.

    ``changes``: of its own metadata; ``__`` stands for a dot.
    """
    metadata, shapes = ARCHITECTURES[architecture]()
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    own = {f"{architecture}.{key}": value for key, value in metadata.items()}
    common = {"token_embd.weight": (WIDTH, VOCABULARY), "output.weight": (WIDTH, VOCABULARY)}
    tensors = [Tensor(name, shape) for name, shape in (common | shapes).items()]
    header = {"general.architecture": architecture, "general.name": f"Tiny {architecture}", **own}
    path.write_bytes(gguf_bytes(header | vocabulary_metadata(), tensors, values=lambda one: _random(one, seed)))
    return path


def story_of_numbers() -> tuple[int, ...]:
    """541 tokens of a tiny model's vocabulary without a pattern."""
    return tuple((index * 37 + index * index * 5) % (VOCABULARY - 5) + 5 for index in range(541))


def _random(tensor: Tensor, seed: int) -> bytes:
    draw = np.random.default_rng((seed, zlib.crc32(tensor.name.encode())))
    values = draw.normal(0.0, _DEVIATION, tensor.shape[::-1]).astype(np.float32)
    if "norm" in tensor.name:
        values += 1.0
    elif tensor.name.endswith("ssm_a"):
        # States fade, some quickly and some slowly.
        values = -np.abs(values)
    elif "conv" in tensor.name:
        values *= 3.0
    elif tensor.name == "output.weight":
        values *= 2.0
    return values.tobytes()


def _base(**own: Any) -> dict[str, Any]:
    return {
        "block_count": LAYERS,
        "context_length": 4096,
        "embedding_length": WIDTH,
        "feed_forward_length": INNER,
        _RMS: 1e-5,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS_KV,
    } | own


def _attention(layer: int) -> Shapes:
    return {
        f"blk.{layer}.attn_q.weight": (WIDTH, HEADS * HEAD),
        f"blk.{layer}.attn_k.weight": (WIDTH, HEADS_KV * HEAD),
        f"blk.{layer}.attn_v.weight": (WIDTH, HEADS_KV * HEAD),
        f"blk.{layer}.attn_output.weight": (HEADS * HEAD, WIDTH),
    }


def _feed_forward(layer: int) -> Shapes:
    return {
        f"blk.{layer}.ffn_norm.weight": (WIDTH,),
        f"blk.{layer}.ffn_gate.weight": (WIDTH, INNER),
        f"blk.{layer}.ffn_up.weight": (WIDTH, INNER),
        f"blk.{layer}.ffn_down.weight": (INNER, WIDTH),
    }


def _norm(layer: int, name: str, width: int = WIDTH) -> Shapes:
    return {f"blk.{layer}.{name}.weight": (width,)}


def _selective(layer: int) -> Shapes:
    """A state space layer of mamba."""
    rank = WIDTH // 16
    return {
        f"blk.{layer}.ssm_in.weight": (WIDTH, 2 * INNER),
        f"blk.{layer}.ssm_conv1d.weight": (4, INNER),
        f"blk.{layer}.ssm_conv1d.bias": (INNER,),
        f"blk.{layer}.ssm_x.weight": (INNER, rank + 2 * STATE),
        f"blk.{layer}.ssm_dt.weight": (rank, INNER),
        f"blk.{layer}.ssm_dt.bias": (INNER,),
        f"blk.{layer}.ssm_a": (STATE, INNER),
        f"blk.{layer}.ssm_d": (INNER,),
        f"blk.{layer}.ssm_out.weight": (INNER, WIDTH),
    }


def _selective_metadata() -> dict[str, Any]:
    return {
        "ssm.conv_kernel": 4,
        "ssm.inner_size": INNER,
        "ssm.state_size": STATE,
        "ssm.time_step_rank": WIDTH // 16,
    }


def _stack(layer_of: Callable[[int], Shapes], *, last_norm: str = "output_norm.weight") -> Shapes:
    shapes: Shapes = {last_norm: (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= layer_of(layer)
    return shapes


def _llama() -> tuple[dict[str, Any], Shapes]:
    def layer_of(layer: int) -> Shapes:
        return _norm(layer, "attn_norm") | _attention(layer) | _feed_forward(layer)

    return _base(), _stack(layer_of)


def _gemma3() -> tuple[dict[str, Any], Shapes]:
    def layer_of(layer: int) -> Shapes:
        norms = _norm(layer, "attn_norm") | _norm(layer, "post_attention_norm") | _norm(layer, "post_ffw_norm")
        heads = _norm(layer, "attn_q_norm", HEAD) | _norm(layer, "attn_k_norm", HEAD)
        return norms | heads | _attention(layer) | _feed_forward(layer)

    own = {"attention.sliding_window": WINDOW, "attention.sliding_window_pattern": LAYERS}
    own |= {"attention.key_length": HEAD, "attention.value_length": HEAD}
    return _base(**own), _stack(layer_of)


def _mamba() -> tuple[dict[str, Any], Shapes]:
    def layer_of(layer: int) -> Shapes:
        return _norm(layer, "attn_norm") | _selective(layer)

    own = _selective_metadata() | {"attention.head_count": 0, "attention.head_count_kv": 0, "feed_forward_length": 0}
    return _base(**own), _stack(layer_of)


def _heads_by_layer(is_attention: Callable[[int], bool]) -> list[int]:
    return [HEADS_KV if is_attention(layer) else 0 for layer in range(LAYERS)]


def _is_odd(layer: int) -> bool:
    return layer % 2 == 1


def _jamba() -> tuple[dict[str, Any], Shapes]:
    def layer_of(layer: int) -> Shapes:
        norms = _norm(layer, "ssm_dt_norm", WIDTH // 16)
        norms |= _norm(layer, "ssm_b_norm", STATE) | _norm(layer, "ssm_c_norm", STATE)
        mixer = _attention(layer) if _is_odd(layer) else _selective(layer) | norms
        return _norm(layer, "attn_norm") | mixer | _feed_forward(layer)

    own = _selective_metadata() | {"attention.head_count_kv": _heads_by_layer(_is_odd)}
    return _base(**own), _stack(layer_of)


def _lfm2() -> tuple[dict[str, Any], Shapes]:
    def layer_of(layer: int) -> Shapes:
        heads = _norm(layer, "attn_q_norm", HEAD) | _norm(layer, "attn_k_norm", HEAD)
        convolution: Shapes = {
            f"blk.{layer}.shortconv.conv.weight": (3, WIDTH),
            f"blk.{layer}.shortconv.in_proj.weight": (WIDTH, 3 * WIDTH),
            f"blk.{layer}.shortconv.out_proj.weight": (WIDTH, WIDTH),
        }
        mixer = _attention(layer) | heads if _is_odd(layer) else convolution
        return _norm(layer, "attn_norm") | mixer | _feed_forward(layer)

    own = {"shortconv.l_cache": 3, "attention.head_count_kv": _heads_by_layer(_is_odd)}
    return _base(**own), _stack(layer_of, last_norm="token_embd_norm.weight")


def _qwen3next() -> tuple[dict[str, Any], Shapes]:
    groups, heads, size, experts = 2, 4, 16, 2
    keys, values = groups * size, heads * size

    def linear(layer: int) -> Shapes:
        return {
            f"blk.{layer}.attn_qkv.weight": (WIDTH, 2 * keys + values),
            f"blk.{layer}.attn_gate.weight": (WIDTH, values),
            f"blk.{layer}.ssm_conv1d.weight": (4, 2 * keys + values),
            f"blk.{layer}.ssm_dt.bias": (heads,),
            f"blk.{layer}.ssm_a": (heads,),
            f"blk.{layer}.ssm_ba.weight": (WIDTH, 2 * heads),
            f"blk.{layer}.ssm_norm.weight": (size,),
            f"blk.{layer}.ssm_out.weight": (values, WIDTH),
        }

    def full(layer: int) -> Shapes:
        gated = {f"blk.{layer}.attn_q.weight": (WIDTH, 2 * HEADS * HEAD)}
        norms = _norm(layer, "attn_q_norm", HEAD) | _norm(layer, "attn_k_norm", HEAD)
        return _attention(layer) | gated | norms

    def feed_forward(layer: int) -> Shapes:
        return {
            f"blk.{layer}.ffn_gate_inp.weight": (WIDTH, experts),
            f"blk.{layer}.ffn_gate_exps.weight": (WIDTH, WIDTH, experts),
            f"blk.{layer}.ffn_up_exps.weight": (WIDTH, WIDTH, experts),
            f"blk.{layer}.ffn_down_exps.weight": (WIDTH, WIDTH, experts),
            f"blk.{layer}.ffn_gate_inp_shexp.weight": (WIDTH,),
            f"blk.{layer}.ffn_gate_shexp.weight": (WIDTH, WIDTH),
            f"blk.{layer}.ffn_up_shexp.weight": (WIDTH, WIDTH),
            f"blk.{layer}.ffn_down_shexp.weight": (WIDTH, WIDTH),
        }

    def layer_of(layer: int) -> Shapes:
        norms = _norm(layer, "attn_norm") | _norm(layer, "post_attention_norm")
        return norms | (full(layer) if _is_odd(layer) else linear(layer)) | feed_forward(layer)

    own: dict[str, Any] = {
        "full_attention_interval": 2,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": values,
        "ssm.state_size": size,
        "ssm.time_step_rank": heads,
        "ssm.group_count": groups,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "rope.dimension_sections": [HEAD // 4] * 4,
        "expert_count": experts,
        "expert_used_count": experts,
        "expert_feed_forward_length": WIDTH,
        "expert_shared_feed_forward_length": WIDTH,
    }
    return _base(**own), _stack(layer_of)


ARCHITECTURES: Final[dict[str, Callable[[], tuple[dict[str, Any], Shapes]]]] = {
    "llama": _llama,
    "gemma3": _gemma3,
    "mamba": _mamba,
    "jamba": _jamba,
    "lfm2": _lfm2,
    "qwen3next": _qwen3next,
}
"""By llama.cpp's name: the metadata of one and the shapes of its tensors, the fastest dimension first."""
