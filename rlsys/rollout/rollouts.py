"""Rollouts as the driver sees them: prompts in, scored groups out, sampled ahead if allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from rlsys.actors.reward import RewardWorkers
from rlsys.actors.rollout import RolloutActors
from rlsys.algo.advantages import advantages_of_group, nanstd, rewards_matrix
from rlsys.algo.rollout_metrics import speculation_metrics
from rlsys.config import Config
from rlsys.data.streams.base import PromptStream
from rlsys.rollout.clock import Clock
from rlsys.rollout.draws import Draw, Draws, sampling_seed
from rlsys.rollout.evaluation import Evaluation, metrics_of_sets
from rlsys.rollout.pipeline import RolloutPipeline
from rlsys.tracking.base import Tracker
from rlsys.types import DraftCounts, Prompt, RolloutGroup, SampleRequest


@dataclass(slots=True)
class _Batch:
    """The batch of a step while it is collected."""

    step: int
    size: int
    """P, groups."""
    resamples_left: int
    """Groups with zero std that may still be replaced."""
    taken: list[tuple[Draw, RolloutGroup]] = field(default_factory=list)
    filtered: list[tuple[Draw, RolloutGroup]] = field(default_factory=list)
    """Groups whose rewards have zero std, which dynamic sampling left out."""
    staleness: list[int] = field(default_factory=list)
    """Staleness of every completion that was taken, in weight versions."""
    num_cut_off: int = 0
    num_filled: int = 0
    """Groups with zero std that were taken after all."""

    @property
    def room(self) -> int:
        """Number of missing groups."""
        return self.size - len(self.taken)


class Rollouts:
    """Samples, scores and collects batches, running ahead of the policy by a bounded distance.

    With weights of version v published, P + x prompts are begun or finished. The first P of them
    that are done become the batch of step v + 1. P is the size of a batch and x is
    `config.num_prompts_ahead`. The batch waits for a draw that would otherwise exceed
    `rollout.max_staleness`. With `max_staleness: 0` nothing may be left over: draws that are not in
    the batch are given up, and their prompts come first in the next step.
    """

    def __init__(
        self,
        config: Config,
        *,
        engines: RolloutActors,
        rewards: RewardWorkers,
        prompts: PromptStream,
        held_out: Mapping[str, Sequence[Prompt]],
        tracker: Tracker,
        training: Sequence[Prompt] = (),
        clock: Clock | None = None,
    ):
        """`training`: prompts of the stream that are in memory; checkpoints name them by id.
        `held_out`: prompts to evaluate on, by the name of their set. `clock`: None is the machine's
        time."""
        self._config = config
        self._engines = engines
        self._clock = clock or Clock()
        self._pipeline = RolloutPipeline(
            engines, rewards, timeout_s=config.rollout.timeout_s, clock=self._clock
        )
        self._prompts = prompts
        self._draws = Draws(prompts, known=training)
        self._before_batch: tuple[int, dict[str, Any]] = (0, {})
        """The last step whose batch was begun, and the state before it."""
        self._finished: dict[int, RolloutGroup] = {}
        """Scored groups that are not in a batch yet, by ticket."""
        self._scored_in_evaluation: list[RolloutGroup] = []
        """Training groups that the next batch sorts in."""
        self._held_out = held_out
        self._tracker = tracker
        self._metrics: dict[str, float] = {}
        self._measured_at = self._clock.monotonic()
        self._idle_before_s = 0.0
        self._drafts_before = DraftCounts(0, 0, 0)

    def state_dict(self) -> dict[str, Any]:
        """Where in the data the run is, in JSON's types; see Draws."""
        return self._draws.state_dict()

    def state_after(self, step: int) -> dict[str, Any]:
        """`state_dict` right after a step, even if the next one has begun."""
        begun, before = self._before_batch
        return before if step < begun else self.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; what was in flight is sampled again."""
        self._draws.load_state_dict(state)

    def close(self) -> Exception | None:
        """Stop the background, before Ray is shut down; returns what failed there, once."""
        return self._pipeline.close()

    def next_batch(self, step: int) -> list[RolloutGroup]:
        """The P scored groups of a step, in the order in which the stream gave their prompts.

        A group is logged as soon as it is in the batch. Without running ahead and oversampling
        that is as soon as it is scored. The background stops meanwhile and starts again before the
        return.

        Raises:
            RuntimeError: a completion is staler than max_staleness.
            PhaseTimeout, ActorFailure: see RolloutPipeline.wait.
        """
        self._pipeline.stop_background()
        self._before_batch = step, self.state_dict()
        start = self._clock.monotonic()
        rollout, size = self._config.rollout, self._config.num_prompts
        resamples = rollout.max_resample_times * size if rollout.dynamic_sample else 0
        batch = _Batch(step, size, resamples)
        self._begin(batch, self._num_wanted(step) - len(self._draws))
        for group in self._scored_in_evaluation:
            self._sort_in(batch, group)
        self._scored_in_evaluation = []
        self._take_finished(batch)
        while self._is_worth_waiting(batch):
            what = f"rollout of step {step}"
            for group in self._pipeline.wait(what, done=len(batch.taken), total=size):
                self._sort_in(batch, group)
            self._take_finished(batch)
        self._fill_up(batch)
        if rollout.max_staleness == 0:
            self._cut_off(batch)
        for _, group in self._in_order(batch.taken + batch.filtered):
            self._prompts.observe(group)
        self._metrics = self._batch_metrics(batch) | {
            "idle/policy_seconds": self._clock.monotonic() - start
        }
        self._pipeline.start_background()
        return [group for _, group in self._in_order(batch.taken)]

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics of the held-out prompts, sampled as the section `eval` of the config says.

        They share the engines with training completions in flight.
        """
        self._pipeline.stop_background()
        tickets = iter(self._draws.new_ticket, None)
        evaluation = Evaluation(self._config, self._held_out, tickets)
        self._pipeline.submit(evaluation.requests())
        while evaluation.done < evaluation.total:
            what = f"evaluation after step {step}"
            for group in self._pipeline.wait(what, done=evaluation.done, total=evaluation.total):
                taken = evaluation.take(group)
                if taken is None:
                    self._scored_in_evaluation.append(group)
                else:
                    self._tracker.log_completions(step, taken, None, "eval")
        self._pipeline.start_background()
        return metrics_of_sets(self._config, evaluation.groups())

    def metrics(self) -> dict[str, float]:
        """Metrics of the last batch, and timings since the previous call."""
        now, idle_s = self._clock.monotonic(), self._pipeline.idle_seconds()
        seconds = now - self._measured_at
        idle = {
            "idle/policy_seconds": self._metrics["idle/policy_seconds"],
            "idle/rollout_seconds": idle_s - self._idle_before_s,
        }
        self._measured_at, self._idle_before_s = now, idle_s
        shares = {
            name.replace("seconds", "frac"): value / seconds if seconds else 0.0
            for name, value in idle.items()
        }
        return self._metrics | idle | shares | self._draft_metrics() | self._prompts.metrics()

    def _draft_metrics(self) -> dict[str, float]:
        """What became of the drafts since the previous call; {} without speculative decoding."""
        if self._config.rollout.speculative_config is None:
            return {}
        before, self._drafts_before = self._drafts_before, self._engines.draft_counts()
        return speculation_metrics(self._drafts_before - before)

    def _num_wanted(self, step: int) -> int:
        """Draws to be begun or finished in `step`; none are begun beyond the last step."""
        config = self._config
        wanted = config.num_prompts + config.num_prompts_ahead
        if config.rollout.max_staleness == 0:  # none of them outlives the step
            return wanted
        return min(wanted, config.num_prompts * max(1, config.num_steps - step + 1))

    def _is_worth_waiting(self, batch: _Batch) -> bool:
        """Whether the batch has room, and is to be filled with what is in flight.

        Once the resamples are used up, groups with zero std fill it, unless a draw in flight would
        be too stale for the next step.
        """
        if not batch.room or len(self._draws) == len(self._finished):
            return False
        if batch.resamples_left or len(batch.filtered) < batch.room:
            return True
        return not self._draws.is_in_time(
            step=batch.step,
            room=0,
            batch_size=batch.size,
            max_staleness=self._config.rollout.max_staleness,
        )

    def _begin(self, batch: _Batch, n: int) -> None:
        """Sample `n` more prompts with the weights that the policy has now."""
        draws = self._draws.begin(n, version=batch.step - 1)
        rollout = self._config.rollout
        requests = []
        for ticket, draw in draws.items():
            key = draw.seed_key(batch.size)
            seed = sampling_seed(self._config.seed, *key) if rollout.seed_per_request else None
            requests.append(
                SampleRequest(
                    ticket, draw.prompt, rollout.num_generations, rollout.temperature, seed
                )
            )
        self._pipeline.submit(requests)

    def _sort_in(self, batch: _Batch, group: RolloutGroup) -> None:
        """Let a scored group into the batch, unless dynamic sampling leaves it out."""
        if not (self._config.rollout.dynamic_sample and has_zero_std(group)):
            self._finished[group.ticket] = group
            return
        batch.filtered.append((self._draws.consume(group.ticket), group))
        if batch.resamples_left:
            batch.resamples_left -= 1
            self._begin(batch, 1)

    def _take_finished(self, batch: _Batch) -> None:
        """Put finished groups into the batch, the most urgent first."""

        def due(ticket: int) -> tuple[int, int]:
            return self._draws[ticket].version, self._draws[ticket].position

        max_staleness = self._config.rollout.max_staleness
        for ticket in sorted(self._finished, key=due):
            if not batch.room:
                return
            if max_staleness and not self._draws.is_in_time(
                without=ticket,
                step=batch.step,
                room=batch.room - 1,
                batch_size=batch.size,
                max_staleness=max_staleness,
            ):
                continue
            group = self._finished.pop(ticket)
            self._take(batch, self._draws.consume(ticket), group)

    def _take(self, batch: _Batch, draw: Draw, group: RolloutGroup) -> None:
        taken = {group.group_id for _, group in batch.taken}
        numbers = (draw.position % batch.size, *range(batch.size))
        group = replace(group, group_id=next(n for n in numbers if n not in taken))
        for completion in group.completions:
            staleness = batch.step - 1 - completion.policy_versions[0]
            if staleness > self._config.rollout.max_staleness:
                raise RuntimeError(
                    f"step {batch.step} got a completion of {group.prompt.prompt_id!r} that was "
                    f"begun with weight version {completion.policy_versions[0]}: {staleness} "
                    f"versions stale, over rollout.max_staleness = "
                    f"{self._config.rollout.max_staleness}. This is a bug of rlsys, not of a config"
                )
            batch.staleness.append(staleness)
        batch.taken.append((draw, group))
        self._tracker.log_completions(batch.step, group, self._advantages_of(group))

    def _fill_up(self, batch: _Batch) -> None:
        """Fill the batch with zero-std groups, and log the rest as filtered."""
        batch.filtered = self._in_order(batch.filtered)
        batch.num_filled = batch.room
        filling, batch.filtered = batch.filtered[: batch.room], batch.filtered[batch.room :]
        for draw, group in filling:
            self._take(batch, draw, group)
        for number, (_, group) in enumerate(batch.filtered):
            logged = replace(group, group_id=number)
            advantages = self._advantages_of(logged)
            self._tracker.log_completions(batch.step, logged, advantages, "filtered")

    def _cut_off(self, batch: _Batch) -> None:
        """Give up what is unfinished: with the next weights it would be stale."""
        given_up = self._draws.give_up_all()
        self._pipeline.give_up(given_up)
        self._finished.clear()
        batch.num_cut_off = len(given_up)

    def _batch_metrics(self, batch: _Batch) -> dict[str, float]:
        rollout = self._config.rollout
        metrics = {
            "epoch": self._prompts.epoch,
            "staleness/mean": sum(batch.staleness) / len(batch.staleness),
            "staleness/max": float(max(batch.staleness)),
        }
        if self._config.num_prompts_ahead:
            metrics["rollout/groups_ahead"] = float(len(self._draws))
            metrics["rollout/groups_cut_off"] = float(batch.num_cut_off)
        if rollout.dynamic_sample:
            used = rollout.max_resample_times * batch.size - batch.resamples_left
            metrics |= {
                "dynamic_sample/groups_resampled": float(used),
                "dynamic_sample/resample_times": used / batch.size,
                "dynamic_sample/groups_filtered": float(len(batch.filtered)),
                "dynamic_sample/groups_without_variance": float(batch.num_filled),
            }
        return metrics

    def _advantages_of(self, group: RolloutGroup) -> list[float] | None:
        """Advantages; None if they depend on the rest of the batch."""
        config = self._config
        return advantages_of_group(group, config.grpo, config.reward.reward_weights)

    @staticmethod
    def _in_order(groups: list[tuple[Draw, RolloutGroup]]) -> list[tuple[Draw, RolloutGroup]]:
        return sorted(groups, key=lambda pair: pair[0].position)


def has_zero_std(group: RolloutGroup) -> bool:
    """Whether all rewards of a group are equal, so that it teaches nothing."""
    std = nanstd(rewards_matrix([group]))
    return bool(torch.isclose(std, torch.zeros_like(std)).all())
