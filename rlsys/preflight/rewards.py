"""Whether the reward functions and losses of a run can be used, and which rewards are reachable."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.config import Config
from rlsys.model.detokenize import Detokenizer
from rlsys.plugins.load import plugin_problems
from rlsys.preflight.data import known_columns
from rlsys.problems import Problem
from rlsys.rewards import check_call, orms
from rlsys.rewards.base import OWN_FUNCTION
from rlsys.rewards.columns import column_problems_of_run, column_use, column_uses
from rlsys.rewards.pool.failures import RewardCodeError
from rlsys.rewards.pool.scorer import local_scorer
from rlsys.rewards.reachable import ReachableRewards
from rlsys.types import Completion, FinishReason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def reward_function_problems(config: Config) -> Iterator[Problem]:
    """Reward functions that are unknown, cannot be called, or lack a column of the data."""
    problems = list(_call_problems(config))
    yield from problems or _column_problems(config)


def _call_problems(config: Config) -> Iterator[Problem]:
    reward = config.reward
    not_loaded = list(plugin_problems("reward.external_plugins", reward.external_plugins))
    yield from not_loaded
    hint = " (a plugin above could not be loaded)" if not_loaded else ""
    listed = f" Known: {', '.join(orms.known())}."
    is_listed = False
    for name in reward.names:
        params, known = reward.params.get(name, {}), config.run_values
        try:
            # `_column_problems` reports missing columns, with those that the data has.
            check_call(name, params, known, column_use(name, params, known).needed)
        except ValueError as error:
            text = str(error)
            if is_listed:
                text = text.replace(listed, "").replace(OWN_FUNCTION, "")
            is_listed = is_listed or listed in text
            yield Problem(f"reward.reward_funcs: {text}{hint}", only_here=bool(not_loaded))


def _column_problems(config: Config) -> Iterator[Problem]:
    wanted = {column for use in column_uses(config).values() for column in use.needed}
    train = known_columns(config.data, "train", wanted)
    held_out = known_columns(config.data, "validation", wanted)
    for text in column_problems_of_run(config, train, held_out):
        yield Problem(f"reward.reward_funcs: {text}")


def algorithm_plugin_problems(config: Config) -> Iterator[Problem]:
    """Names that a plugin registers; the built-in ones are checked with the config."""
    grpo = config.grpo
    if not grpo.external_plugins:
        return
    from rlsys.algo.advantages import advantage_estimators
    from rlsys.algo.losses import losses

    not_loaded = list(plugin_problems("grpo.external_plugins", grpo.external_plugins))
    yield from not_loaded
    try:
        losses[grpo.loss_type]
        advantage_estimators[grpo.advantage_estimator]
    except ValueError as error:
        yield Problem(f"grpo: {error}", only_here=bool(not_loaded))


def reward_start_problem(config: Config) -> str | None:
    """Why the reward functions do not start; None if they do. For `rlsys explain`.

    Starts one process of each kind that a run has, but no reward models: to load them takes a GPU,
    or minutes.
    """
    reward = config.reward.model_copy(update={"reward_model": [], "num_workers": 1})
    if not reward.names:
        return None
    plugins = config.data.external_plugins
    try:
        local_scorer(reward, config.run_values, plugins=plugins).close()
    except RewardCodeError as error:
        return str(error)
    return None


def reachable_rewards(config: Config, tokenizer: PreTrainedTokenizerBase) -> ReachableRewards:
    """The reward functions of a run, to see what its rows let a completion earn.

    Raises:
        ValueError: settings that do not fit.
        RewardError: a class raised when it was instantiated.
    """
    detokenizer = Detokenizer(tokenizer, config.rollout.skip_special_tokens)
    limit = config.rollout.max_completion_length

    def write(text: str) -> Completion:
        """`text` as the completion that the policy would have to sample, cut at its limit."""
        token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        reason: FinishReason = "length" if len(token_ids) > limit else "stop"
        token_ids = token_ids[:limit]
        return Completion(token_ids, [], detokenizer.text(token_ids), reason, (0,))

    reward = config.reward
    return ReachableRewards(reward.names, reward.params, config.run_values, write)
