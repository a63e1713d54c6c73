"""Evaluation on held-out prompts: the section `eval`."""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from rlsys.config.schema.section import NonEmptyText, Section


class EvalConfig(Section):
    """Evaluation on held-out prompts: every `eval_steps` of a run, and `rlsys eval`."""

    num_generations: PositiveInt = 1
    """n, completions per held-out prompt (TRL: num_generations_eval; verl: val_kwargs.n). Above 1,
    evaluations log pass@k, mean@n, maj@n and standard errors."""
    temperature: NonNegativeFloat | None = None
    """Sampling temperature; 0 is greedy, with num_generations 1. null: rollout.temperature."""
    top_p: float | None = Field(default=None, gt=0.0, le=1.0)
    """Nucleus sampling. null: rollout.top_p."""
    top_k: NonNegativeInt | None = None
    """Sample among the k likeliest tokens; 0 is off. null: rollout.top_k."""
    correct: NonEmptyText | None = None
    """When a completion counts as correct in pass@k and maj@n: a reward function whose value is at
    least 1, or NAME >= NUMBER. null: the function with "accuracy" in its name, else the first."""
    pass_at_k: list[PositiveInt] = []
    """k of pass@k, at most num_generations. Empty: 1, 2, 4, ... and num_generations."""
