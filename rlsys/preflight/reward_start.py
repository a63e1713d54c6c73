"""Starts the reward processes of a run once, for `rlsys explain`: do its reward functions start?"""

from __future__ import annotations

from rlsys.config import Config
from rlsys.rewards.pool.failures import RewardCodeError
from rlsys.rewards.pool.scorer import local_scorer


def reward_start_problem(config: Config) -> str | None:
    """Why the reward functions would not start; None if they do.

    The processes are those of a run, one of each kind. Reward models are left out: to load them
    takes a GPU, or minutes.
    """
    # Once, as all workers make the same functions.
    reward = config.reward.model_copy(update={"reward_model": [], "num_workers": 1})
    if not reward.names:
        return None
    try:
        plugins = config.data.external_plugins
        local_scorer(reward, config.known_to_rewards, plugins=plugins).close()
    except RewardCodeError as error:
        return str(error)
    return None
