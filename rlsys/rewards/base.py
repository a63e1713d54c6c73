"""What a reward function is, and the registry that gives it a name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlsys.registry import Registry

RewardFunction = Callable[..., Sequence[float]]


class ORM:
    """Outcome reward function: scores finished completions.

    Derive from it, implement `__call__` and register the class. It is instantiated without
    arguments, once in every reward worker.

    Example:
        @register_reward("ends_with_dot")
        class EndsWithDot(ORM):
            def __call__(self, completions, **columns):
                return [float(text.endswith(".")) for text in completions]
    """

    def __init__(self, args: Any = None, **kwargs: Any):
        # The signature that ms-swift's rewards call through super().__init__(args, **kwargs).
        self.args = args

    # *args so that type checkers let subclasses name the columns that they need.
    def __call__(self, completions: list[str], *args: Any, **columns: Any) -> Sequence[float]:
        """One finite number per completion, in order.

        Args:
            completions: [G] texts sampled from one prompt, special tokens removed.
            columns: each dataset column by its name as a list of G values, and `prompts`,
                `messages`, `completion_ids` and `finish_reasons`.
        """
        raise NotImplementedError


orms: Registry[type[ORM] | RewardFunction] = Registry("reward function")
"""Name -> ORM class, or function `f(completions, **columns)` as TRL has them."""

register_reward = orms.register
"""Decorator form of `orms[name] = value`."""
