"""Qwen3-MoE: a mixture of experts in every layer, without shared experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlsys.model.families.base import LayerShape, ModelFamily, WeightRow
from rlsys.model.families.qwen2 import WINDOW_KEYS, window_of
from rlsys.model.families.qwen3 import QK_NORM_KEYS

if TYPE_CHECKING:
    from rlsys.model.shape import ModelShape


def experts(shape: ModelShape, layer: LayerShape) -> list[WeightRow]:
    """The router, then linear_fc1 of every expert, then linear_fc2 of every expert."""
    hidden, ffn = shape.hidden_size, shape.moe_intermediate_size
    router = WeightRow(("mlp.router.weight",), ("mlp.gate.weight",), ((shape.num_experts, hidden),))
    linears: dict[str, tuple[tuple[str, ...], tuple[int, int]]] = {
        "linear_fc1": (("gate_proj", "up_proj"), (ffn, hidden)),
        "linear_fc2": (("down_proj",), (hidden, ffn)),
    }
    return [
        router,
        *(
            WeightRow(
                (
                    f"mlp.experts.local_experts.{expert}.{linear}.weight",
                    f"mlp.experts.{linear}.weight{expert}",
                ),
                tuple(f"mlp.experts.{expert}.{hf_linear}.weight" for hf_linear in hf_linears),
                (hf_shape,) * len(hf_linears),
                experts=f"mlp.experts.{linear}",
            )
            for linear, (hf_linears, hf_shape) in linears.items()
            for expert in range(shape.num_experts)
        ),
    ]


def _expert_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    # transformers 5 writes num_local_experts, transformers 4 and the models on the hub num_experts.
    num_experts = values.get("num_local_experts") or values["num_experts"]
    per_token, normalised = values["num_experts_per_tok"], values.get("norm_topk_prob", False)
    if not 0 < per_token <= num_experts:
        raise ValueError(
            f"num_experts_per_tok = {per_token} of {num_experts} experts is not possible"
        )
    if per_token == 1 and normalised:
        raise ValueError(
            "norm_topk_prob with num_experts_per_tok = 1 makes every weight 1, so that the router "
            "would not be trained: it is not supported"
        )
    return {
        "num_experts": num_experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": values["moe_intermediate_size"],
        "norm_topk_prob": normalised,
    }


def _layers(values: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    layer = LayerShape(has_experts=True, window=window_of(values))
    return (layer,) * values["num_hidden_layers"]


QWEN3_MOE = ModelFamily(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    sizes=("moe_intermediate_size", "num_experts_per_tok"),
    # The last two are of losses that balance experts, which rlsys does not add.
    keys=(
        "norm_topk_prob",
        "num_experts",
        "num_local_experts",
        "output_router_logits",
        "router_aux_loss_coef",
    ),
    inert=WINDOW_KEYS | QK_NORM_KEYS | {"mlp_only_layers": ([],)},  # each layer has experts
    defaults={"num_key_value_heads": 4, "sliding_window": 4096},
    has_qk_norm=True,
    layers=_layers,
    mlp=experts,
    own_sizes=_expert_sizes,
)
