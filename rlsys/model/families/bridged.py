"""Models that rlsys has no weight table for, which mcore-bridge builds, loads and exports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlsys.config import RunConfig
from rlsys.model.families.base import LayerShape, ModelFamily
from rlsys.model.families.experts import Experts, experts_or_dense

if TYPE_CHECKING:
    from rlsys.model.shape import ModelShape

DISTRIBUTION = "mcore-bridge"
_NUM_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")
_DENSE_LAYERS = ("first_k_dense_replace", "moe_layer_start_index")


def is_bridged(config: RunConfig, shape: ModelShape) -> bool:
    """Whether mcore-bridge builds the model: by model.bridge, or because rlsys has no family."""
    return config.model.bridge == "mcore_bridge" or shape.family.is_bridged


def bridged_family(values: Mapping[str, Any]) -> ModelFamily:
    """The family of a config.json that FAMILIES lacks.

    Its rows count parameters for estimates only: mcore-bridge has the weights.

    Raises:
        ValueError: the model is not a decoder of text alone.
    """
    model_type, named = values.get("model_type"), values.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not named[0].endswith("ForCausalLM"):
        raise ValueError(
            f"model_type {model_type!r} with architectures = {named!r} is not supported: rlsys "
            "trains models of text, whose one architecture ends with ForCausalLM"
        )
    return ModelFamily(
        model_type=str(model_type),
        architecture=named[0],
        mlp=experts_or_dense,
        layers=_layers,
        own_sizes=_own_sizes,
        is_bridged=True,
    )


def _first(values: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    return next((values[key] for key in keys if values.get(key)), 0)


def _layers(values: Mapping[str, Any]) -> tuple[LayerShape, ...]:
    has_experts = _first(values, _NUM_EXPERTS) > 0
    dense = _first(values, _DENSE_LAYERS) if has_experts else 0
    return tuple(
        LayerShape(has_experts=has_experts and number >= dense)
        for number in range(values["num_hidden_layers"])
    )


def _own_sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    experts = Experts(
        number=_first(values, _NUM_EXPERTS),
        per_token=_first(values, _PER_TOKEN),
        size=values.get("moe_intermediate_size") or values["intermediate_size"],
    )
    return {"experts": experts}
