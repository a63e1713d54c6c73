"""How completions are scored: the section `reward`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt

from rlsys.config.field_types import REWARD_MODEL_PREFIX, PathText, RewardName, RewardSettings
from rlsys.config.schema.section import Section


class RewardConfig(Section):
    """How completions are scored."""

    reward_funcs: list[RewardName] = []
    """Registered names, see `rlsys rewards list`."""
    reward_model: list[PathText] = []
    """Folders or hub ids of sequence-classification models (ms-swift: --reward_model). Each is one
    more reward function, reward_model:PATH, in a process of its own. Its settings stand in
    reward_params under that name, or under reward_model for all models."""
    reward_model_placement: Literal["policy", "own"] = "policy"
    """GPUs of reward models. policy: the policy ranks' GPUs, which idle meanwhile; the model's
    weights stay there, so leave room. own: one GPU for each model."""
    reward_weights: list[float] | None = None
    """One weight per reward function, then one per reward model; null is 1 for each."""
    reward_params: dict[RewardName, RewardSettings] = {}
    """Settings of reward functions by name, `{soft_overlong: {cache_length: 128}}`: keyword
    arguments of the class, or of the function's call. Parameters called max_completion_length or
    model_path get the run's own value unless given here."""
    external_plugins: list[PathText] = []
    """Python files that register reward functions, trackers, preprocessors or datasets. Each may
    stand here or in data.external_plugins."""
    gate: dict[RewardName, RewardName] = {}
    """Functions that count only where another one is high enough: `{accuracy: format}` or
    `{accuracy: format >= 0.5}`; without a number it is 1. Where the gate is lower, the function is
    not called and its value is 0. A gate may not have a gate."""
    num_workers: PositiveInt = 1
    """Reward processes; they score groups while others are sampled. Async functions share one more
    process."""
    timeout_s: PositiveFloat = 60.0
    """Seconds that a reward function may take for one group. Then its process is killed, and each
    completion is tried alone with an equal share, at least a second, to find the one that hangs."""
    heartbeat_s: PositiveFloat | None = 30.0
    """Seconds without a sign of life after which a reward worker is killed, and what it had is
    scored by a new one. Only a process that is stopped, or a host that is cut off, gives none:
    what a function takes does not count, see timeout_s. null: off."""
    max_memory_mb: PositiveInt | None = None
    """MiB that a reward process and its children may hold before they are killed; null is a quarter
    of the machine's memory."""
    on_error: Literal["raise", "zero", "drop"] = "raise"
    """When a reward function raises or returns something that is not a reward: end the run with the
    traceback, score the completion 0, or drop it from the update."""
    on_timeout: Literal["raise", "zero", "drop"] | None = None
    """What happens to a completion that makes a reward function hang, crash or exceed its memory,
    as in on_error. null: on_error if that is zero or drop, otherwise zero, and the run goes on."""

    @property
    def names(self) -> list[str]:
        """All reward functions, reward models last: the order of their weights."""
        return self.reward_funcs + [REWARD_MODEL_PREFIX + path for path in self.reward_model]

    @property
    def names_that_check_rows(self) -> list[str]:
        """Reward functions whose check_row runs before training.

        Skips gated ones, which may never see such a row, and all when on_error is zero or drop.
        """
        if self.on_error != "raise":
            return []
        return [name for name in self.names if name not in self.gate]

    @property
    def models(self) -> list[str]:
        """The reward models among `names`."""
        prefix = REWARD_MODEL_PREFIX
        return [name for name in self.names if f"{name}:" == prefix or name.startswith(prefix)]

    @property
    def model_paths(self) -> list[str]:
        """Folders or hub ids of `models`, where they are given."""
        return [
            self.params[name]["path"] for name in self.models if "path" in self.params.get(name, {})
        ]

    @property
    def params(self) -> dict[str, dict[str, Any]]:
        """Settings by name; reward models have the shared ones and their path too."""
        shared = self.reward_params.get(REWARD_MODEL_PREFIX[:-1], {})
        completed = {}
        for name in self.models:
            path = name.removeprefix(REWARD_MODEL_PREFIX)
            own = {"path": path} if path != name else {}
            completed[name] = shared | own | self.reward_params.get(name, {})
        return self.reward_params | completed
