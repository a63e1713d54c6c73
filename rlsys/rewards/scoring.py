"""Scoring a group of completions by several reward functions, whose results are checked here."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Sequence
from typing import Any, SupportsFloat

from rlsys.rewards.base import RewardFunction, orms
from rlsys.types import RewardOutput, RolloutGroup

OWN_COLUMNS = ("completions", "prompts", "messages", "completion_ids", "finish_reasons")
"""What reward functions get besides the dataset's columns."""


class RewardError(ValueError):
    """A reward function could not be made, raised, or returned what is no reward."""


class RewardFunctions:
    """The configured reward functions, each instantiated once."""

    def __init__(self, names: Sequence[str], weights: Sequence[float] | None = None):
        """Look up and instantiate `names`; `weights` is one per name, None is 1 for each.

        Raises:
            ValueError: a name that is not registered or comes twice, or weights that do not fit.
            RewardError: a class that cannot be instantiated without arguments.
        """
        check_names_and_weights(names, weights)
        self.functions = {name: _instantiate(name) for name in names}
        self.weights = [1.0] * len(names) if weights is None else list(weights)

    def score(self, group: RolloutGroup) -> list[RewardOutput]:
        """[G] the rewards of the group's completions.

        Raises:
            RewardError: a function raised (the cause is its exception), its signature does not
                fit the columns, or it did not return one finite number per completion.
        """
        columns = _columns(group)
        by_name = {
            name: _call(name, function, columns, group.prompt.prompt_id)
            for name, function in self.functions.items()
        }
        rows = [dict(zip(by_name, row, strict=True)) for row in zip(*by_name.values(), strict=True)]
        return [
            RewardOutput(
                total=sum(w * value for w, value in zip(self.weights, row.values(), strict=True)),
                by_name=row,
            )
            for row in rows
        ]


def check_names_and_weights(names: Sequence[str], weights: Sequence[float] | None) -> None:
    """Whether these reward functions exist and the weights fit, without instantiating any.

    Raises:
        ValueError: a name that is not registered or comes twice, or weights that do not fit.
    """
    for name in names:
        orms[name]
    if len(set(names)) != len(names):
        raise ValueError(
            f"reward_funcs lists a function twice: {', '.join(names)}. List each once; "
            "reward_weights says how much it counts."
        )
    if weights is None:
        return
    if len(weights) != len(names):
        raise ValueError(
            f"reward_weights has {len(weights)} values for {len(names)} reward functions "
            f"({', '.join(names)}). Give one weight for each, or none at all."
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"reward_weights must be finite numbers, not {list(weights)}")


def _instantiate(name: str) -> RewardFunction:
    registered = orms[name]
    if not isinstance(registered, type):
        return registered
    try:
        return registered()
    # User code: whatever it raises is told with the name of the function.
    except Exception as error:
        raise RewardError(
            f"reward function {name!r}: {registered.__name__}() raised "
            f"{type(error).__name__}: {error}. It is instantiated without arguments."
        ) from error


def _columns(group: RolloutGroup) -> dict[str, list[Any]]:
    """[G] values of every keyword that reward functions get."""
    prompt, completions = group.prompt, group.completions
    repeated = {name: [value] * len(completions) for name, value in prompt.columns.items()}
    return repeated | {
        "completions": [completion.text for completion in completions],
        "prompts": [prompt.messages for _ in completions],
        "messages": [
            [*prompt.messages, {"role": "assistant", "content": completion.text}]
            for completion in completions
        ],
        "completion_ids": [completion.token_ids for completion in completions],
        "finish_reasons": [completion.finish_reason for completion in completions],
    }


def _call(
    name: str, function: RewardFunction, columns: dict[str, list[Any]], prompt_id: str
) -> list[float]:
    args: tuple[Any, ...] = ()
    num_completions = len(columns["completions"])
    if not inspect.isfunction(function):
        # Objects are called as ms-swift does, completions first whatever the parameter is called;
        # functions as TRL does, all by keyword.
        columns = dict(columns)
        args = (columns.pop("completions"),)
    try:
        inspect.signature(function).bind(*args, **columns)
    except TypeError as error:
        raise RewardError(
            f"reward function {name!r} cannot be called: {error}. It gets the columns "
            f"{', '.join(sorted(columns))}; add what is missing to the dataset, and end the "
            "function's parameters with **columns for those that it does not use."
        ) from None
    try:
        returned = function(*args, **columns)
    # User code: whatever it raises is told with the name of the function, and ends the run.
    except Exception as error:
        raise RewardError(
            f"reward function {name!r} raised {type(error).__name__} on prompt {prompt_id!r}: "
            f"{error}"
        ) from error
    return _checked(returned, num_completions, f"reward function {name!r} on prompt {prompt_id!r}")


def _checked(returned: Any, num_completions: int, who: str) -> list[float]:
    """`returned` as one finite float per completion."""
    remedy = f"Return a list with one finite number for each of the {num_completions} completions."
    # A list, a tuple, a numpy array or a torch tensor; not a text, a generator or a coroutine.
    if isinstance(returned, str | bytes | dict) or not hasattr(returned, "__getitem__"):
        raise RewardError(f"{who} returned {reprlib.repr(returned)}. {remedy}")
    if len(returned) != num_completions:
        raise RewardError(
            f"{who} returned {len(returned)} values, {reprlib.repr(returned)}. {remedy}"
        )
    rewards = [_finite_float(value) for value in returned]
    if None in rewards:
        index = rewards.index(None)
        raise RewardError(
            f"{who} returned {reprlib.repr(returned[index])} for completion {index}. {remedy}"
        )
    return [reward for reward in rewards if reward is not None]


def _finite_float(value: Any) -> float | None:
    """A Python, numpy or torch number as a float; None for what is no finite number."""
    if not isinstance(value, SupportsFloat):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # an array of several, 10**400
        return None
    return number if math.isfinite(number) else None
