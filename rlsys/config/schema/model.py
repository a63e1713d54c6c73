"""The language model that is trained: the section `model`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlsys.config.field_types import PathText
from rlsys.config.schema.section import Section


class ModelConfig(Section):
    """The language model that is trained."""

    path: PathText = Field(min_length=1)
    """Hugging Face model folder or hub id. docs/models.md lists the families."""
    bridge: Literal["auto", "rlsys", "mcore_bridge"] = "auto"
    """What reads and writes the weights. rlsys: its own table, which knows these families. On
    GPUs, mcore_bridge: the package mcore-bridge (`pip install 'rlsys[bridge]'`), which knows more;
    it gathers weights one tensor at a time, so weight sync takes longer. auto: rlsys where it knows
    the model, else mcore_bridge."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights in policy, reference and rollout engine. auto: bfloat16 on GPUs, float32
    on CPU, where engines then agree to 1e-5."""
    fp32_lm_head: bool = False
    """Compute logits in float32 in policy, reference and rollout engine when `dtype` is bfloat16,
    so that their log-probs agree better (MiniMax-M1, arXiv:2506.13585; TRL's cast_lm_head_to_fp32).
    Weights stay in `dtype`. The policy needs vocabulary / tensor_parallel_size x hidden size x 4
    more bytes, and more time for logits."""
