"""Rules about the LoRA adapter outside the policy: the reference, and rollout engines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.problems import Problem

if TYPE_CHECKING:
    from rlsys.config.schema import Config, ReferenceConfig

_BASE = "the reference is the policy with its adapter off (policy.lora)"
_OF_ACTORS = (
    "path",
    "world_size",
    "tensor_parallel_size",
    "context_parallel_size",
    "mixup_alpha",
    "placement",
)
"""Fields of a reference that is a model of its own."""
_OWN = "or set reference.path to the model, which makes a reference of its own"


def adapter_rules(config: Config) -> Iterator[Problem]:
    """Problems of reference and weight_sync.lora with policy.lora, or without it."""
    if config.policy.lora is None:
        if config.weight_sync.lora != "auto":
            yield Problem(
                f"weight_sync.lora = {config.weight_sync.lora} is for adapters, and policy.lora is "
                "null: set it, or leave weight_sync.lora out"
            )
        return
    if not config.reference_is_base:
        return
    reference = config.reference
    if reference.sync_steps is not None:
        yield Problem(
            f"reference.sync_steps = {reference.sync_steps} copies the policy's weights into the "
            f"reference, but {_BASE}: leave sync_steps out, {_OWN}"
        )
    yield from base_reference_problems(reference)


def base_reference_problems(reference: ReferenceConfig) -> Iterator[Problem]:
    """Fields that are for a model of its own, where the reference is the policy's base."""
    return unread_reference_problems(reference, f"{_BASE}: leave it out, {_OWN}")


def unread_reference_problems(reference: ReferenceConfig, why: str) -> Iterator[Problem]:
    """Fields for the actors of a reference, where it has none; `why`, and what to do."""
    for name in _OF_ACTORS:
        value = getattr(reference, name)
        # A run's saved config names the defaults too.
        if value != type(reference).model_fields[name].default:
            yield Problem(f"reference.{name} = {value} changes nothing, since {why}")
