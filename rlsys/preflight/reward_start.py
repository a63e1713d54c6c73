"""Starts the reward processes of a run once, for `rlsys explain`: do its reward functions start?"""

from __future__ import annotations

from rlsys.config import Config
from rlsys.rewards.pool.failures import RewardCodeError
from rlsys.rewards.pool.local import LocalBackend
from rlsys.rewards.pool.pool import RewardPool
from rlsys.rewards.pool.runner import process_settings


def reward_start_problem(config: Config) -> str | None:
    """Why the reward functions would not start; None if they do.

    The processes are those of a run, one of each kind. Reward models are left out: to load them
    takes a GPU, or minutes.
    """
    # Once, as all workers make the same functions.
    reward = config.reward.model_copy(update={"reward_model": [], "num_workers": 1})
    if not reward.names:
        return None
    settings = process_settings(reward, config.known_to_rewards, config.data.external_plugins)
    try:
        RewardPool(reward, LocalBackend(settings)).close()
    except RewardCodeError as error:
        return str(error)
    return None
