"""How a student samples: the section `rollout` of distillation, and what rollout engines read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from rlsys.config.schema import Config, NonEmptyText, Section
from rlsys.problems import Problem, ProblemsError

if TYPE_CHECKING:
    from rlsys.config.distill import DistillConfig


class DistillRolloutConfig(Section):
    """How the student samples with vLLM, where distill.lmbda is above 0."""

    num_engines: PositiveInt = 1
    """vLLM engines, each with the whole student."""
    engines_per_gpu: PositiveInt = 1
    """Engines that share a GPU; see `rlsys grpo`."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs of each engine."""
    max_completion_length: PositiveInt = 256
    """Longest completion, in tokens; one that is cut there is learned from, too."""
    temperature: PositiveFloat = 1.0
    """Temperature of sampling; distill.temperature is that of the loss."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Mass of the likeliest tokens that are sampled from; 1 is all."""
    top_k: int = Field(default=0, ge=0)
    """Number of likeliest tokens that are sampled from; 0 is all."""
    stop: list[NonEmptyText] = Field(default=[])
    """Texts that end a completion."""
    stop_token_ids: list[NonNegativeInt] = Field(default=[])
    """Tokens that end a completion, besides the model's own."""
    skip_special_tokens: bool | Literal["auto"] = "auto"
    """Whether special tokens are left out of a completion's text."""
    max_num_seqs: PositiveInt = 256
    """Most sequences that an engine samples at once."""
    kv_cache_memory_mb: PositiveInt | None = None
    """MiB of the KV cache of an engine; null: vLLM sizes it, on CPU at most 4 GiB."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0.0, le=1.0)
    """Share of a GPU that its engines may take."""
    seed_per_request: bool = True
    """Seed each completion by itself: with equal weights, completions are the same after a
    resume."""
    engine_kwargs: dict[str, Any] = Field(default={})
    """Further arguments of vLLM's engine."""
    timeout_s: PositiveFloat = 600.0
    """Seconds in which one completion has to be finished."""
    heartbeat_s: PositiveFloat | None = 30.0
    """Seconds without a sign of life after which an engine is replaced. null: never."""


def sampler_config(config: DistillConfig) -> Config:
    """What rollout engines read of a distillation: a config of GRPO that samples as it does.

    Only engines, weight syncs and estimates of memory get it; its rewards mean nothing.

    Raises:
        ValidationError: fields of the student's sampling do not fit each other.
    """
    # The rows of a step, filled up for the rules of GRPO: whole groups of two, for each engine and
    # replica.
    unit = 2 * config.rollout.num_engines * max(1, config.data_parallel_size)
    batch = -(-config.rows_per_step // unit) * unit
    own = config.rollout.model_dump()
    of_run = ("output_dir", "seed", "device", "placement_timeout", "rendezvous_ports", "recovery")
    return Config.model_validate(
        config.model_dump(include=set(of_run) | {"model", "weight_sync"})
        | {
            "max_steps": config.max_steps or 1,
            "placement": "dedicated",
            "data": {"dataset": ["unused"], "max_prompt_length": config.data.max_length},
            "policy": config.policy.model_dump() | {"global_batch_size": None},
            "rollout": own | {"num_generations": 2, "generation_batch_size": batch},
            "reward": {"reward_funcs": ["format"]},
        }
    )


def sampling_problems(config: DistillConfig) -> list[Problem]:
    """Problems of the student's sampling, by the rules of GRPO."""
    try:
        sampler_config(config)
    except ValidationError as error:
        causes = [one.get("ctx", {}).get("error") for one in error.errors()]
        found = [p for c in causes if isinstance(c, ProblemsError) for p in c.problems]
        # Others are problems of this config too, which says them in its own words.
        return [p for p in found if p.text.startswith(("rollout.", "weight_sync."))]
    return []
