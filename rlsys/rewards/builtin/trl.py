"""TRL's reward functions by name, `trl/<name>`. TRL is imported when one is used, not before."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from rlsys.rewards.answers import right_answer
from rlsys.rewards.base import ORM, register_reward
from rlsys.rewards.styles import as_messages


class _FromTRL(ORM):
    """Calls a function of trl.rewards with completions as TRL passes them: lists of messages."""

    function_name: str

    def __init__(self) -> None:
        super().__init__()
        try:
            rewards = importlib.import_module("trl.rewards")
        except ImportError as error:
            raise ValueError(
                f"reward function trl/{self.function_name} needs TRL: pip install trl ({error})"
            ) from error
        if not hasattr(rewards, self.function_name):
            raise ValueError(f"this version of TRL has no trl.rewards.{self.function_name}")
        self._function = getattr(rewards, self.function_name)

    def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        """[G] what TRL's function returns."""
        return self._function(completions=as_messages(completions), **columns)


class _FromTRLWithGold(_FromTRL):
    """TRL reads any number of the column `solution`, also one of a derivation in prose."""

    max_reward = 1.0

    @staticmethod
    def gold(row: Mapping[str, Any]) -> str | None:
        """See ORM."""
        found = right_answer("trl", row, ("solution",))
        return None if found is None else str(found.value)


@register_reward("trl/accuracy_reward")
class TRLAccuracy(_FromTRLWithGold):
    """trl.rewards.accuracy_reward: 1 for LaTeX equal to column `solution`; None if that is not
    readable."""

    function_name = "accuracy_reward"


@register_reward("trl/reasoning_accuracy_reward")
class TRLReasoningAccuracy(_FromTRLWithGold):
    """trl.rewards.reasoning_accuracy_reward: the same for what follows the reasoning."""

    function_name = "reasoning_accuracy_reward"

    def __init__(self, reasoning_delimiters: list[str] | None = None):
        """Settings: `reasoning_delimiters`, texts that end the reasoning; None is `</think>`."""
        super().__init__()
        self._delimiters = reasoning_delimiters

    def __call__(self, completions: list[str], **columns: Any) -> list[float | None]:
        """[G] what TRL's function returns."""
        return super().__call__(completions, reasoning_delimiters=self._delimiters, **columns)


@register_reward("trl/think_format_reward")
class TRLThinkFormat(_FromTRL):
    """trl.rewards.think_format_reward: 1 for `<think>...</think>` and an answer after it."""

    max_reward = 1.0
    reads_think_tags = True
    function_name = "think_format_reward"


@register_reward("trl/get_cosine_scaled_reward")
class TRLCosine(_FromTRL):
    """trl.rewards.get_cosine_scaled_reward: accuracy that depends on length."""

    function_name = "get_cosine_scaled_reward"

    def __init__(
        self,
        max_completion_length: int,
        min_value_wrong: float = -1.0,
        max_value_wrong: float = -0.5,
        min_value_correct: float = 0.5,
        max_value_correct: float = 1.0,
    ):
        """Settings, as TRL names them; max_completion_length is its max_len, in tokens."""
        super().__init__()
        self._function = self._function(
            max_len=max_completion_length,
            min_value_wrong=min_value_wrong,
            max_value_wrong=max_value_wrong,
            min_value_correct=min_value_correct,
            max_value_correct=max_value_correct,
        )


@register_reward("trl/get_repetition_penalty_reward")
class TRLRepetitionPenalty(_FromTRL):
    """trl.rewards.get_repetition_penalty_reward: share of repeated n-grams of tokens."""

    function_name = "get_repetition_penalty_reward"

    def __init__(self, ngram_size: int = 3, max_penalty: float = -1.0):
        """Settings, as TRL names them."""
        super().__init__()
        self._function = self._function(ngram_size=ngram_size, max_penalty=max_penalty)


@register_reward("trl/get_soft_overlong_punishment")
class TRLSoftOverlong(_FromTRL):
    """trl.rewards.get_soft_overlong_punishment: DAPO's, arXiv:2503.14476, equation 13."""

    function_name = "get_soft_overlong_punishment"

    def __init__(self, max_completion_length: int, soft_punish_cache: int):
        """Settings, as TRL names them; max_completion_length, in tokens, is max_completion_len."""
        super().__init__()
        self._function = self._function(
            max_completion_len=max_completion_length, soft_punish_cache=soft_punish_cache
        )
