"""Multi-head latent attention (MLA, arXiv:2405.04434): keys and values from one small vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlsys.model.families.base import LayerShape, WeightRow, norm_row

if TYPE_CHECKING:
    from rlsys.model.shape import ModelShape

LATENT_SIZES = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
LATENT_KEYS = (
    # Names the code that the models were published with; transformers has its own by now.
    "auto_map",
    # A loss of pretraining.
    "aux_loss_alpha",
    "seq_aux",
    # Follow from other sizes.
    "head_dim",
    "qk_head_dim",
)
"""Further keys of DeepSeek's models with latent attention."""


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Sizes of a model's latent attention, by their names in config.json."""

    q_lora_rank: int | None
    """Numbers that the queries of a token come from; None: from the hidden state itself."""
    kv_lora_rank: int
    """Numbers that keys and values of a token come from."""
    qk_nope_head_dim: int
    """Numbers of a head's query and key that have no rotary embedding."""
    qk_rope_head_dim: int
    """Numbers that have one; in the key, all heads share them."""
    v_head_dim: int

    @property
    def qk_head_dim(self) -> int:
        """Numbers of a head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cached(self) -> int:
        """Numbers that a KV cache holds for a token, on each tensor-parallel rank."""
        return self.kv_lora_rank + self.qk_rope_head_dim


def latent_attention(shape: ModelShape, layer: LayerShape) -> list[WeightRow]:
    """Rows of a layer's attention; what all heads share is not cut by tensor parallelism."""
    latent = shape.latent
    assert latent is not None
    hidden, heads = shape.hidden_size, shape.num_heads
    q, kv = heads * latent.qk_head_dim, heads * (latent.qk_nope_head_dim + latent.v_head_dim)

    def linear(
        name: str, hf_name: str, size: tuple[int, int], axis: int | None = None
    ) -> WeightRow:
        names = (f"self_attention.{name}.weight",)
        return WeightRow(names, (f"self_attn.{hf_name}.weight",), (size,), tp_axis=axis)

    def norm(name: str, hf_name: str, size: int, follower: str) -> WeightRow:
        fused = f"self_attention.{follower}.layer_norm_weight"
        return norm_row(f"self_attn.{hf_name}", size, f"self_attention.{name}", fused)

    rank = latent.q_lora_rank
    if rank is None:
        rows = [linear("linear_q_proj", "q_proj", (q, hidden), 0)]
    else:
        rows = [
            linear("linear_q_down_proj", "q_a_proj", (rank, hidden)),
            norm("q_layernorm", "q_a_layernorm", rank, "linear_q_up_proj"),
            linear("linear_q_up_proj", "q_b_proj", (q, rank), 0),
        ]
    return [
        *rows,
        linear("linear_kv_down_proj", "kv_a_proj_with_mqa", (latent.cached, hidden)),
        norm("kv_layernorm", "kv_a_layernorm", latent.kv_lora_rank, "linear_kv_up_proj"),
        linear("linear_kv_up_proj", "kv_b_proj", (kv, latent.kv_lora_rank), 0),
        linear("linear_proj", "o_proj", (hidden, heads * latent.v_head_dim), 1),
    ]


def latent_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json -> the fields of its ModelShape that say what its attention is.

    Raises:
        ValueError: KV heads are fewer than heads, sizes of heads contradict each other, or vLLM
            has another YaRN.
        KeyError: a key is missing.
    """
    heads = values["num_attention_heads"]
    groups, turned = values.get("num_key_value_heads") or heads, values["qk_rope_head_dim"]
    if groups != heads:
        raise ValueError(
            f"num_key_value_heads = {groups} with num_attention_heads = {heads} is not possible: "
            "in latent attention each head has its own keys and values"
        )
    if turned % 2:
        raise ValueError(
            f"qk_rope_head_dim = {turned} should be even: rotary embeddings turn pairs of numbers"
        )
    latent = LatentAttention(
        values.get("q_lora_rank"),
        values["kv_lora_rank"],
        values["qk_nope_head_dim"],
        turned,
        values["v_head_dim"],
    )
    for key, size in (("head_dim", turned), ("qk_head_dim", latent.qk_head_dim)):
        if values.get(key) not in (None, size):
            raise ValueError(f"{key} = {values[key]!r} should be {size} by the sizes of the heads")
    _check_yarn(values.get("rope_scaling") or values.get("rope_parameters") or {})
    return {"latent": latent, "head_dim": latent.qk_head_dim}


def _check_yarn(rope: Mapping[str, Any]) -> None:
    """Refuse what vLLM's YaRN of latent attention skips, and transformers obeys.

    Raises:
        ValueError: names the key.
    """
    if rope.get("attention_factor") is not None or not rope.get("truncate", True):
        raise ValueError(
            "attention_factor and truncate of a rotary embedding are not supported in latent "
            "attention: leave them out"
        )
    if bool(rope.get("mscale")) != bool(rope.get("mscale_all_dim")):
        raise ValueError(
            "mscale and mscale_all_dim of a rotary embedding should both be numbers above 0 or "
            "both be left out: transformers skips one without the other, and vLLM does not"
        )
