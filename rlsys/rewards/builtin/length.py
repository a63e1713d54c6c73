"""Rewards that look at how long a completion is, and how often it repeats itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rlsys.rewards.base import ORM, check_choice, register_reward
from rlsys.rewards.scoring import Reward


@register_reward("cosine")
class Cosine(ORM):
    """Accuracy that depends on length: right and short pays most, wrong and short least.

    The cosine reward of arXiv:2502.03373, appendix C.1, with ms-swift's parameters and defaults.
    With t tokens of at most T, v0 the value of no tokens and v1 that of T:
    `v1 + (v0 - v1) * (1 + cos(pi * t / T)) / 2`. Completions longer than T get v1. Where the
    correctness reward says None, so does this one.
    """

    max_reward: float | None = 1.0

    def __init__(
        self,
        max_completion_length: int,
        min_len_value_correct: float = 1.0,
        max_len_value_correct: float = 0.5,
        min_len_value_wrong: float = -0.5,
        max_len_value_wrong: float = 0.0,
        correctness: str = "accuracy",
    ):
        """Settings.

        Args:
            max_completion_length: T, tokens; filled in from the rollout's.
            min_len_value_correct: value of a right completion without any tokens.
            max_len_value_correct: value of a right completion of T tokens.
            min_len_value_wrong: value of a wrong completion without any tokens.
            max_len_value_wrong: value of a wrong completion of T tokens.
            correctness: the reward function, with its default settings, whose value is 1 or more
                for a right completion.

        Raises:
            ValueError: T below 1, or a correctness reward that is unknown, async or this one.
        """
        super().__init__()
        _positive("cosine", "max_completion_length", max_completion_length)
        if correctness == "cosine":
            raise ValueError("cosine: correctness must be another reward than cosine itself")
        run_values = {"max_completion_length": max_completion_length}
        self._correctness = Reward(correctness, run_values=run_values)
        if self._correctness.is_async:
            raise ValueError(
                f"cosine: correctness must be a reward that is not async, and {correctness!r} is: "
                "name another, or list both in reward.reward_funcs"
            )
        self.max_completion_length = max_completion_length
        self.correct = (min_len_value_correct, max_len_value_correct)
        self.gold = getattr(self._correctness.function, "gold", None)
        self.max_reward = None if self.gold is None else min(self.correct)
        self.example = getattr(self._correctness.function, "example", None)
        self.wrong = (min_len_value_wrong, max_len_value_wrong)

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float | None]:
        """[G] between the smallest and the largest of the four values."""
        columns |= {"completions": completions, "completion_ids": completion_ids}
        verdicts = self._correctness.score_columns(columns)
        return [
            None if math.isnan(verdict) else self._value(verdict >= 1.0, len(token_ids))
            for verdict, token_ids in zip(verdicts, completion_ids, strict=True)
        ]

    def check_row(self, row: Mapping[str, Any]) -> None:
        """See ORM: refuses what the correctness reward refuses."""
        try:
            self._correctness.check_row(row)
        except KeyError as error:
            raise ValueError(
                f"cosine asks {self._correctness.name!r}, which needs the column {error.args[0]!r}"
            ) from None

    def _value(self, correct: bool, num_tokens: int) -> float:
        start, end = self.correct if correct else self.wrong
        progress = min(num_tokens / self.max_completion_length, 1.0)
        return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


@register_reward("repetition_penalty")
class RepetitionPenalty(ORM):
    """`max_penalty` times the share of n-grams that occurred before; 0 without repetition.

    arXiv:2502.03373, appendix C.2. The n-grams are of tokens, as in TRL, which suits every
    language, or of words in lower case, as in ms-swift.
    """

    def __init__(
        self,
        ngram_size: int = 3,
        max_penalty: float = -1.0,
        unit: Literal["tokens", "words"] = "tokens",
    ):
        """Settings.

        Args:
            ngram_size: tokens or words that repeat together, 1 or more.
            max_penalty: the most negative value, 0 or less.
            unit: "tokens" or "words" (separated by white space).
        """
        super().__init__()
        _positive("repetition_penalty", "ngram_size", ngram_size)
        if not -math.inf < max_penalty <= 0:
            raise ValueError(
                f"repetition_penalty: max_penalty must be 0 or less, not {max_penalty}"
            )
        check_choice("repetition_penalty", "unit", unit, ("tokens", "words"))
        self.ngram_size = ngram_size
        self.max_penalty = max_penalty
        self.unit = unit

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        """[G] between `max_penalty` and 0."""
        sequences: list[Sequence[Any]] = (
            list(completion_ids)
            if self.unit == "tokens"
            else [text.lower().split() for text in completions]
        )
        # Adding 0 makes -0.0 a 0.0, which reads better in logs.
        return [self.max_penalty * self._repeated_share(one) + 0.0 for one in sequences]

    def _repeated_share(self, sequence: Sequence[Any]) -> float:
        num_ngrams = len(sequence) - self.ngram_size + 1
        if num_ngrams < 1:
            return 0.0
        ngrams = {tuple(sequence[i : i + self.ngram_size]) for i in range(num_ngrams)}
        return 1 - len(ngrams) / num_ngrams


@register_reward("soft_overlong")
class SoftOverlong(ORM):
    """0 for completions that fit, falling to -1 over the last `cache_length` tokens.

    Soft overlong punishment of DAPO, arXiv:2503.14476, equation 13.
    """

    max_reward = 0.0

    def __init__(self, max_completion_length: int, cache_length: int | None = None):
        """Settings.

        Args:
            max_completion_length: L_max, tokens; filled in from the rollout's.
            cache_length: L_cache, tokens over which the punishment grows. None is a fifth of
                L_max, as in the paper (4,096 of 20,480).
        """
        super().__init__()
        _positive("soft_overlong", "max_completion_length", max_completion_length)
        cache = max(1, max_completion_length // 5) if cache_length is None else cache_length
        if not 1 <= cache <= max_completion_length:
            raise ValueError(
                f"soft_overlong: cache_length must be 1 to max_completion_length = "
                f"{max_completion_length} tokens, not {cache}"
            )
        self.max_completion_length = max_completion_length
        self.cache_length = cache

    def __call__(
        self, completions: list[str], completion_ids: list[list[int]], **columns: Any
    ) -> list[float]:
        """[G] between -1 and 0."""
        allowed = self.max_completion_length - self.cache_length
        return [
            0.0 - min(max(len(token_ids) - allowed, 0) / self.cache_length, 1.0)
            for token_ids in completion_ids
        ]


def _positive(reward: str, name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{reward}: {name} must be at least 1, not {value}")
