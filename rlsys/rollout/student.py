"""What a student writes to the prompts of samples, for distillation on its own completions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING

import numpy as np

from rlsys.actors.waiting import PhaseTimeout
from rlsys.rollout.clock import Clock
from rlsys.rollout.draws import sampling_seed
from rlsys.types import Prompt, RolloutGroup, Sample, SampleRequest

if TYPE_CHECKING:
    from rlsys.actors.rollout import RolloutActors
    from rlsys.config import DistillConfig

POLL_S = 0.5
"""Longest wait between two looks at the engines."""


def prompt_of(sample: Sample) -> Prompt:
    """What comes before the last answer of a sample: the tokens up to its last row of targets."""
    targets = np.flatnonzero(sample.target_mask)
    last_gap = np.flatnonzero(np.diff(targets) > 1)
    start = targets[0] if len(last_gap) == 0 else targets[last_gap[-1] + 1]
    return Prompt(sample.sample_id, [], sample.token_ids[:start].tolist())


class StudentSamples:
    """The student's own completions, one for each sample.

    Args:
        config: says how many steps have them, and how they are sampled.
        engines: hold the student.
        clock: None is the machine's time.
    """

    def __init__(self, config: DistillConfig, engines: RolloutActors, clock: Clock | None = None):
        self._config = config
        self._engines = engines
        self._clock = clock or Clock()
        self._tickets = count()

    def has_step(self, step: int) -> bool:
        """Whether the student samples in this step: with probability distill.lmbda, by the seed."""
        drawn = random.Random(f"{self._config.seed}:{step}").random()
        return drawn < self._config.distill.lmbda

    def sample(self, step: int, samples: Sequence[Sample]) -> list[RolloutGroup]:
        """A completion of the prompt of each sample, in groups of one, in their order.

        Raises:
            PhaseTimeout: no completion was finished for rollout.timeout_s.
            ActorFailure: an engine died or raised, and is not replaced.
        """
        requests = [
            SampleRequest(
                ticket=next(self._tickets),
                prompt=prompt_of(sample),
                num_generations=1,
                temperature=self._config.rollout.temperature,
                seed=self._seed(step, place),
            )
            for place, sample in enumerate(samples)
        ]
        self._engines.submit(requests)
        found: dict[int, RolloutGroup] = {}
        last_progress = self._clock.monotonic()
        while len(found) < len(requests):
            waits_for_engine = self._engines.bring_back()
            self._clock.wait(self._engines.pending_refs(), timeout_s=POLL_S)
            groups = self._engines.collect()
            found |= {group.ticket: group for group in groups}
            if groups or waits_for_engine:
                last_progress = self._clock.monotonic()
            elif self._clock.monotonic() - last_progress > self._config.rollout.timeout_s:
                self._engines.restart_silent(self._timeout(step, len(found), len(requests)))
                last_progress = self._clock.monotonic()
        return [found[request.ticket] for request in requests]

    def _seed(self, step: int, place: int) -> int | None:
        if not self._config.rollout.seed_per_request:
            return None
        return sampling_seed(self._config.seed, step, place)

    def _timeout(self, step: int, done: int, total: int) -> PhaseTimeout:
        return PhaseTimeout(
            f"{self._engines.explain_silence()}rollout of step {step}: no completion finished "
            f"within rollout.timeout_s = {self._config.rollout.timeout_s:g} s; {done} of {total} "
            "are done"
        )
