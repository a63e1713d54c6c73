"""A mixture of experts in words, for `rlsys explain`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlsys.model.families.experts import BALANCING_KEYS

if TYPE_CHECKING:
    from rlsys.config import Config, PolicyConfig, RunConfig
    from rlsys.model.shape import ModelShape

_UNUSED_KEYS = (*BALANCING_KEYS, "aux_loss_alpha", "seq_aux")
"""Keys of config.json about losses of the router, which the run's config sets."""


def describe_experts(
    config: RunConfig, shape: ModelShape, model_config: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """(part, description): what routers choose from and learn; [] for a dense model.

    Args:
        config: the run's config.
        shape: the policy's model.
        model_config: its config.json.
    """
    if not shape.is_moe:
        return []
    layers = len(shape.expert_layers)
    dtype = config.policy.moe_router_dtype or shape.family.router_dtype
    logits = {"fp32": "float32", "fp64": "float64", None: "the model's type"}[dtype]
    pairs = [
        (
            "experts",
            f"{shape.experts.per_token} of {shape.experts.number} for each token, in {layers} of "
            f"{shape.num_layers} layers; router logits in {logits}",
        ),
        ("router's losses", _losses(config.policy)),
    ]
    unused = [f"{key} = {model_config[key]}" for key in _UNUSED_KEYS if key in model_config]
    if unused:
        pairs.append(
            ("not used", f"{', '.join(unused)} in config.json: see policy.moe_aux_loss_coeff")
        )
    return pairs


def _losses(policy: PolicyConfig) -> str:
    among = {"aux_loss": "of each micro-batch", "seq_aux_loss": "of each row"}
    parts = []
    if policy.moe_aux_loss_coeff > 0:
        tokens = among[policy.moe_router_load_balancing_type]
        parts.append(f"{policy.moe_aux_loss_coeff:g} x load balancing among the tokens {tokens}")
    if policy.moe_z_loss_coeff > 0:
        parts.append(f"{policy.moe_z_loss_coeff:g} x z loss")
    return " + ".join(parts) or "none: nothing balances the experts"


def describe_replay(config: Config, shape: ModelShape) -> list[tuple[str, str]]:
    """(part, description): whose choices of experts the policy takes, and what they weigh."""
    return [("replay", _replay(config, shape))]


def _replay(config: Config, shape: ModelShape) -> str:
    if not config.rollout.router_replay:
        return "off: the policy's own routers choose, in log-probs and update"
    width = 1 if shape.experts.number <= 256 else 2
    token = width * len(shape.expert_layers) * shape.experts.per_token
    longest = config.data.max_prompt_length + config.rollout.max_completion_length
    mib = token * longest * config.rollout.generation_batch_size / 2**20
    return (
        f"the policy's tokens go to the experts that vLLM chose: {token:,} bytes for each token, "
        f"at most {mib:,.1f} MiB for a batch; the reference's own routers choose"
    )
