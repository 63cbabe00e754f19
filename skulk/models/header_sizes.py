"""What a GGUF header says of the memory that a model takes beside its weights.

| size | from |
|---|---|
| `kv_bytes_per_token` | sum over attention layers of KV heads x (key length + value length) x 2 bytes |
| `window_kv_bytes_per_token` | the part of it whose layers see only the last `window` tokens |
| `recurrent_bytes` | state of the recurrent layers, where there are some |
| `activations` | the most 32-bit values that one row of a step needs side by side |

Activations were read off llama.cpp's own figures for a dozen shapes (`no_alloc`, flash attention): a dense layer needs
three times its feed-forward length and four times the embedding; one with experts six times the length of all experts
that a token uses and four times the embedding, or what they give back twice, if that is more.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from skulk.models.gguf import GgufHeader

MAX_LAYERS: Final = 4096
_F16_BYTES: Final = 2
_F32_BYTES: Final = 4
_WINDOW_EVERY: Final = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "exaone4": 4, "olmo2": 4}
"""Of so many layers the last sees everything, where the header doesn't say (llama.cpp's ``load_swa_pattern``)."""


class HeaderSizes(NamedTuple):
    """See the module. Bytes, tokens, and numbers of 32-bit values."""

    kv_bytes_per_token: int
    window: int
    window_kv_bytes_per_token: int
    recurrent_bytes: int
    activations: int


def sizes_of(header: GgufHeader, architecture: str) -> HeaderSizes:
    """All sizes of a header."""
    window = header.get(f"{architecture}.attention.sliding_window", int, 0)
    seen_through = _window_kv_bytes(header, architecture) if window > 0 else 0
    return HeaderSizes(
        kv_bytes_per_token=kv_bytes_per_token(header, architecture),
        window=window if seen_through else 0,
        window_kv_bytes_per_token=seen_through,
        recurrent_bytes=recurrent_bytes(header, architecture),
        activations=activations(header, architecture),
    )


def activations(header: GgufHeader, architecture: str) -> int:
    """The module's rule; 0 where the header says too little."""
    width = header.get(f"{architecture}.embedding_length", int, 0)
    dense = max(_per_layer(header, f"{architecture}.feed_forward_length", None), default=0)
    inner = header.get(f"{architecture}.ssm.inner_size", int, 0)
    used = header.get(f"{architecture}.expert_used_count", int, 0)
    expert = header.get(f"{architecture}.expert_feed_forward_length", int, 0) or (dense if used else 0)
    if width <= 0 or max(dense, inner, used * expert) <= 0:
        return 0
    routed = max(6 * used * expert + 4 * width, 2 * used * (width + expert)) if used else 0
    # A state space layer holds its inner row twice more while it convolves.
    return max(3 * dense + 4 * width + 3 * inner, routed)


def kv_bytes_per_token(header: GgufHeader, architecture: str) -> int:
    """Bytes of one token in one sequence's 16-bit cache, over all layers, whatever they see."""
    kv_heads, (full, narrow) = _kv_heads(header, architecture), _row_lengths(header, architecture)
    sliding = _sliding(header, architecture, len(kv_heads))
    lengths = (narrow if is_narrow else full for is_narrow in sliding)
    return sum(count * length for count, length in zip(kv_heads, lengths, strict=True)) * _F16_BYTES


def _window_kv_bytes(header: GgufHeader, architecture: str) -> int:
    kv_heads, (_, narrow) = _kv_heads(header, architecture), _row_lengths(header, architecture)
    sliding = _sliding(header, architecture, len(kv_heads))
    return sum(count for count, is_narrow in zip(kv_heads, sliding, strict=True) if is_narrow) * narrow * _F16_BYTES


def _kv_heads(header: GgufHeader, architecture: str) -> tuple[int, ...]:
    """KV heads of each layer; none in a layer without attention."""
    heads = _per_layer(header, f"{architecture}.attention.head_count", 0)
    kv_heads = _per_layer(header, f"{architecture}.attention.head_count_kv", None) or heads
    interval = header.get(f"{architecture}.full_attention_interval", int, 1)
    if interval > 1:
        return tuple(count if (layer + 1) % interval == 0 else 0 for layer, count in enumerate(kv_heads))
    return kv_heads


def _row_lengths(header: GgufHeader, architecture: str) -> tuple[int, int]:
    """Key and value length of one head, together: of a layer that sees everything, and of one with a window."""
    most_heads = max(_per_layer(header, f"{architecture}.attention.head_count", 0), default=0)
    head = header.get(f"{architecture}.embedding_length", int, 0) // most_heads if most_heads else 0
    key = header.get(f"{architecture}.attention.key_length", int, head)
    value = header.get(f"{architecture}.attention.value_length", int, head)
    narrow_key = header.get(f"{architecture}.attention.key_length_swa", int, key)
    narrow_value = header.get(f"{architecture}.attention.value_length_swa", int, value)
    return key + value, narrow_key + narrow_value


def _sliding(header: GgufHeader, architecture: str, layers: int) -> tuple[bool, ...]:
    """Which layers see only a window; none where it isn't known: counting too much is the safe side."""
    nothing = (False,) * layers
    if header.get(f"{architecture}.attention.sliding_window", int, 0) <= 0:
        return nothing
    pattern = header.metadata.get(f"{architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, tuple) and len(pattern) == layers:
        return tuple(bool(one) for one in pattern)
    every = pattern if isinstance(pattern, int) else _WINDOW_EVERY.get(architecture, 1)
    return tuple(layer % every < every - 1 for layer in range(layers)) if every > 1 else nothing


def recurrent_bytes(header: GgufHeader, architecture: str) -> int:
    """Bytes of the state that a sequence has whatever its length (Mamba, gated delta nets); 0 without such layers."""
    inner = header.get(f"{architecture}.ssm.inner_size", int, 0)
    state = header.get(f"{architecture}.ssm.state_size", int, 0)
    if inner <= 0 or state <= 0:
        return 0
    conv = max(0, header.get(f"{architecture}.ssm.conv_kernel", int, 1) - 1)
    groups = header.get(f"{architecture}.ssm.group_count", int, 0)
    layers = header.get(f"{architecture}.block_count", int, 0)
    kv_heads = _per_layer(header, f"{architecture}.attention.head_count_kv", None)
    interval = header.get(f"{architecture}.full_attention_interval", int, 0)
    if interval > 1:
        layers -= layers // interval
    elif kv_heads and 0 in kv_heads:
        layers = kv_heads.count(0)
    return layers * (conv * (inner + 2 * groups * state) + state * inner) * _F32_BYTES


def _per_layer(header: GgufHeader, key: str, default: int | None) -> tuple[int, ...]:
    """A value that stands once for all layers or once for each; empty where it is absent and has no default."""
    architecture = key.split(".", 1)[0]
    layers = header.get(f"{architecture}.block_count", int, 0)
    value = header.metadata.get(key, default)
    if isinstance(value, int) and not isinstance(value, bool):
        return (max(0, value),) * min(layers, MAX_LAYERS)
    if isinstance(value, tuple):
        return tuple(max(0, item) for item in value if isinstance(item, int))
    return ()
