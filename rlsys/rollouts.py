"""The rollout phase as the driver sees it: prompts in, scored groups out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from rlsys.actors.group import PhaseTimeout
from rlsys.actors.reward import RewardWorkers
from rlsys.actors.rollout import RolloutActors
from rlsys.algo.advantages import advantages_of_group
from rlsys.algo.metrics import evaluation_metrics
from rlsys.config import Config
from rlsys.prompt_source import PromptStream
from rlsys.tracking.base import Tracker
from rlsys.types import Prompt, RolloutGroup

POLL_S = 0.5
"""Longest sleep between two looks at the reward workers, which enforce their own deadlines."""


class Rollouts:
    """Samples and scores: rewards of finished groups are computed while others are sampled."""

    def __init__(
        self,
        config: Config,
        *,
        engines: RolloutActors,
        rewards: RewardWorkers,
        prompts: PromptStream,
        validation: Sequence[Prompt],
        tracker: Tracker,
    ):
        self._config = config
        self._engines = engines
        self._rewards = rewards
        self._prompts = prompts
        self._validation = list(validation)
        self._tracker = tracker

    @property
    def epoch(self) -> float:
        """Passes over the training data so far."""
        return self._prompts.epoch

    def metrics(self) -> dict[str, float]:
        """What there is to tell about where prompts come from."""
        return self._prompts.metrics()

    def state_dict(self) -> dict[str, Any]:
        """Where in the data the run is, as JSON has it."""
        return {"prompts": self._prompts.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the run with this state was."""
        self._prompts.load_state_dict(state["prompts"])

    def next_batch(self, step: int) -> list[RolloutGroup]:
        """The P scored groups of a step, in the order of their prompts.

        Every group is logged as soon as it is scored.
        """
        groups = self._sample(
            self._prompts.take(self._config.num_prompts),
            step,
            num_generations=self._config.rollout.num_generations,
            on_scored=lambda group: self._tracker.log_completions(
                step, group, self._advantages_of(group)
            ),
        )
        for group in groups:
            self._prompts.observe(group)
        return groups

    def evaluate(self, step: int) -> dict[str, float]:
        """Rewards of one completion for each held-out prompt, at the sampling temperature.

        The seeds do not depend on `step`, so that two evaluations differ by their weights alone.
        """
        groups = self._sample(
            self._validation,
            0,
            num_generations=1,
            on_scored=lambda group: self._tracker.log_completions(step, group, None, "eval"),
        )
        return {f"eval/{name}": value for name, value in evaluation_metrics(groups).items()}

    def _sample(
        self,
        prompts: Sequence[Prompt],
        step: int,
        *,
        num_generations: int,
        on_scored: Callable[[RolloutGroup], None],
    ) -> list[RolloutGroup]:
        rollout = self._config.rollout
        self._engines.submit(
            prompts, step=step, num_generations=num_generations, temperature=rollout.temperature
        )
        scored: dict[int, RolloutGroup] = {}
        last_progress = time.monotonic()
        while len(scored) < len(prompts):
            ray.wait([*self._engines.pending_refs(), *self._rewards.pending_refs()], timeout=POLL_S)
            sampled_now, scored_now = self._engines.collect(), self._rewards.collect()
            for group in sampled_now:
                self._rewards.submit(group)
            for group in scored_now:
                scored[group.group_id] = group
                on_scored(group)
            if sampled_now or self._rewards.num_pending:
                last_progress = time.monotonic()  # slow rewards have their own deadline
            elif time.monotonic() - last_progress > rollout.timeout_s:
                raise PhaseTimeout(
                    f"rollout of step {step}: no group finished within rollout.timeout_s = "
                    f"{rollout.timeout_s:g} s; {len(scored)} of {len(prompts)} groups are done"
                )
        return [scored[group_id] for group_id in range(len(prompts))]

    def _advantages_of(self, group: RolloutGroup) -> list[float] | None:
        """Known already unless they depend on the rest of the batch."""
        config = self._config
        return advantages_of_group(group, config.grpo, config.reward.reward_weights)
