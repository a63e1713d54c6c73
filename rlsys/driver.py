"""THE loop: sample, score, compare within groups, update, publish weights."""

from __future__ import annotations

from typing import Protocol

import torch

from rlsys.algo.advantages import compute_advantages
from rlsys.algo.batching import build_train_batch
from rlsys.algo.rollout_metrics import logged_metrics, rollout_metrics
from rlsys.algo.weighting import leave_out
from rlsys.config import Config
from rlsys.interrupts import held_back
from rlsys.timing import PhaseTimer
from rlsys.tracking.base import Metrics, Tracker
from rlsys.types import RolloutGroup, TrainBatch, UpdateOutput


class Rollouts(Protocol):
    """Prompts in, scored groups out."""

    def next_batch(self, step: int) -> list[RolloutGroup]:
        """The P scored groups of a step."""

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics of the held-out prompts, as eval/<name>."""

    def metrics(self) -> dict[str, float]:
        """Of the last batch, and of the time since the last call."""


class Policy(Protocol):
    """The trained model."""

    policy_version: int
    """Updates so far: one a step, so also the last step that was taken."""

    def compute_logprobs(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies: two [N, S] float32, in nats."""

    def update(self, batch: TrainBatch) -> UpdateOutput:
        """All optimizer steps of one rollout."""

    def peak_memory_gib(self) -> float:
        """Most memory that one of its ranks has held."""


class Reference(Protocol):
    """The frozen model."""

    def compute_logprobs(self, batch: TrainBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs and entropies: two [N, S] float32, in nats."""

    def refresh(self) -> None:
        """Take the policy's weights, or a share of them."""


class Publisher(Protocol):
    """Weight sync."""

    def publish(self) -> dict[str, float]:
        """Give every rollout engine the policy's weights; returns metrics."""


class Checkpoints(Protocol):
    """What is kept to continue from."""

    def after_step(self, step: int) -> None:
        """Save when it is time to."""


class Watch(Protocol):
    """What looks at the metrics of a step."""

    def observe(self, step: int, metrics: Metrics) -> list[str]:
        """New warnings; raises where going on would be a waste."""


def train(
    config: Config,
    rollouts: Rollouts,
    policy: Policy,
    reference: Reference | None,
    publisher: Publisher,
    tracker: Tracker,
    checkpoints: Checkpoints,
    watch: Watch,
) -> None:
    """GRPO from the policy's version to config.num_steps.

    Args:
        config: of the run.
        rollouts: samples with the weights that were published last; it may run ahead of the policy
            by config.rollout.max_staleness versions, which this loop needs not know.
        policy: what is trained.
        reference: where the KL term measures from; None when beta = 0.
        publisher: sends the policy's weights to the rollout engines.
        tracker: takes metrics and completions.
        checkpoints: keeps what a later process continues from.
        watch: warns where completions are not from this policy, or nothing is trained.
    """
    publisher.publish()  # the engines hold policy.policy_version from here on
    if config.eval_steps is not None and policy.policy_version == 0:
        tracker.log_metrics(0, rollouts.evaluate(0))
    for step in range(policy.policy_version + 1, config.num_steps + 1):
        timer = PhaseTimer()
        with timer("rollout"):
            groups_P = rollouts.next_batch(step)
            batch = build_train_batch(groups_P)
        if reference is not None:
            with timer("ref_logprobs"):
                batch.ref_logprobs, _ = reference.compute_logprobs(batch)
        if config.grpo.old_logprobs == "rollout":
            batch.old_logprobs = batch.rollout_logprobs
        elif config.recompute_old_logprobs:  # the policy is about to move within this rollout
            with timer("old_logprobs"):
                batch.old_logprobs, batch.entropies = policy.compute_logprobs(batch)
        with timer("advantages"):  # central: the only place where completions meet
            batch.advantages = compute_advantages(
                groups_P, batch, config.grpo, config.reward.reward_weights
            )
            leave_out(
                batch,
                groups_P,
                mask_truncated_completions=config.grpo.mask_truncated_completions,
            )
        with held_back():  # or an interruption would leave half a step
            with timer("policy_update"):
                update = policy.update(batch)
            with timer("weight_sync"):
                sync_metrics = publisher.publish()
            if reference is not None and config.refreshes_reference(step):
                with timer("reference_sync"):
                    reference.refresh()
            metrics = rollout_metrics(groups_P, batch) | update.metrics | sync_metrics
            metrics |= rollouts.metrics()
            metrics |= {
                "policy_version": update.policy_version,
                "memory(GiB)": policy.peak_memory_gib(),
            }
            metrics |= timer.metrics() | _throughput(config, metrics, batch, timer)
            tracker.log_metrics(step, metrics | logged_metrics(groups_P, beside=metrics))
            for warning in watch.observe(step, metrics):
                tracker.log_warning(step, warning)
        if config.eval_steps is not None and step % config.eval_steps == 0:
            tracker.log_metrics(step, rollouts.evaluate(step))
        checkpoints.after_step(step)


def _throughput(
    config: Config, metrics: dict[str, float], batch: TrainBatch, timer: PhaseTimer
) -> dict[str, float]:
    """Tokens a second: completion tokens of the rollout, all tokens of the update."""
    seconds = timer.metrics()
    # What runs ahead is sampled during the whole step, and the rollout phase is a wait for it.
    sampling = seconds["time/step" if config.rollout.max_staleness else "time/rollout"]
    return {
        "rollout/tokens_per_second": metrics["num_completion_tokens"] / sampling,
        "update/tokens_per_second": batch.lengths.sum().item() / seconds["time/policy_update"],
    }
