"""The model that the policy learns from: the section `teacher`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt

from rlsys.config.field_types import PathText
from rlsys.config.schema.section import Section


class TeacherConfig(Section):
    """The frozen model that the policy learns from, of any size, with the policy's tokenizer."""

    path: PathText | None = Field(default=None, min_length=1)
    """Hugging Face model folder or hub id. null: no teacher."""
    world_size: PositiveInt = 1
    """Ranks. Ranks that share neither layers nor tokens are replicas."""
    tensor_parallel_size: PositiveInt = 1
    """Ranks that share each layer."""
    context_parallel_size: PositiveInt = 1
    """Ranks that share the tokens of each sequence."""
    placement: Literal["policy", "own"] = "policy"
    """GPUs of the teacher. policy: rank r runs on the GPU of policy rank r, and its weights wait
    in host memory meanwhile. own: GPUs of its own, which saves that copy."""

    @property
    def num_replicas(self) -> int:
        """Models that compute different rows at once."""
        return self.world_size // (self.tensor_parallel_size * self.context_parallel_size)
