"""Rewards by name: pure Python, importable without torch.

A reward is a class derived from `ORM`, registered in `orms`; `plugins/README.md` shows how.
"""

from rlsys.plugins.load import load_plugins, plugin_problems
from rlsys.rewards.base import (
    ORM,
    AsyncORM,
    TrainerState,
    orms,
    register_reward,
    trl_style,
)
from rlsys.rewards.builtin import (  # noqa: F401  registers the built-in rewards
    accuracy,
    code,
    countdown,
    format,
    json_schema,
    judge,
    language,
    length,
    matching,
    reward_model,
    trl,
)
from rlsys.rewards.instances import RewardError, settings_of
from rlsys.rewards.scoring import (
    OWN_COLUMNS,
    Reward,
    check_call,
    check_functions,
)

__all__ = [
    "ORM",
    "OWN_COLUMNS",
    "AsyncORM",
    "Reward",
    "RewardError",
    "TrainerState",
    "check_call",
    "check_functions",
    "load_plugins",
    "orms",
    "plugin_problems",
    "register_reward",
    "settings_of",
    "trl_style",
]
