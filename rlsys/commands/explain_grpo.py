"""What `rlsys explain` says of GRPO alone."""

from __future__ import annotations

from pathlib import Path

from rlsys.commands.explain_algorithm import describe_algorithm
from rlsys.commands.explain_batches import batch_arithmetic
from rlsys.commands.explain_colocated import describe_phases
from rlsys.commands.explain_experts import describe_replay
from rlsys.commands.explain_options import describe_passed_through, describe_sampling
from rlsys.commands.explain_parts import Pairs, Parts
from rlsys.config import Config
from rlsys.model.adapters import describe_adapter_sync
from rlsys.model.memory import MemoryEstimate, estimate_memory, estimate_reward_model
from rlsys.model.shape import ModelShape
from rlsys.preflight.checks import check_run
from rlsys.preflight.data import FIRST_ROWS
from rlsys.preflight.memory import frozen_shapes, gpu_warnings
from rlsys.preflight.rewards import reward_start_problem
from rlsys.problems import Problem
from rlsys.types import Device


def _problems(config: Config) -> list[Problem]:
    problems = check_run(config)
    if not problems and (stopped := reward_start_problem(config)) is not None:
        problems = [Problem(f"reward.reward_funcs: {stopped}")]
    return problems


def _method(config: Config) -> list[tuple[str, Pairs]]:
    return [
        ("Algorithm", describe_algorithm(config)),
        ("Sampling", describe_sampling(config.rollout)),
        ("Passed through, and not in the memory estimate", describe_passed_through(config)),
        ("Batches", batch_arithmetic(config)),
    ]


def _absent_actors(config: Config) -> Pairs:
    if config.grpo.beta == 0:
        return [("reference x 0", "grpo.beta is 0")]
    if config.reference_is_base:
        return [("reference x 0", "it is the policy with its adapter off (policy.lora)")]
    return []


def _weights(config: Config, shape: ModelShape, device: Device) -> Pairs:
    if config.policy.lora is None:
        return []
    return [("rollout engines", describe_adapter_sync(config, shape, device))]


def _memory(
    config: Config, shape: ModelShape, device: Device
) -> tuple[list[MemoryEstimate], list[str]]:
    of_rewards, unknown = _reward_model_memory(config, device)
    estimates = estimate_memory(config, shape, *frozen_shapes(config, shape), device=device)
    return [*estimates, *of_rewards], unknown


def _reward_model_memory(config: Config, device: Device) -> tuple[list[MemoryEstimate], list[str]]:
    """The estimate of the largest reward model, and the models whose weights are not here."""
    known, unknown = [], []
    for name in config.reward.models:
        settings = config.reward.params.get(name, {})
        estimate = None
        if "path" in settings:
            dtype = settings.get("dtype", "auto")
            estimate = estimate_reward_model(Path(settings["path"]), dtype=dtype, device=device)
        if estimate is None:
            unknown.append(name)
        else:
            known.append(estimate)
    return sorted(known, key=lambda estimate: -estimate.total_gib)[:1], unknown


GRPO_PARTS = Parts(
    problems=_problems,
    method=_method,
    absent_actors=_absent_actors,
    experts=describe_replay,
    weights=_weights,
    memory=_memory,
    warnings=gpu_warnings,
    phases=describe_phases,
    to_fit="policy.micro_batch_size or rollout.max_num_seqs",
    looked_at=f"The reward functions were started, and the first {FIRST_ROWS} rows of each text "
    "file read.",
)
