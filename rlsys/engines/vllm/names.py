"""What vLLM calls parameters that it has loaded."""

from __future__ import annotations


def not_loaded(parameter_names: set[str], loaded: set[str]) -> list[str]:
    """The parameters that are not among those that vLLM's loader says it has loaded, in order.

    vLLM 0.26 loads `experts.routed_experts.w2_weight` and calls it `experts.w2_weight`.
    """
    return sorted(
        name
        for name in parameter_names - loaded
        if name.replace(".routed_experts.", ".") not in loaded
    )
