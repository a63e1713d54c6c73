"""Whether the models of a run fit into the memory of its GPUs, by the estimate."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from rlsys.config import (
    Config,
    PreferenceConfig,
    ReferenceConfig,
    ReferencedConfig,
    RunConfig,
    TeacherConfig,
)
from rlsys.model.colocated_memory import Phase, colocated_phases, pinned_gib
from rlsys.model.folder import find_model_folder
from rlsys.model.memory import (
    MemoryEstimate,
    estimate_memory,
    estimate_policy,
    estimate_reference,
    estimate_teacher,
    with_head_of_teacher,
)
from rlsys.model.shape import ModelShape, read_model_shape
from rlsys.model.snapshot_memory import snapshot_warning
from rlsys.preflight.devices import gpu_memory_gib, host_memory_gib
from rlsys.types import Device


def memory_warnings(config: RunConfig, device: Device) -> list[str]:
    """`gpu_warnings` for the GPUs of this machine; a running cluster's are unknown here."""
    gpu_gib = gpu_memory_gib() if device == "cuda" and "RAY_ADDRESS" not in os.environ else None
    if gpu_gib is None:
        return []
    folder = find_model_folder(config.model.path)
    policy = read_model_shape(folder, may_bridge=True, num_labels=config.num_labels)
    snapshots = snapshot_warning(config, policy, device, host_memory_gib())
    warnings = [] if snapshots is None else [snapshots]
    if isinstance(config, PreferenceConfig):
        estimates = estimate_preference(config, policy, device)
        return [*gpu_warnings(config, estimates, gpu_gib), *warnings]
    if not isinstance(config, Config):
        estimates = estimate_trained(config, policy, device)
        return [*gpu_warnings(config, estimates, gpu_gib), *warnings]
    estimates = estimate_memory(config, policy, *frozen_shapes(config, policy), device=device)
    return [
        *gpu_warnings(config, estimates, gpu_gib),
        *host_warnings(config, policy, estimates, gpu_gib, host_memory_gib()),
        *warnings,
    ]


def estimate_preference(
    config: PreferenceConfig, policy: ModelShape, device: Device
) -> list[MemoryEstimate]:
    """The memory of policy and reference, whose folder must be here."""
    estimates = [estimate_policy(config, policy, device=device)]
    if config.has_reference_model:
        shape = read_model_shape(find_model_folder(config.reference_path), may_bridge=True)
        estimates.append(estimate_reference(config, shape, device=device))
    return estimates


def estimate_trained(config: RunConfig, policy: ModelShape, device: Device) -> list[MemoryEstimate]:
    """The memory of a policy without reference, and of engines and a teacher if it has them."""
    estimates = [estimate_policy(config, policy, device=device)]
    if config.sampler is not None:
        sending, engine = estimate_memory(config.sampler, policy, policy, device=device)
        synced = estimates[0].plus("weight sync", sending.gib["weight sync"])
        estimates = [synced, engine]
    if config.teacher_path is not None:
        shape = read_model_shape(find_model_folder(config.teacher_path), may_bridge=True)
        estimates.append(estimate_teacher(config, shape, device=device))
        if config.divergence is not None and not config.teacher_top_k:
            estimates[0] = with_head_of_teacher(config, estimates[0], shape, device)
    return estimates


def frozen_shapes(config: Config, policy: ModelShape) -> tuple[ModelShape, ModelShape | None]:
    """The shapes of reference and teacher, for `estimate_memory`."""
    reference, teacher = policy, None
    if config.has_reference_model:
        reference = read_model_shape(find_model_folder(config.reference_path), may_bridge=True)
    if config.teacher_path is not None:
        teacher = read_model_shape(find_model_folder(config.teacher_path), may_bridge=True)
    return reference, teacher


def gpu_warnings(
    config: RunConfig, estimates: Sequence[MemoryEstimate], gpu_gib: float
) -> list[str]:
    """A warning for each kind of GPU whose models are estimated to need more memory than it has.

    Args:
        config: of a run on GPUs.
        estimates: of all roles that hold a model.
        gpu_gib: memory of a GPU.
    """
    by_role = {estimate.role: estimate for estimate in estimates}
    if isinstance(config, Config) and config.is_colocated:
        of_policy = _phase_warnings(colocated_phases(config, estimates, gpu_gib), gpu_gib)
    else:
        of_policy = _policy_warning(config, by_role, gpu_gib)
    warnings = list(of_policy)
    if config.sampler is not None:
        warnings += _rollout_warning(config.sampler, by_role["rollout"], gpu_gib)
    for role, section in _frozen_sections(config).items():
        warnings += _frozen_warning(section, by_role.get(role), gpu_gib)
    return warnings


def _frozen_sections(config: RunConfig) -> dict[str, ReferenceConfig | TeacherConfig]:
    """The sections of models that are not trained, by role."""
    sections: dict[str, ReferenceConfig | TeacherConfig] = {}
    if isinstance(config, ReferencedConfig):
        sections["reference"] = config.reference
    if config.used_teacher is not None:
        sections["teacher"] = config.used_teacher
    return sections


def host_warnings(
    config: Config,
    shape: ModelShape,
    estimates: Sequence[MemoryEstimate],
    gpu_gib: float | None,
    host_gib: float,
) -> Iterator[str]:
    """What has to wait in host memory while others have the GPUs, if that is too small for it.

    Args:
        shape: of the policy's model.
        gpu_gib: memory of a GPU; None if it is not known.
        host_gib: memory of the host that has all policy ranks.
    """
    if not config.is_colocated:
        return
    waiting, ranks = pinned_gib(config, shape, estimates, gpu_gib), config.policy.world_size
    needed = ranks * sum(waiting.values())
    if needed > host_gib:
        parts = ", ".join(f"{name} {gib:.1f}" for name, gib in waiting.items())
        by_rank = f" on each of {ranks} GPUs" if ranks > 1 else ""
        yield (
            f"{needed:.1f} GiB of pinned host memory are needed ({parts}{by_rank}) and this host "
            f"has {host_gib:.1f}: set colocated.offload_weights or colocated.offload_optimizer to "
            "false, set policy.lora, or use a host with more memory"
        )


def _phase_warnings(phases: Sequence[Phase], gpu_gib: float) -> Iterator[str]:
    for phase in phases:
        if phase.total_gib > gpu_gib:
            parts = ", ".join(f"{holder} {gib:.1f}" for holder, gib in phase.gib.items())
            yield (
                f"in the phase {phase.name} a GPU holds about {phase.total_gib:.1f} GiB ({parts}) "
                f"and has {gpu_gib:.1f}: {phase.remedy}"
            )


def _policy_warning(
    config: RunConfig, by_role: Mapping[str, MemoryEstimate], gpu_gib: float
) -> Iterator[str]:
    policy = by_role["policy"]
    at_work = policy.gib["activations"] + policy.gib["logits"]
    kept, sharers = policy.total_gib - at_work, []
    for role, section in _frozen_sections(config).items():
        if role in by_role and section.placement == "policy":
            # They take turns; the memory of the process itself stays.
            process = by_role[role].gib["process"]
            kept += process
            at_work = max(at_work, by_role[role].total_gib - process)
            sharers.append(f"the {role}")
    reward_model = by_role.get("reward_model")
    of_rewards = config.reward if isinstance(config, Config) else None
    if reward_model and of_rewards and of_rewards.reward_model_placement == "policy":
        kept += reward_model.total_gib * -(-len(of_rewards.models) // config.policy.world_size)
        sharers.append("reward models")
    shared = f", shared with {' and '.join(sharers)}," if sharers else ""
    yield from _policy_needs(config, kept + at_work, gpu_gib, shared)


def _policy_needs(
    config: RunConfig, needed: float, gpu_gib: float, shared: str = ""
) -> Iterator[str]:
    if needed > gpu_gib:
        yield (
            f"a GPU of the policy{shared} needs about {needed:.1f} GiB and has "
            f"{gpu_gib:.1f}: raise policy.tensor_parallel_size or policy.pipeline_parallel_size"
            + (", or policy.world_size" if config.policy.use_distributed_optimizer else "")
            + ", lower policy.max_tokens_per_micro_batch or policy.micro_batch_size, or set "
            "policy.recompute to full"
        )


def _rollout_warning(config: Config, estimate: MemoryEstimate, gpu_gib: float) -> Iterator[str]:
    rollout, needed = config.rollout, estimate.total_gib
    share = gpu_gib / rollout.engines_per_gpu
    if rollout.kv_cache_memory_mb is not None:
        if needed > share:
            yield (
                f"a rollout engine needs about {needed:.1f} GiB and its share of a GPU is "
                f"{share:.1f}: lower rollout.kv_cache_memory_mb or rollout.engines_per_gpu, or "
                "raise rollout.tensor_parallel_size"
            )
        return
    # vLLM fits the size of the KV cache to the GPU.
    needed, share = needed - estimate.gib["KV cache"], share * rollout.gpu_memory_utilization
    if needed > share:
        yield (
            f"a rollout engine needs about {needed:.1f} GiB of a GPU beside its KV cache and may "
            f"take {share:.1f}: raise rollout.tensor_parallel_size, lower rollout.engines_per_gpu "
            "or rollout.max_num_seqs"
        )


def _frozen_warning(
    section: ReferenceConfig | TeacherConfig, estimate: MemoryEstimate | None, gpu_gib: float
) -> Iterator[str]:
    if estimate is None or section.placement != "own":
        return
    if estimate.total_gib > gpu_gib:
        yield (
            f"a GPU of the {estimate.role} needs about {estimate.total_gib:.1f} GiB and has "
            f"{gpu_gib:.1f}: raise {estimate.role}.tensor_parallel_size"
        )
