"""Reward functions called in the test's own process, where a run has processes of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from rlsys.config import RewardConfig
from rlsys.rewards import Reward, TrainerState, check_functions
from rlsys.rewards.instances import Params
from rlsys.rewards.scoring import weighted_total
from rlsys.types import RewardOutput, RolloutGroup


class RewardFunctions:
    """Several reward functions in this process, each instantiated once."""

    def __init__(
        self,
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        params: Mapping[str, Params] | None = None,
        run_values: Params | None = None,
    ):
        """Look up and instantiate `names`.

        Args:
            names: registered names.
            weights: one per name; None is 1 for each.
            params: settings by name.
            run_values: values of the run by parameter name, see `settings_of`.

        Raises:
            ValueError: a name that is not registered or comes twice, or weights or settings that
                do not fit.
            RewardError: a class raised when it was instantiated.
        """
        check_functions(RewardConfig(reward_funcs=list(names), reward_weights=weights))
        self.rewards = [Reward(name, (params or {}).get(name), run_values) for name in names]
        self.weights = [1.0] * len(names) if weights is None else list(weights)

    def score(self, group: RolloutGroup, state: TrainerState | None = None) -> list[RewardOutput]:
        """[G] the rewards of the group's completions.

        Raises:
            RewardError: as of `Reward.score`.
        """
        by_name = {
            reward.name: (
                asyncio.run(reward.score_async(group, state))
                if reward.is_async
                else reward.score(group, state)
            ).values
            for reward in self.rewards
        }
        rows = [dict(zip(by_name, row, strict=True)) for row in zip(*by_name.values(), strict=True)]
        return [RewardOutput(weighted_total(row.values(), self.weights), row) for row in rows]
