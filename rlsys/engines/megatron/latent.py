"""Multi-head latent attention on megatron-core: what differs from grouped queries."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from transformers import PretrainedConfig

from rlsys.model.shape import ModelShape

_NORM_EPS = 1e-6
"""Epsilon of the norms inside the attention, which transformers takes whatever rms_norm_eps is."""


def latent_options(hf: PretrainedConfig, shape: ModelShape) -> dict[str, Any]:
    """Options of MLATransformerConfig."""
    latent = shape.latent
    assert latent is not None
    rope = hf.rope_parameters
    return {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_nope_head_dim,
        "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "qk_layernorm": True,
        # The frequencies are transformers', see `rope.place_rotary`. YaRN's factors scale the
        # softmax (arXiv:2412.19437 names none; transformers and vLLM have mscale squared).
        "rope_type": "rope",
        "rotary_scaling_factor": rope.get("factor", 1.0),
        "mscale_all_dim": rope.get("mscale_all_dim") or 0.0,
        "apply_rope_fusion": False,  # megatron-core has a kernel for its own YaRN only
    }


def set_norm_eps(model: GPTModel) -> None:
    """Give the norms inside the attention transformers' epsilon.

    Transformer Engine fuses each with the linear layer behind it.
    """
    for layer in model.decoder.layers:
        for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
            module = getattr(layer.self_attention, name, None)
            if module is not None and hasattr(module, "eps"):
                module.eps = _NORM_EPS


class ReplicatedLinear(torch.nn.Linear):
    """A linear layer that each tensor-parallel rank has whole, and computes for its own tokens."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, bias: bool, **_: Any
    ):
        super().__init__(input_size, output_size, bias=bias, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        """[..., input_size] -> [..., output_size], and no bias, as megatron-core's layers do."""
        return F.linear(x, self.weight), None
