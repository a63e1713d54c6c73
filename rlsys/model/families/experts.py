"""Mixtures of experts: the rows of a layer with experts, and what families say of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of each layer that has some, and how tokens get to them."""

    number: int = 0
    """0 in dense models."""
    per_token: int = 0
    """Experts that a token goes through."""
    size: int = 0
    """Intermediate size of one expert."""
    shared_size: int = 0
    """Intermediate size of the expert that all tokens go through, beside the chosen ones."""
    has_shared_gate: bool = False
    """Whether a sigmoid for each token weighs the shared expert's output."""
    normalised: bool = False
    """Whether the weights of a token's experts are normalised to a sum of 1."""
    has_sigmoid_router: bool = False
    """Whether experts are scored by a sigmoid, and chosen by score + a fixed bias for each, as in
    DeepSeek-V3 (arXiv:2408.15664); else by softmax."""
    scaling_factor: float = 1.0
    """What the weights of a token's experts are multiplied by."""
    groups: int = 1
    """Groups of experts; a token chooses from the best `chosen_groups` groups only."""
    chosen_groups: int = 1
    best_of_group: int = 1
    """Experts of a group whose scores, summed, are the group's score."""


NO_EXPERTS = Experts()
"""Of a dense model."""


def experts_or_dense(shape: ModelShape, layer: LayerShape) -> list[WeightRow]:
    """Rows of a layer's MLP in a model that may have layers of both kinds."""
    if not layer.has_experts:
        return gated_mlp(shape, layer)
    return [*_router(shape), *_experts(shape), *_shared_expert(shape)]


def _router(shape: ModelShape) -> list[WeightRow]:
    num_experts = shape.experts.number
    rows = [
        WeightRow(("mlp.router.weight",), ("mlp.gate.weight",), ((num_experts, shape.hidden_size),))
    ]
    if shape.experts.has_sigmoid_router:
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
    hidden, ffn = shape.hidden_size, shape.experts.size
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
        for expert in range(shape.experts.number)
    ]


def _shared_expert(shape: ModelShape) -> list[WeightRow]:
    """The expert of all tokens, cut by tensor parallelism as a dense MLP is."""
    hidden, ffn, name = shape.hidden_size, shape.experts.shared_size, shape.family.shared_expert
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
    if shape.experts.has_shared_gate:
        rows.append(
            WeightRow(
                ("mlp.shared_experts.gate_weight",), (f"mlp.{name}_gate.weight",), ((1, hidden),)
            )
        )
    return rows


def read_experts(values: Mapping[str, Any], number: int) -> Experts:
    """config.json -> its experts, of which each layer has `number`, without shared ones.

    Raises:
        ValueError: the values contradict each other, or no router could be trained by them.
        KeyError: a key is missing.
    """
    per_token, normalised = values["num_experts_per_tok"], values.get("norm_topk_prob", False)
    if not 0 < per_token <= number:
        raise ValueError(f"num_experts_per_tok = {per_token} of {number} experts is not possible")
    if per_token == 1 and normalised:
        raise ValueError(
            "norm_topk_prob with num_experts_per_tok = 1 makes every weight 1, so that the router "
            "would not be trained: it is not supported"
        )
    return Experts(number, per_token, values["moe_intermediate_size"], normalised=normalised)


def sparse_experts(values: Mapping[str, Any]) -> Experts:
    """`read_experts` of Qwen's mixtures; raises what that raises.

    transformers 5 writes num_local_experts, transformers 4 and the models on the hub num_experts.
    """
    return read_experts(values, values.get("num_local_experts") or values["num_experts"])


def gated_experts(values: Mapping[str, Any]) -> Experts:
    """`sparse_experts` with a shared expert behind a gate."""
    shared = values["shared_expert_intermediate_size"]
    return replace(sparse_experts(values), shared_size=shared, has_shared_gate=True)


def grouped_experts(values: Mapping[str, Any], *, best_of_group: int) -> Experts:
    """`read_experts` of DeepSeek's mixtures: groups, a factor, shared experts without a gate.

    Raises:
        ValueError: the values contradict each other.
        KeyError: a key is missing.
    """
    number, per_token = values["n_routed_experts"], values["num_experts_per_tok"]
    groups, chosen = values.get("n_group") or 1, values.get("topk_group") or 1
    in_group = number // groups
    if number % groups or chosen > groups or per_token > chosen * in_group:
        raise ValueError(
            f"n_group = {groups}, topk_group = {chosen} and num_experts_per_tok = {per_token} do "
            f"not fit {number} experts"
        )
    return replace(
        read_experts(values, number),
        shared_size=values["n_shared_experts"] * values["moe_intermediate_size"],
        scaling_factor=scaling_factor(values),
        groups=groups,
        chosen_groups=chosen,
        best_of_group=best_of_group,
    )


def sigmoid_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json -> fields of the ModelShape of DeepSeek-V3, and of families with its router.

    Raises:
        ValueError: the values contradict each other, or megatron-core routes by other rules.
        KeyError: a key is missing.
    """
    mtp_layers = values.get("num_nextn_predict_layers") or 0
    if not values["norm_topk_prob"] and values["num_experts_per_tok"] > 1:
        raise ValueError(
            "norm_topk_prob = false is not supported in a router of sigmoids: megatron-core "
            "normalises the weights of a token's experts"
        )
    if type(mtp_layers) is not int or mtp_layers < 0:
        raise ValueError(f"num_nextn_predict_layers = {mtp_layers!r} should be a whole number")
    experts = replace(grouped_experts(values, best_of_group=2), has_sigmoid_router=True)
    return {"experts": experts, "num_mtp_layers": mtp_layers}


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
