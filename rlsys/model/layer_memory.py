"""What one layer keeps of each token for its backward pass."""

from rlsys.model.families.linear import LinearAttention
from rlsys.model.shape import ModelShape
from rlsys.types import Device

LINEAR_CHUNK_TOKENS = 64
"""Tokens of a sequence that linear attention computes together."""


def layer_numbers(shape: ModelShape, device: Device) -> int:
    """Numbers that a layer keeps for each token, with a fused attention: the layer with most.

    For dense layers on GPUs that is what was measured, to half a percent.
    """
    kinds = {layer.is_linear for layer in shape.layers}
    return max(_layer_numbers(shape, device, is_linear=kind) for kind in kinds)


def mean_layer_numbers(shape: ModelShape, device: Device) -> int:
    """The same, on average over the layers, of which some may have linear attention."""
    total = sum(_layer_numbers(shape, device, is_linear=layer.is_linear) for layer in shape.layers)
    return total // shape.num_layers


def _layer_numbers(shape: ModelShape, device: Device, *, is_linear: bool) -> int:
    if is_linear:
        assert shape.linear is not None
        attention = _linear_numbers(shape.linear)
    else:
        attention = _softmax_numbers(shape, device)
    # Both norms' inputs and outputs.
    return 4 * shape.hidden_size + attention + mlp_numbers(shape)


def _linear_numbers(sizes: LinearAttention) -> int:
    # Projected and convolved; in float32, by value head: q, k, v, what the state gets, outputs,
    # and of each chunk four square matrices and two states.
    chunk = LINEAR_CHUNK_TOKENS
    by_head = 3 * sizes.value_size + 2 * sizes.value_heads * sizes.key_dim
    by_chunk = 4 * sizes.value_heads * chunk + 2 * sizes.value_size * sizes.key_dim // chunk
    return 2 * sizes.qkvz + 2 * (by_head + by_chunk) + sizes.value_size


def _softmax_numbers(shape: ModelShape, device: Device) -> int:
    q, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    if shape.latent is None:
        # After the rotation. On CPU, what it came from is kept, too.
        qkv = (q + 2 * kv) * (2 if device == "cpu" else 1)
        qkv += 2 * q if shape.family.has_output_gate else 0  # the gate, and the gated output
    else:
        # Compressed, before and after its norm; q, k and v of all heads, as linear layers give
        # them and put together with what has a rotary embedding.
        compressed = (shape.latent.q_lora_rank or 0) + shape.latent.cached
        qkv = 2 * compressed + 2 * (2 * q + attention_output(shape))
    return qkv + attention_output(shape)


def attention_output(shape: ModelShape) -> int:
    """Numbers that attention gives for each token, before its output projection."""
    head_dim = shape.head_dim if shape.latent is None else shape.latent.v_head_dim
    return shape.num_heads * head_dim


def mlp_numbers(shape: ModelShape) -> int:
    """In the layers whose MLP keeps most."""
    # Gate, up and their product.
    dense = 3 * shape.intermediate_size if shape.has_dense_mlp else 0
    # The same for each expert of the token, its copy of the input, its output; router logits.
    expert = 2 * shape.hidden_size + 3 * shape.experts.size
    experts = shape.experts.per_token * expert + 2 * shape.experts.number
    return max(dense, experts + 3 * shape.experts.shared_size)
