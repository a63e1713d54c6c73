"""Memory of GPUs that policy and rollout engines share, as `rlsys explain` says it."""

from __future__ import annotations

from collections.abc import Sequence

from rlsys.commands.explain_parts import Pairs
from rlsys.config import Config
from rlsys.model.colocated_memory import colocated_phases, pinned_gib, weights_leave
from rlsys.model.memory import MemoryEstimate
from rlsys.model.shape import ModelShape
from rlsys.preflight.devices import host_memory_gib
from rlsys.preflight.memory import host_warnings


def describe_phases(
    config: Config, shape: ModelShape, estimates: Sequence[MemoryEstimate], gpu_gib: float | None
) -> tuple[Pairs, list[str]]:
    """What a GPU holds in each phase and what is pinned on the host, and what does not fit there.

    Nothing of runs whose roles have GPUs of their own.
    """
    if not config.is_colocated:
        return [], []
    pairs = [
        (f"{phase.name}, {phase.total_gib:.1f} GiB", _listed(phase.gib))
        for phase in colocated_phases(config, estimates, gpu_gib)
    ]
    waiting = pinned_gib(config, shape, estimates, gpu_gib)
    pairs.append((f"host, {sum(waiting.values()):.1f} GiB", f"pinned: {_listed(waiting)}"))
    if config.colocated.offload_weights == "auto":
        (policy,) = (estimate for estimate in estimates if estimate.role == "policy")
        stay = "leave" if weights_leave(config, policy, gpu_gib) else "stay on"
        of_gpu = "this GPU" if gpu_gib is not None else "a GPU, whose size is not known here,"
        text = f"the policy's weights {stay} {of_gpu} while engines sample"
        pairs.append(("offload_weights auto", text))
    return pairs, list(host_warnings(config, shape, estimates, gpu_gib, host_memory_gib()))


def _listed(gib: dict[str, float]) -> str:
    return ", ".join(f"{holder} {size:.1f}" for holder, size in gib.items()) or "nothing"
