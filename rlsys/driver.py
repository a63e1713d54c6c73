"""THE loops: GRPO samples, scores, compares, updates and publishes; SFT takes and updates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlsys.algo.advantages import compute_advantages
from rlsys.algo.batching import build_sample_batch, build_train_batch
from rlsys.algo.evaluation import prediction_metrics
from rlsys.algo.rollout_metrics import logged_metrics, rollout_metrics
from rlsys.algo.weighting import leave_out
from rlsys.interrupts import held_back

if TYPE_CHECKING:
    from rlsys.config import Config
    from rlsys.run.checkpoints import Checkpoints
    from rlsys.system import SftSystem, System
    from rlsys.timing import PhaseTimer
    from rlsys.tracking.base import Metrics, Tracker
    from rlsys.tracking.health import Health
    from rlsys.types import RolloutGroup, TrainBatch

EVAL_STEPS_AT_ONCE = 8
"""Held-out rows that travel together, in steps: fewer trips to the ranks."""


def train(system: System, tracker: Tracker, checkpoints: Checkpoints, health: Health) -> None:
    """Run GRPO from the policy's version to config.num_steps.

    Args:
        system: the running roles.
        tracker, checkpoints: log metrics, and save what a later process continues from.
        health: looks at the metrics of each step and evaluation, and warns of problems.
    """
    config, rollouts, policy = system.config, system.rollouts, system.policy
    reference, publisher = system.reference, system.publisher
    grpo, weights = config.grpo, config.reward.reward_weights
    publisher.publish()  # the engines hold policy.policy_version from here on
    if config.eval_steps is not None and policy.policy_version == 0:
        log(tracker, health, 0, rollouts.evaluate(0))
    for step in range(policy.policy_version + 1, config.num_steps + 1):
        timer = system.timeline.begin_step(step)
        with timer("rollout"):  # sample G completions for each prompt, and score them
            groups_P = rollouts.next_batch(step)
            batch = build_train_batch(groups_P)
        if reference is not None:
            with timer("ref_logprobs"):  # the frozen model's log-probs, for the KL
                batch.ref_logprobs, _ = reference.compute_logprobs(batch)
        if grpo.old_logprobs == "rollout":
            batch.old_logprobs = batch.rollout_logprobs
        elif config.recompute_old_logprobs:
            with timer("old_logprobs"):  # the policy's own, before it moves within this rollout
                batch.old_logprobs, batch.entropies = policy.compute_logprobs(batch)
        with timer("advantages"):  # the only place where completions are compared
            batch.advantages = compute_advantages(groups_P, batch, grpo, weights)
            leave_out(batch, groups_P, mask_truncated_completions=grpo.mask_truncated_completions)
        with held_back():  # an interruption waits until the step is whole
            with timer("policy_update"):  # all optimizer steps of this rollout
                update = policy.update(batch)
            with timer("weight_sync"):  # the engines sample the next step with the new weights
                sync_metrics = publisher.publish()
            if reference is not None and config.syncs_reference(step):
                with timer("reference_sync"):
                    reference.sync()
            reported = update.metrics | sync_metrics | rollouts.metrics()
            reported |= system.restarts.metrics()
            reported |= {
                "policy_version": update.policy_version,
                "memory(GiB)": policy.peak_memory_gib(),
            }
            metrics = _step_metrics(config, groups_P, batch, reported, timer)
            with timer("log"):
                tracker.log_tokens(step, groups_P, batch)
                log(tracker, health, step, metrics, logged_metrics(groups_P, beside=metrics))
        if config.eval_steps is not None and step % config.eval_steps == 0:
            with timer("evaluation"):
                log(tracker, health, step, rollouts.evaluate(step))
        with timer("checkpoint"):
            checkpoints.after_step(step)


def train_sft(
    system: SftSystem, tracker: Tracker, checkpoints: Checkpoints, health: Health
) -> None:
    """Run supervised training from the policy's version to config.num_steps; as `train`."""
    config, samples, policy = system.config, system.samples, system.policy
    if config.eval_steps is not None and policy.policy_version == 0:
        log(tracker, health, 0, evaluate_sft(system))
    for step in range(policy.policy_version + 1, config.num_steps + 1):
        timer = system.timeline.begin_step(step)
        with timer("data"):
            batch = build_sample_batch(samples.take(config.rows_per_step))
        with held_back():  # an interruption waits until the step is whole
            with timer("policy_update"):
                update = policy.update(batch)
            seconds = timer.metrics()
            num_tokens = batch.lengths.sum().item()
            system.finish_step(num_tokens)
            own = {
                "policy_version": update.policy_version,
                "epoch": samples.epoch,
                "num_tokens": system.num_tokens,
                "tokens_per_second": num_tokens / seconds["time/step"],
                "memory(GiB)": policy.peak_memory_gib(),
            }
            reported = update.metrics | samples.metrics() | system.restarts.metrics()
            with timer("log"):
                log(tracker, health, step, reported | own | seconds)
        if config.eval_steps is not None and step % config.eval_steps == 0:
            with timer("evaluation"):
                log(tracker, health, step, evaluate_sft(system))
        with timer("checkpoint"):
            checkpoints.after_step(step)


def evaluate_sft(system: SftSystem) -> Metrics:
    """Loss, perplexity and accuracy of each held-out set, as eval/loss or eval/NAME/loss."""
    metrics: dict[str, float] = {}
    config, size = system.config, EVAL_STEPS_AT_ONCE * system.config.rows_per_step
    for name, held_out in system.held_out_sets.items():
        batches = [
            build_sample_batch(held_out[i : i + size], at_least=config.data_parallel_size)
            for i in range(0, len(held_out), size)
        ]
        found = [(*system.policy.compute_predictions(b), b.completion_mask) for b in batches]
        prefix = f"eval/{name}/" if name else "eval/"
        metrics |= {prefix + key: v for key, v in prediction_metrics(found).items()}
    return metrics


def log(
    tracker: Tracker, health: Health, step: int, metrics: Metrics, logged: Metrics | None = None
) -> None:
    """Log metrics, with those that reward functions `logged`, and then new warnings.

    Raises:
        TrainingStopped: the metrics say that the run must not go on.
    """
    tracker.log_metrics(step, {**metrics, **(logged or {})})
    for warning in health.observe(step, metrics):
        tracker.log_health(warning)
    health.raise_if_stopped()


def _step_metrics(
    config: Config,
    groups_P: list[RolloutGroup],
    batch: TrainBatch,
    reported: dict[str, float],
    timer: PhaseTimer,
) -> dict[str, float]:
    """What the roles reported, with rewards and lengths, seconds of phases, tokens per second."""
    seconds = timer.metrics()
    metrics = rollout_metrics(groups_P, batch) | reported | seconds
    # A rollout that runs ahead is sampled during the whole step; its phase only waits for it.
    sampling = seconds["time/step" if config.rollout.max_staleness else "time/rollout"]
    update_tokens = batch.lengths.sum().item() * config.grpo.num_iterations
    return metrics | {
        "rollout/tokens_per_second": metrics["num_completion_tokens"] / sampling,
        "update/tokens_per_second": update_tokens / seconds["time/policy_update"],
    }
