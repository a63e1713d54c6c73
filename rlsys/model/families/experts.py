"""Mixtures of experts: the rows of a layer with experts, and what families say of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rlsys.model.families.base import LayerShape, WeightRow, gated_mlp

if TYPE_CHECKING:
    from rlsys.model.shape import ModelShape

EXPERT_SIZES = ("moe_intermediate_size", "num_experts_per_tok")
GROUP_SIZES = ("n_routed_experts", "n_shared_experts", "n_group", "topk_group")
SIGMOID_KEYS = (
    "first_k_dense_replace",
    "norm_topk_prob",
    "num_nextn_predict_layers",
    "output_router_logits",
    "routed_scaling_factor",
)
"""Keys of DeepSeek-V3, and of families with its mixture of experts."""
BALANCING_KEYS = ("output_router_logits", "router_aux_loss_coef")
"""Keys of losses that balance experts in pretraining; rlsys has settings of its own for them."""

SPARSE_KEYS = (
    "norm_topk_prob",
    "num_experts",
    "num_local_experts",
    "mlp_only_layers",
    *BALANCING_KEYS,
)
"""Keys of Qwen's mixtures, beside the sizes in `EXPERT_SIZES` and decoder_sparse_step."""


def experts_or_dense(shape: ModelShape, layer: LayerShape) -> list[WeightRow]:
    """Rows of a layer's MLP in a model that may have layers of both kinds."""
    if not layer.has_experts:
        return gated_mlp(shape, layer)
    return [*_router(shape), *_experts(shape), *_shared_expert(shape)]


def _router(shape: ModelShape) -> list[WeightRow]:
    num_experts = shape.num_experts
    rows = [
        WeightRow(("mlp.router.weight",), ("mlp.gate.weight",), ((num_experts, shape.hidden_size),))
    ]
    if shape.has_sigmoid_router:
        rows.append(
            WeightRow(
                ("mlp.router.expert_bias",),
                ("mlp.gate.e_score_correction_bias",),
                ((num_experts,),),
                dtype="float32",  # as in transformers and vLLM: bf16 would tie close scores
            )
        )
    return rows


def _experts(shape: ModelShape) -> list[WeightRow]:
    """linear_fc1 of every expert, then linear_fc2 of every expert."""
    hidden, ffn = shape.hidden_size, shape.moe_intermediate_size
    linears: dict[str, tuple[tuple[str, ...], tuple[int, int]]] = {
        "linear_fc1": (("gate_proj", "up_proj"), (ffn, hidden)),
        "linear_fc2": (("down_proj",), (hidden, ffn)),
    }
    return [
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
    ]


def _shared_expert(shape: ModelShape) -> list[WeightRow]:
    """The expert of all tokens, cut by tensor parallelism as a dense MLP is."""
    hidden, ffn, name = shape.hidden_size, shape.shared_expert_size, shape.family.shared_expert
    if not ffn:
        return []
    rows = [
        WeightRow(
            ("mlp.shared_experts.linear_fc1.weight",),
            (f"mlp.{name}.gate_proj.weight", f"mlp.{name}.up_proj.weight"),
            ((ffn, hidden), (ffn, hidden)),
            tp_axis=0,
        ),
        WeightRow(
            ("mlp.shared_experts.linear_fc2.weight",),
            (f"mlp.{name}.down_proj.weight",),
            ((hidden, ffn),),
            tp_axis=1,
        ),
    ]
    if shape.has_shared_expert_gate:
        rows.append(
            WeightRow(
                ("mlp.shared_experts.gate_weight",), (f"mlp.{name}_gate.weight",), ((1, hidden),)
            )
        )
    return rows


def expert_sizes(values: Mapping[str, Any], num_experts: int) -> dict[str, Any]:
    """config.json -> the fields of its ModelShape that say what its experts are.

    Raises:
        ValueError: the values contradict each other, or no router could be trained by them.
        KeyError: a key is missing.
    """
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


def sparse_expert_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """`expert_sizes` of Qwen's mixtures; raises what that raises.

    transformers 5 writes num_local_experts, transformers 4 and the models on the hub num_experts.
    """
    return expert_sizes(values, values.get("num_local_experts") or values["num_experts"])


def gated_expert_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """`sparse_expert_sizes` of a mixture with a shared expert behind a gate."""
    return sparse_expert_sizes(values) | {
        "shared_expert_size": values["shared_expert_intermediate_size"],
        "has_shared_expert_gate": True,
    }


def sigmoid_expert_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """`expert_sizes` of DeepSeek-V3's mixture: sigmoid router, groups, shared experts.

    Raises:
        ValueError: the values contradict each other, or megatron-core routes by other rules.
        KeyError: a key is missing.
    """
    num_experts, per_token = values["n_routed_experts"], values["num_experts_per_tok"]
    groups, chosen = values.get("n_group") or 1, values.get("topk_group") or 1
    mtp_layers = values.get("num_nextn_predict_layers") or 0
    if not values["norm_topk_prob"] and per_token > 1:
        raise ValueError(
            "norm_topk_prob = false is not supported in a router of sigmoids: megatron-core "
            "normalises the weights of a token's experts"
        )
    if type(mtp_layers) is not int or mtp_layers < 0:
        raise ValueError(f"num_nextn_predict_layers = {mtp_layers!r} should be a whole number")
    if num_experts % groups or chosen > groups or per_token > chosen * (num_experts // groups):
        raise ValueError(
            f"n_group = {groups}, topk_group = {chosen} and num_experts_per_tok = {per_token} do "
            f"not fit {num_experts} experts"
        )
    if groups > 1 and per_token // chosen != 2:
        raise ValueError(
            f"num_experts_per_tok = {per_token} with n_group = {groups} and topk_group = {chosen} "
            "is not supported: a group of experts is scored by its best two, which megatron-core "
            "does for two experts per chosen group"
        )
    return expert_sizes(values, num_experts) | {
        "has_sigmoid_router": True,
        "routed_scaling_factor": scaling_factor(values),
        "num_expert_groups": groups,
        "topk_group": chosen,
        "shared_expert_size": values["n_shared_experts"] * values["moe_intermediate_size"],
        "num_mtp_layers": mtp_layers,
    }


def scaling_factor(values: Mapping[str, Any]) -> float:
    """routed_scaling_factor of config.json.

    Raises:
        ValueError: it is something else than a number above 0.
    """
    scale = values["routed_scaling_factor"]
    if type(scale) not in (int, float) or scale <= 0:
        raise ValueError(f"routed_scaling_factor = {scale!r} should be a number above 0")
    return float(scale)


def dense_first(values: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    """Layers of which the first first_k_dense_replace have no experts.

    Raises:
        ValueError: first_k_dense_replace is not a number of layers, or no layer has experts.
    """
    first = values["first_k_dense_replace"]
    if type(first) is not int or first < 0:
        raise ValueError(f"first_k_dense_replace = {first!r} should be a whole number")
    return with_experts(
        (layer >= first for layer in range(values["num_hidden_layers"])),
        f"first_k_dense_replace = {first}",
    )


def sparse_layers(values: Mapping[str, Any], window: int | None = None) -> tuple[LayerShape, ...]:
    """Layers of Qwen's mixtures: experts in each decoder_sparse_step-th, but mlp_only_layers.

    Args:
        window: the sliding window of all layers.

    Raises:
        ValueError: mlp_only_layers names other layers, or no layer has experts.
    """
    num_layers, step = values["num_hidden_layers"], values.get("decoder_sparse_step") or 1
    dense = values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not set(dense) <= set(range(num_layers)):
        raise ValueError(
            f"mlp_only_layers = {dense!r} should be a list of layers, from 0 to {num_layers - 1}"
        )
    return with_experts(
        (layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)),
        f"decoder_sparse_step = {step} and mlp_only_layers = {dense}",
        window,
    )


def with_experts(
    layers: Iterable[bool], cause: str, window: int | None = None
) -> tuple[LayerShape, ...]:
    """Layers, by whether each has experts.

    Raises:
        ValueError: none has, because of `cause`.
    """
    shapes = tuple(LayerShape(has_experts=has_experts, window=window) for has_experts in layers)
    if not any(layer.has_experts for layer in shapes):
        raise ValueError(f"by {cause} no layer has experts, so the model is dense: not supported")
    return shapes
