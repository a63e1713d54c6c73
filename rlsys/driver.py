"""THE loops: GRPO samples, scores, compares, updates and publishes; SFT takes and updates.

Preference training takes, asks the reference, and updates; distillation asks the teacher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlsys.algo.advantages import compute_advantages
from rlsys.algo.batching import build_sample_batch, build_train_batch
from rlsys.algo.evaluation import prediction_metrics
from rlsys.algo.preferences import HeldOut, build_preference_batch, held_out_metrics
from rlsys.algo.rollout_metrics import length_metrics, logged_metrics, rollout_metrics
from rlsys.algo.scores import build_score_batch, score_metrics
from rlsys.algo.weighting import leave_out
from rlsys.interrupts import held_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from rlsys.config import Config
    from rlsys.run.checkpoints import Checkpoints
    from rlsys.system import SftSystem, StreamSystem, System
    from rlsys.systems.distill import DistillSystem
    from rlsys.systems.preference import PreferenceSystem
    from rlsys.systems.score import ScoreSystem
    from rlsys.timing import PhaseTimer
    from rlsys.tracking.base import Metrics, Tracker
    from rlsys.tracking.health import Health
    from rlsys.types import RolloutGroup, Sample, TrainBatch

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
    reference, teacher, publisher = system.reference, system.teacher, system.publisher
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
        if teacher is not None:
            with timer("teacher_logprobs"):  # of the tokens that the policy sampled
                batch.teacher_logprobs, _ = teacher.compute_logprobs(batch)
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
        _update(system, step, batch, timer, tracker, health)
        if config.eval_steps is not None and step % config.eval_steps == 0:
            with timer("evaluation"):
                log(tracker, health, step, evaluate_sft(system))
        with timer("checkpoint"):
            checkpoints.after_step(step)


def train_preference(
    system: PreferenceSystem, tracker: Tracker, checkpoints: Checkpoints, health: Health
) -> None:
    """Run preference training from the policy's version to config.num_steps; as `train`."""
    config, samples, policy = system.config, system.samples, system.policy
    if config.eval_steps is not None and policy.policy_version == 0:
        log(tracker, health, 0, evaluate_preference(system))
    for step in range(policy.policy_version + 1, config.num_steps + 1):
        timer = system.timeline.begin_step(step)
        with timer("data"):
            rows = samples.take(config.rows_per_step)
            batch = build_preference_batch(rows)
        if config.preference.has_reference:
            with timer("ref_logprobs"):  # what the loss compares the policy with
                system.compare(rows, batch)
                batch.kl = system.estimate_kl(rows)
        kl = None if batch.kl is None else {"kl": batch.kl.item()}
        _update(system, step, batch, timer, tracker, health, kl)
        if config.eval_steps is not None and step % config.eval_steps == 0:
            with timer("evaluation"):
                log(tracker, health, step, evaluate_preference(system))
        with timer("checkpoint"):
            checkpoints.after_step(step)


def train_distill(
    system: DistillSystem, tracker: Tracker, checkpoints: Checkpoints, health: Health
) -> None:
    """Run distillation from the policy's version to config.num_steps; as `train`."""
    config, samples, policy = system.config, system.samples, system.policy
    if config.eval_steps is not None and policy.policy_version == 0:
        log(tracker, health, 0, evaluate_distill(system))
    for step in range(policy.policy_version + 1, config.num_steps + 1):
        timer = system.timeline.begin_step(step)
        with timer("data"):
            rows = samples.take(config.rows_per_step)
        if system.student is not None and system.student.has_step(step):
            with timer("weight_sync"):  # the engines hold policy.policy_version from here on
                of_tokens = system.publish()
            with timer("rollout"):  # the student answers the samples' prompts itself
                groups = system.student.sample(step, rows)
                batch = build_train_batch(groups)
            of_tokens |= length_metrics(groups) | {"on_policy": 1.0}
        else:
            of_tokens = {"on_policy": 0.0}
            with timer("data"):
                batch = build_sample_batch(rows)
        with timer("teacher"):  # its distributions at the tokens that are trained on
            batch.teacher = system.teacher.describe_tokens(batch)
        _update(system, step, batch, timer, tracker, health, of_tokens)
        if config.eval_steps is not None and step % config.eval_steps == 0:
            with timer("evaluation"):
                log(tracker, health, step, evaluate_distill(system))
        with timer("checkpoint"):
            checkpoints.after_step(step)


def evaluate_preference(system: PreferenceSystem) -> Metrics:
    """Loss, rewards and accuracy of each held-out set, as eval/loss or eval/NAME/loss."""
    metrics: dict[str, float] = {}
    for name, held_out in system.held_out_sets.items():
        kl, parts = system.estimate_kl(held_out), []
        for rows, batch in system.parts(held_out):
            system.compare(rows, batch, of=f"eval/{name}")
            batch.kl = kl
            parts.append(HeldOut(batch, system.policy.compute_logprobs(batch)[0]))
        prefix = f"eval/{name}/" if name else "eval/"
        found = held_out_metrics(parts, system.config.algorithm)
        metrics |= {prefix + key: value for key, value in found.items()}
    return metrics


def train_score(
    system: ScoreSystem, tracker: Tracker, checkpoints: Checkpoints, health: Health
) -> None:
    """Train a score head from the policy's version to config.num_steps; as `train`."""
    config, rows, policy = system.config, system.samples, system.policy
    if config.eval_steps is not None and policy.policy_version == 0:
        log(tracker, health, 0, evaluate_score(system))
    for step in range(policy.policy_version + 1, config.num_steps + 1):
        timer = system.timeline.begin_step(step)
        with timer("data"):
            batch = build_score_batch(rows.take(config.rows_per_step))
        _update(system, step, batch, timer, tracker, health)
        if config.eval_steps is not None and step % config.eval_steps == 0:
            with timer("evaluation"):
                log(tracker, health, step, evaluate_score(system))
        with timer("checkpoint"):
            checkpoints.after_step(step)


def evaluate_score(system: ScoreSystem) -> Metrics:
    """Loss, accuracy and rewards of each held-out set, as eval/loss or eval/NAME/loss."""
    metrics: dict[str, float] = {}
    config, size = system.config, EVAL_STEPS_AT_ONCE * system.config.rows_per_step
    for name, held_out in system.held_out_sets.items():
        scored = []
        for i in range(0, len(held_out), size):
            rows = held_out[i : i + size]
            batch = build_score_batch(rows, at_least=config.data_parallel_size)
            count = len(rows) * config.rows_together  # rows that have no text follow
            assert batch.labels is not None
            scored.append((system.policy.compute_scores(batch)[:count], batch.labels[:count]))
        prefix = f"eval/{name}/" if name else "eval/"
        found = score_metrics(scored, config.reward_model)
        metrics |= {prefix + key: value for key, value in found.items()}
    return metrics


def _update(
    system: StreamSystem[Any, Any],
    step: int,
    batch: TrainBatch,
    timer: PhaseTimer,
    tracker: Tracker,
    health: Health,
    of_batch: dict[str, float] | None = None,
) -> None:
    """Train the policy on the batch of a step, and log that beside the metrics `of_batch`."""
    with held_back():  # an interruption waits until the step is whole
        with timer("policy_update"):
            update = system.policy.update(batch)
        seconds, num_tokens = timer.metrics(), batch.lengths.sum().item()
        system.finish_step(num_tokens)
        own = {
            "policy_version": update.policy_version,
            "epoch": system.samples.epoch,
            "num_tokens": system.num_tokens,
            "tokens_per_second": num_tokens / seconds["time/step"],
            "memory(GiB)": system.policy.peak_memory_gib(),
        }
        reported = update.metrics | system.samples.metrics() | system.restarts.metrics()
        with timer("log"):
            log(tracker, health, step, reported | own | seconds | (of_batch or {}))


def evaluate_sft(system: SftSystem) -> Metrics:
    """Loss, perplexity and accuracy of each held-out set, as eval/loss or eval/NAME/loss."""
    metrics: dict[str, float] = {}
    for prefix, batches in _held_out_batches(system, system.config.data_parallel_size):
        found = _predictions(system.policy.compute_predictions, batches)
        metrics |= {prefix + key: value for key, value in found.items()}
    return metrics


def evaluate_distill(system: DistillSystem) -> Metrics:
    """As `evaluate_sft`, of the student, and as eval/teacher/loss of the teacher."""
    metrics: dict[str, float] = {}
    for prefix, batches in _held_out_batches(system, system.config.most_replicas):
        found = _predictions(system.policy.compute_predictions, batches)
        metrics |= {prefix + key: value for key, value in found.items()}
        if prefix not in system.scores_of_teacher:  # which never change
            system.scores_of_teacher[prefix] = _predictions(
                system.teacher.compute_predictions, batches
            )
        of_teacher = system.scores_of_teacher[prefix]
        metrics |= {f"{prefix}teacher/{key}": value for key, value in of_teacher.items()}
    return metrics


def _held_out_batches(
    system: StreamSystem[Any, Sample], num_replicas: int
) -> Iterator[tuple[str, list[TrainBatch]]]:
    """The batches of each held-out set, and what its metrics begin with."""
    size = EVAL_STEPS_AT_ONCE * system.config.rows_per_step
    for name, held_out in system.held_out_sets.items():
        batches = [
            build_sample_batch(held_out[i : i + size], at_least=num_replicas)
            for i in range(0, len(held_out), size)
        ]
        yield f"eval/{name}/" if name else "eval/", batches


def _predictions(
    compute: Callable[[TrainBatch], tuple[Tensor, Tensor]], batches: list[TrainBatch]
) -> dict[str, float]:
    """What the metrics are of `compute_predictions` of a model."""
    return prediction_metrics([(*compute(batch), batch.completion_mask) for batch in batches])


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
