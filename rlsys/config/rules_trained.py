"""Rules between the policy's fields that say which parameters are trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.problems import Problem

if TYPE_CHECKING:
    from rlsys.config.schema import PolicyConfig

_WITHOUT_MODULES = (
    "moe_shared_expert_overlap",
    "moe_single_grouped_weight",
    "use_transformer_engine_op_fuser",
)
"""Options of megatron-core that go past the forward pass of linear layers, or change its inputs."""


def trained_rule_problems(policy: PolicyConfig) -> Iterator[Problem]:
    """Every rule among these fields that `policy` breaks, on any model."""
    freezing, training = (
        [
            f"policy.{name}"
            for name in type(policy).model_fields
            if name.startswith(start) and getattr(policy, name)
        ]
        for start in ("freeze_parameters", "trainable_parameters")
    )
    if policy.lora is not None:
        if freezing or training:
            yield Problem(
                f"{', '.join(freezing + training)} with policy.lora: adapters are trained and all "
                "else is frozen. Leave one of them out; policy.lora.target_modules and "
                "policy.lora.modules_to_save say what is trained"
            )
        if policy.overlap_param_gather:
            # megatron-core waits for weights where a module is called, and adapters are in none.
            yield Problem(
                "policy.overlap_param_gather with policy.lora is not supported: a forward pass "
                "would read adapters before they are gathered. Leave it out: adapters are small"
            )
        for name in filter(policy.megatron_kwargs.get, _WITHOUT_MODULES):
            yield Problem(
                f"policy.megatron_kwargs.{name} with policy.lora is not supported: it computes "
                "linear layers without calling their modules, to which adapters are added. Leave "
                "it out"
            )
    elif training and not freezing:
        yield Problem(
            f"{', '.join(training)} names exceptions of what is frozen, and nothing is: set "
            "policy.freeze_parameters, freeze_parameters_regex or freeze_parameters_ratio"
        )
