"""The numbers of a run that follow from its batch sizes, and how they come about."""

from __future__ import annotations

import math
from collections.abc import Iterator

from rlsys.config import Config, RunConfig
from rlsys.model.policy_memory import micro_batch_tokens
from rlsys.preflight.data import count_rows
from rlsys.text import counted


def batch_arithmetic(config: Config) -> list[tuple[str, str]]:
    """(quantity, value and formula) for every number that follows from the batch sizes."""
    rollout, policy = config.rollout, config.policy
    completions, steps = rollout.generation_batch_size, config.optimizer_steps_per_update
    prompts, per_step = config.num_prompts, config.global_batch_size
    return [
        (
            "prompts per step (P)",
            f"{prompts} = generation_batch_size {completions} / num_generations "
            f"{rollout.num_generations}",
        ),
        ("completions per step (N)", f"{completions} = P {prompts} x G {rollout.num_generations}"),
        *_running_ahead(config),
        (
            "completions an engine",
            f"{completions / rollout.num_engines:g} = {completions} / num_engines "
            f"{rollout.num_engines}, at most {rollout.max_num_seqs} at once (max_num_seqs)",
        ),
        (
            "optimizer steps per rollout",
            f"{steps} = {completions} / global_batch_size {per_step} x num_iterations "
            f"{config.grpo.num_iterations}",
        ),
        (
            "completions per optimizer step",
            f"{per_step} = policy.global_batch_size"
            + (" (generation_batch_size)" if policy.global_batch_size is None else ""),
        ),
        ("  of these, a rank has", per_rank(config)),
        ("  in micro-batches", micro_batches(config, "completion")),
        (
            "tokens a row, at most",
            f"{config.longest_row:,} = max_prompt_length {config.data.max_prompt_length:,} + "
            f"max_completion_length {rollout.max_completion_length:,}",
        ),
        (
            "tokens per step, at most",
            f"{completions * rollout.max_completion_length:,} sampled, "
            f"{completions * config.longest_row:,} trained on",
        ),
        *_run_length(config),
    ]


def per_rank(config: RunConfig) -> str:
    """Rows of an optimizer step that one data-parallel rank has."""
    policy, ranks = config.policy, config.data_parallel_size
    per_step = config.global_batch_size // config.rows_together
    return (
        f"{per_step // ranks} = {per_step} / {ranks} data-parallel ranks (world_size "
        f"{policy.world_size} / (TP {policy.tensor_parallel_size} x PP "
        f"{policy.pipeline_parallel_size} x CP {policy.context_parallel_size}))"
    )


def micro_batches(config: RunConfig, noun: str) -> str:
    """How the rows of a rank, each called `noun`, are cut into forward passes."""
    rows = config.global_batch_size // config.rows_together // config.data_parallel_size
    if config.policy.max_tokens_per_micro_batch is None:
        size = min(config.policy.micro_batch_size, rows)
        count = math.ceil(rows / size)
        micro = f"{count} of {'up to ' if rows % size else ''}{counted(size, noun)}"
    else:
        micro = f"as many {noun}s as fit"
    return f"{micro}, at most {micro_batch_tokens(config):,} tokens each"


def steps_of_epochs_text(
    config: RunConfig, rows: int | None, per_step: str, uncounted: str | None = None
) -> str:
    """num_train_epochs in steps, and whether max_steps wins.

    Args:
        config: with num_train_epochs.
        rows: that are trained on; None where they are not counted yet.
        per_step: what is left out, and the rows of a step.
        uncounted: what the rows are called where they are not counted.
    """
    num_rows = (uncounted or "rows, not counted yet") if rows is None else counted(rows, "row")
    by_epochs = None if rows is None else config.steps_of_epochs(rows)
    result = "" if by_epochs is None else f" = {counted(by_epochs, 'step')}"
    goes_first = "" if config.max_steps is None else f"; max_steps {config.max_steps} wins"
    return f"{config.num_train_epochs:g} x {num_rows}{per_step}{result}{goes_first}"


def optimizer_steps_text(config: RunConfig, num_steps: int) -> str:
    """Optimizer steps of the run, and those that warm up."""
    optimizer_steps = num_steps * config.optimizer_steps_per_update
    warmup = math.ceil(config.policy.warmup_ratio * optimizer_steps)
    return f"{counted(optimizer_steps, 'optimizer step')} ({warmup:,} of them warm-up)"


def _run_length(config: Config) -> Iterator[tuple[str, str]]:
    """Steps and epochs of the run, which may depend on the number of rows."""
    rows = count_rows(config.data)
    prompts = config.num_prompts
    by_epochs = None if rows is None else config.steps_of_epochs(rows)
    if config.num_train_epochs is not None:
        left_out = f" (less those over max_prompt_length) / P {prompts}"
        yield "num_train_epochs", steps_of_epochs_text(config, rows, left_out)
    num_steps = config.max_steps or by_epochs
    if num_steps is None:
        yield "the whole run", "known when the rows are counted, at the start of the run"
        return
    drawn = num_steps * prompts
    yield (
        "the whole run",
        f"{counted(num_steps, 'step')}: {counted(drawn, 'prompt')}, "
        f"{counted(num_steps * config.rollout.generation_batch_size, 'completion')}, "
        f"{optimizer_steps_text(config, num_steps)}",
    )
    if config.eval_steps is not None:
        yield "evaluations", evaluations_text(config.eval_steps, num_steps)
        n, limit = config.eval.num_generations, config.data.max_eval_prompts
        if n > 1:
            each = f"{counted(n, 'completion')} of each held-out prompt, {limit:,} prompts at most"
            yield "an evaluation", f"{each} a set"
    if rows:
        epochs = f"{drawn / rows:.2f} = {counted(drawn, 'prompt')} / {counted(rows, 'row')}"
    else:
        epochs = "unknown: rows not counted" if rows is None else "no rows"
    yield "epochs", epochs


def evaluations_text(every: int, num_steps: int) -> str:
    """How many evaluations a run has, and when."""
    number = num_steps // every
    if number:
        after = f"after every {every:,} of {num_steps:,} steps"
    else:
        after = f"not again: eval_steps {every:,} is more than the {counted(num_steps, 'step')}"
    return f"{1 + number:,}: before the first step, and {after}"


def _running_ahead(config: Config) -> Iterator[tuple[str, str]]:
    """Prompts that are sampled in addition to the P of the step."""
    rollout, prompts, ahead = config.rollout, config.num_prompts, config.num_prompts_ahead
    if ahead:
        rest = "continue" if rollout.max_staleness else "are given up and started again"
        yield (
            "prompts in flight, at most",
            f"{prompts + ahead} = P {prompts} + {ahead} that {rest} when the first {prompts} are "
            f"done; no token is more than max_staleness {rollout.max_staleness} weight versions "
            "old",
        )
    if rollout.dynamic_sample:
        times = rollout.max_resample_times
        yield (
            "prompts resampled per step",
            f"up to {times * prompts} = max_resample_times {times} x P {prompts}, in place of "
            "groups whose rewards are all equal",
        )
