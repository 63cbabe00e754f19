"""What models of some architectures consist of: metadata and the shapes of their tensors, as llama.cpp loads them.

llama, qwen2, qwen3   every token's keys and values are kept: memory can be cut anywhere
qwen3moe              the same with experts
gemma3                all layers but every `window_every`-th see a window and forget what lies before it
mamba                 one state a sequence, that every token changes
jamba                 layers of both kinds: states, and keys and values
lfm2                  short convolutions, and keys and values
qwen3next             a gated delta rule, experts, and keys and values
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

_RMS: Final = "attention.layer_norm_rms_epsilon"

Shapes = dict[str, tuple[int, ...]]


class Shape(NamedTuple):
    """The sizes of a model; those that an architecture doesn't have are ignored.

    ``feed_forward`` is one expert's width where there are experts, and the inner width of a state space layer.
    ``window_every``: of so many layers one sees everything.
    """

    layers: int = 4
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    key_length: int = 16
    value_length: int = 16
    feed_forward: int = 128
    experts: int = 2
    experts_used: int = 1
    window: int = 48
    window_every: int = 4
    state: int = 8
    context: int = 4096


def _base(shape: Shape, **own: Any) -> dict[str, Any]:
    return {
        "block_count": shape.layers,
        "context_length": shape.context,
        "embedding_length": shape.width,
        "feed_forward_length": shape.feed_forward,
        _RMS: 1e-5,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.key_length,
        "attention.value_length": shape.value_length,
    } | own


def _attention(shape: Shape, layer: int) -> Shapes:
    return {
        f"blk.{layer}.attn_q.weight": (shape.width, shape.heads * shape.key_length),
        f"blk.{layer}.attn_k.weight": (shape.width, shape.kv_heads * shape.key_length),
        f"blk.{layer}.attn_v.weight": (shape.width, shape.kv_heads * shape.value_length),
        f"blk.{layer}.attn_output.weight": (shape.heads * shape.value_length, shape.width),
    }


def _feed_forward(shape: Shape, layer: int) -> Shapes:
    return {
        f"blk.{layer}.ffn_norm.weight": (shape.width,),
        f"blk.{layer}.ffn_gate.weight": (shape.width, shape.feed_forward),
        f"blk.{layer}.ffn_up.weight": (shape.width, shape.feed_forward),
        f"blk.{layer}.ffn_down.weight": (shape.feed_forward, shape.width),
    }


def _norm(layer: int, name: str, width: int) -> Shapes:
    return {f"blk.{layer}.{name}.weight": (width,)}


def _selective(shape: Shape, layer: int) -> Shapes:
    """A state space layer of mamba."""
    rank = shape.width // 16
    return {
        f"blk.{layer}.ssm_in.weight": (shape.width, 2 * shape.feed_forward),
        f"blk.{layer}.ssm_conv1d.weight": (4, shape.feed_forward),
        f"blk.{layer}.ssm_conv1d.bias": (shape.feed_forward,),
        f"blk.{layer}.ssm_x.weight": (shape.feed_forward, rank + 2 * shape.state),
        f"blk.{layer}.ssm_dt.weight": (rank, shape.feed_forward),
        f"blk.{layer}.ssm_dt.bias": (shape.feed_forward,),
        f"blk.{layer}.ssm_a": (shape.state, shape.feed_forward),
        f"blk.{layer}.ssm_d": (shape.feed_forward,),
        f"blk.{layer}.ssm_out.weight": (shape.feed_forward, shape.width),
    }


def _selective_metadata(shape: Shape) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": 4,
        "ssm.inner_size": shape.feed_forward,
        "ssm.state_size": shape.state,
        "ssm.time_step_rank": shape.width // 16,
    }


def _stack(shape: Shape, layer_of: Callable[[int], Shapes], *, last_norm: str = "output_norm.weight") -> Shapes:
    shapes: Shapes = {last_norm: (shape.width,)}
    for layer in range(shape.layers):
        shapes |= layer_of(layer)
    return shapes


def _llama(shape: Shape) -> tuple[dict[str, Any], Shapes]:
    def layer_of(layer: int) -> Shapes:
        return _norm(layer, "attn_norm", shape.width) | _attention(shape, layer) | _feed_forward(shape, layer)

    return _base(shape), _stack(shape, layer_of)


def _qwen2(shape: Shape) -> tuple[dict[str, Any], Shapes]:
    _check_heads_fill_the_width(shape)

    def layer_of(layer: int) -> Shapes:
        biases: Shapes = {
            f"blk.{layer}.attn_q.bias": (shape.heads * shape.key_length,),
            f"blk.{layer}.attn_k.bias": (shape.kv_heads * shape.key_length,),
            f"blk.{layer}.attn_v.bias": (shape.kv_heads * shape.value_length,),
        }
        return _norm(layer, "attn_norm", shape.width) | _attention(shape, layer) | biases | _feed_forward(shape, layer)

    return _base(shape), _stack(shape, layer_of)


def _head_norms(shape: Shape, layer: int) -> Shapes:
    return _norm(layer, "attn_q_norm", shape.key_length) | _norm(layer, "attn_k_norm", shape.key_length)


def _qwen3(shape: Shape) -> tuple[dict[str, Any], Shapes]:
    def layer_of(layer: int) -> Shapes:
        attention = _norm(layer, "attn_norm", shape.width) | _attention(shape, layer) | _head_norms(shape, layer)
        return attention | _feed_forward(shape, layer)

    return _base(shape), _stack(shape, layer_of)


def _qwen3moe(shape: Shape) -> tuple[dict[str, Any], Shapes]:
    experts, used = max(2, shape.experts), max(1, shape.experts_used)

    def layer_of(layer: int) -> Shapes:
        attention = _norm(layer, "attn_norm", shape.width) | _attention(shape, layer) | _head_norms(shape, layer)
        routed: Shapes = {
            f"blk.{layer}.ffn_norm.weight": (shape.width,),
            f"blk.{layer}.ffn_gate_inp.weight": (shape.width, experts),
            f"blk.{layer}.ffn_gate_exps.weight": (shape.width, shape.feed_forward, experts),
            f"blk.{layer}.ffn_up_exps.weight": (shape.width, shape.feed_forward, experts),
            f"blk.{layer}.ffn_down_exps.weight": (shape.feed_forward, shape.width, experts),
        }
        return attention | routed

    own = {"expert_count": experts, "expert_used_count": used, "expert_feed_forward_length": shape.feed_forward}
    return _base(shape, **own), _stack(shape, layer_of)


def _gemma3(shape: Shape) -> tuple[dict[str, Any], Shapes]:
    def layer_of(layer: int) -> Shapes:
        norms = _norm(layer, "attn_norm", shape.width) | _norm(layer, "post_attention_norm", shape.width)
        norms |= _norm(layer, "post_ffw_norm", shape.width)
        return norms | _head_norms(shape, layer) | _attention(shape, layer) | _feed_forward(shape, layer)

    own = {"attention.sliding_window": shape.window, "attention.sliding_window_pattern": shape.window_every}
    return _base(shape, **own), _stack(shape, layer_of)


def _mamba(shape: Shape) -> tuple[dict[str, Any], Shapes]:
    def layer_of(layer: int) -> Shapes:
        return _norm(layer, "attn_norm", shape.width) | _selective(shape, layer)

    own = _selective_metadata(shape)
    own |= {"attention.head_count": 0, "attention.head_count_kv": 0, "feed_forward_length": 0}
    return _base(shape, **own), _stack(shape, layer_of)


def _heads_by_layer(shape: Shape, is_attention: Callable[[int], bool]) -> list[int]:
    return [shape.kv_heads if is_attention(layer) else 0 for layer in range(shape.layers)]


def _check_heads_fill_the_width(shape: Shape) -> None:
    assert shape.heads * shape.key_length == shape.width, "llama.cpp reads no lengths of heads for this architecture"


def _is_odd(layer: int) -> bool:
    return layer % 2 == 1


def _jamba(shape: Shape) -> tuple[dict[str, Any], Shapes]:
    _check_heads_fill_the_width(shape)

    def layer_of(layer: int) -> Shapes:
        norms = _norm(layer, "ssm_dt_norm", shape.width // 16)
        norms |= _norm(layer, "ssm_b_norm", shape.state) | _norm(layer, "ssm_c_norm", shape.state)
        mixer = _attention(shape, layer) if _is_odd(layer) else _selective(shape, layer) | norms
        return _norm(layer, "attn_norm", shape.width) | mixer | _feed_forward(shape, layer)

    own = _selective_metadata(shape) | {"attention.head_count_kv": _heads_by_layer(shape, _is_odd)}
    return _base(shape, **own), _stack(shape, layer_of)


def _lfm2(shape: Shape) -> tuple[dict[str, Any], Shapes]:
    _check_heads_fill_the_width(shape)

    def layer_of(layer: int) -> Shapes:
        heads = _head_norms(shape, layer)
        convolution: Shapes = {
            f"blk.{layer}.shortconv.conv.weight": (3, shape.width),
            f"blk.{layer}.shortconv.in_proj.weight": (shape.width, 3 * shape.width),
            f"blk.{layer}.shortconv.out_proj.weight": (shape.width, shape.width),
        }
        mixer = _attention(shape, layer) | heads if _is_odd(layer) else convolution
        return _norm(layer, "attn_norm", shape.width) | mixer | _feed_forward(shape, layer)

    own = {"shortconv.l_cache": 3, "attention.head_count_kv": _heads_by_layer(shape, _is_odd)}
    return _base(shape, **own), _stack(shape, layer_of, last_norm="token_embd_norm.weight")


def _qwen3next(shape: Shape) -> tuple[dict[str, Any], Shapes]:
    groups, heads, size, experts = 2, 4, 16, 2
    keys, values = groups * size, heads * size

    def linear(layer: int) -> Shapes:
        return {
            f"blk.{layer}.attn_qkv.weight": (shape.width, 2 * keys + values),
            f"blk.{layer}.attn_gate.weight": (shape.width, values),
            f"blk.{layer}.ssm_conv1d.weight": (4, 2 * keys + values),
            f"blk.{layer}.ssm_dt.bias": (heads,),
            f"blk.{layer}.ssm_a": (heads,),
            f"blk.{layer}.ssm_ba.weight": (shape.width, 2 * heads),
            f"blk.{layer}.ssm_norm.weight": (size,),
            f"blk.{layer}.ssm_out.weight": (values, shape.width),
        }

    def full(layer: int) -> Shapes:
        gated = {f"blk.{layer}.attn_q.weight": (shape.width, 2 * shape.heads * shape.key_length)}
        return _attention(shape, layer) | gated | _head_norms(shape, layer)

    def feed_forward(layer: int) -> Shapes:
        return {
            f"blk.{layer}.ffn_gate_inp.weight": (shape.width, experts),
            f"blk.{layer}.ffn_gate_exps.weight": (shape.width, shape.width, experts),
            f"blk.{layer}.ffn_up_exps.weight": (shape.width, shape.width, experts),
            f"blk.{layer}.ffn_down_exps.weight": (shape.width, shape.width, experts),
            f"blk.{layer}.ffn_gate_inp_shexp.weight": (shape.width,),
            f"blk.{layer}.ffn_gate_shexp.weight": (shape.width, shape.width),
            f"blk.{layer}.ffn_up_shexp.weight": (shape.width, shape.width),
            f"blk.{layer}.ffn_down_shexp.weight": (shape.width, shape.width),
        }

    def layer_of(layer: int) -> Shapes:
        norms = _norm(layer, "attn_norm", shape.width) | _norm(layer, "post_attention_norm", shape.width)
        return norms | (full(layer) if _is_odd(layer) else linear(layer)) | feed_forward(layer)

    own: dict[str, Any] = {
        "full_attention_interval": 2,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": values,
        "ssm.state_size": size,
        "ssm.time_step_rank": heads,
        "ssm.group_count": groups,
        "rope.dimension_sections": [shape.key_length // 4] * 4,
        "expert_count": experts,
        "expert_used_count": experts,
        "expert_feed_forward_length": shape.width,
        "expert_shared_feed_forward_length": shape.width,
    }
    return _base(shape, **own), _stack(shape, layer_of)


ARCHITECTURES: Final[dict[str, Callable[[Shape], tuple[dict[str, Any], Shapes]]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "gemma3": _gemma3,
    "mamba": _mamba,
    "jamba": _jamba,
    "lfm2": _lfm2,
    "qwen3next": _qwen3next,
}
"""By llama.cpp's name: the metadata of one and the shapes of its tensors, the fastest dimension first."""


def layout_of(architecture: str, shape: Shape, vocabulary: int, **changes: Any) -> tuple[dict[str, Any], Shapes]:
    """A whole model: its metadata with the architecture's name before each key, and the shapes of all its tensors.

    ``changes``: of its own metadata; ``__`` stands for a dot.
    """
    metadata, shapes = ARCHITECTURES[architecture](shape)
    metadata |= {key.replace("__", "."): value for key, value in changes.items()}
    common: Shapes = {"token_embd.weight": (shape.width, vocabulary), "output.weight": (shape.width, vocabulary)}
    header = {"general.architecture": architecture, **{f"{architecture}.{key}": own for key, own in metadata.items()}}
    return header, common | shapes
