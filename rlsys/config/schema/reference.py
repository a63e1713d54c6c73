"""The frozen model that the policy is compared with: the section `reference`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from rlsys.config.field_types import PathText
from rlsys.config.schema.section import Section


class ReferenceConfig(Section):
    """The frozen model that the policy is compared with: by the KL term of `rlsys grpo`, if
    grpo.beta is above 0, and by the losses of `rlsys preference` that know a reference."""

    path: PathText | None = Field(default=None, min_length=1)
    """Hugging Face model folder or hub id; null is model.path. With policy.lora and null it is the
    policy itself with its adapter off, also one of policy.lora.path, and not a second model in
    memory."""
    world_size: PositiveInt = 1
    """Ranks. Ranks that share neither layers nor tokens are replicas."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks that share each layer."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share the tokens of each sequence."""
    sync_steps: PositiveInt | None = None
    """Steps between two copies of the policy's weights (TRL's ref_model_sync_steps), for `rlsys
    grpo`; null never copies."""
    mixup_alpha: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of the policy's weights in that copy; the rest is the reference's own (TR-DPO,
    arXiv:2404.09656; TRL's ref_model_mixup_alpha)."""
    placement: Literal["policy", "own"] = "policy"
    """GPUs of the reference. policy: rank r runs on the GPU of policy rank r, and its weights wait
    in host memory meanwhile. own: GPUs of its own, which saves that copy."""

    @property
    def num_replicas(self) -> int:
        """Models that compute different rows at once."""
        return self.world_size // (self.tensor_parallel_size * self.context_parallel_size)
