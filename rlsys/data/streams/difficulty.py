"""Difficulty-aware sampling: prompts that are solved always or never come less often."""

from __future__ import annotations

import math
import random
from typing import Any

from rlsys.data.streams.base import PromptStream
from rlsys.types import Prompt, RolloutGroup


class DifficultySampling(PromptStream):
    """A stream that skips prompts of another stream while they teach nothing.

    A group whose completions all have the same reward has no advantage and gives no gradient (the
    groups that DAPO, arXiv:2503.14476 section 3.2, samples in vain). After `patience` such groups
    in a row a prompt is skipped when its turn comes, except with probability `exploration`; one
    group with different rewards brings it back. So no prompt is lost for ever: a skipped one is
    still tried once in 1 / exploration epochs on average.

    Skipped positions of the stream count as taken for the epoch.
    """

    def __init__(self, stream: PromptStream, *, patience: int, exploration: float, seed: int):
        self._stream = stream
        self._patience = patience
        self._exploration = exploration
        self._seed = seed
        self._num_skipped = 0
        # By prompt: [groups without a signal in a row, their reward].
        self._useless: dict[str, list[float]] = {}
        self._reward_sum = 0.0
        self._num_groups = 0

    @property
    def epoch(self) -> float:
        """Passes over the training data, skipped prompts included."""
        return self._stream.epoch

    def take(self, n: int) -> list[Prompt]:
        """The next `n` prompts that are not skipped."""
        prompts: list[Prompt] = []
        while len(prompts) < n:
            position = self._stream.num_taken
            [prompt] = self._stream.take(1)
            in_a_row, _ = self._useless.get(prompt.prompt_id, (0, 0.0))
            if in_a_row >= self._patience and not self._explores(position):
                self._num_skipped += 1
            else:
                prompts.append(prompt)
        self.num_taken += n
        return prompts

    def observe(self, group: RolloutGroup) -> None:
        """Note whether the completions of a prompt differ in reward.

        Completions without a reward (NaN) do not count; fewer than two rewards say nothing.
        """
        self._stream.observe(group)
        totals = [output.total for output in group.rewards if not math.isnan(output.total)]
        if len(totals) < 2:
            return
        self._num_groups += 1
        self._reward_sum += sum(totals) / len(totals)
        prompt_id = group.prompt.prompt_id
        if min(totals) < max(totals):
            self._useless.pop(prompt_id, None)
        else:
            in_a_row, _ = self._useless.get(prompt_id, (0, 0.0))
            self._useless[prompt_id] = [in_a_row + 1, totals[0]]

    def metrics(self) -> dict[str, float]:
        """The number of prompts skipped now, and the share of the stream skipped so far."""
        skipped = [reward for n, reward in self._useless.values() if n >= self._patience]
        mean = self._reward_sum / self._num_groups if self._num_groups else 0.0
        positions = self.num_taken + self._num_skipped
        return self._stream.metrics() | {
            "difficulty/num_too_easy": float(sum(reward > mean for reward in skipped)),
            "difficulty/num_too_hard": float(sum(reward <= mean for reward in skipped)),
            "difficulty/frac_skipped": self._num_skipped / positions if positions else 0.0,
        }

    def state_dict(self) -> dict[str, Any]:
        """The state of both streams, in JSON's types."""
        return super().state_dict() | {
            "stream": self._stream.state_dict(),
            "num_skipped": self._num_skipped,
            "useless": dict(self._useless),
            "reward_sum": self._reward_sum,
            "num_groups": self._num_groups,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the stream with this state was."""
        super().load_state_dict(state)
        self._stream.load_state_dict(state["stream"])
        self._num_skipped = state["num_skipped"]
        self._useless = {name: list(record) for name, record in state["useless"].items()}
        self._reward_sum = state["reward_sum"]
        self._num_groups = state["num_groups"]

    def _explores(self, position: int) -> bool:
        return random.Random(f"{self._seed}:explore:{position}").random() < self._exploration
