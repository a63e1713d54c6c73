"""The right answers of a run's rows, as its reward functions read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlsys.config import Config
from rlsys.model.detokenize import Detokenizer
from rlsys.rewards.reachable import ReachableRewards, Write
from rlsys.types import Completion, FinishReason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def reachable_rewards(config: Config, tokenizer: PreTrainedTokenizerBase) -> ReachableRewards:
    """The reward functions of a run, for a look at what its rows let a completion earn.

    Raises:
        ValueError: settings that do not fit.
        RewardError: a class raised when it was instantiated.
    """
    reward = config.reward
    write = _writer(config, tokenizer)
    return ReachableRewards(reward.names, reward.params, config.known_to_rewards, write)


def _writer(config: Config, tokenizer: PreTrainedTokenizerBase) -> Write:
    """Texts as the completions that the policy would have to sample, cut where those are."""
    detokenizer = Detokenizer(tokenizer, config.rollout.skip_special_tokens)
    limit = config.rollout.max_completion_length

    def write(text: str) -> Completion:
        token_ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        reason: FinishReason = "length" if len(token_ids) > limit else "stop"
        token_ids = token_ids[:limit]
        return Completion(token_ids, [], detokenizer.text(token_ids), reason, (0,))

    return write
