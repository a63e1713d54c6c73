"""How rollout engines get new weights: the section `weight_sync`."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from rlsys.config.schema.section import Section


class WeightSyncConfig(Section):
    """How the rollout engines get the policy's weights after every update."""

    transport: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """How weights travel. auto: NCCL between GPUs, gloo on CPU, and ipc where policy and engines
    share GPUs (`placement: colocated`), which hands over memory of the same GPU."""
    bucket_mb: PositiveInt = 256
    """MiB sent at once. Both sides keep two such buffers, or larger ones if the largest tensor,
    often the embedding, is larger. Between two H200s more is not faster, and 64 takes twice as
    long."""
    in_place: bool = True
    """Copy straight into the rollout engine's parameters where they can be mapped, which the first
    update proves. false uses vLLM's own loader, as CPU engines always do for packed weights."""
    lora: Literal["auto", "adapter", "merged"] = "auto"
    """What engines get of a policy with policy.lora. adapter: the base once, then the adapter
    alone, which vLLM computes beside the base, as the policy does. merged: base + adapter as one
    model, which samples faster; in bfloat16 the sum is rounded. auto: adapter on GPUs where vLLM
    can, else merged."""
    verify: bool = True
    """Compare a checksum of every bucket on both sides, and refuse weights with NaNs or infinities,
    which the same pass finds."""
    timeout_s: PositiveFloat = 120.0
    """Seconds that one phase of a weight sync may take."""
