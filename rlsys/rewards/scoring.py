"""Scoring a group of completions by several reward functions, whose results are checked here."""

from __future__ import annotations

import inspect
import math
import reprlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

from rlsys.config import RewardConfig
from rlsys.config.rules_reward import reward_problems
from rlsys.problems import ProblemsError
from rlsys.rewards.base import ORM, RewardFunction, TrainerState, orms
from rlsys.rewards.instances import Params, RewardError, instantiate, settings_of
from rlsys.rewards.logged import CallLog, Logged
from rlsys.rewards.styles import (
    TrlStyle,
    VerlStyle,
    as_messages,
    expects_messages,
    foreign_remedy,
)
from rlsys.text import counted
from rlsys.types import OPEN_THINK, RolloutGroup

OWN_COLUMNS = (
    "completions",
    "prompts",
    "messages",
    "completion_ids",
    "response_token_ids",
    "finish_reasons",
    "prompt_opens_think",
    "trainer_state",
    "log_extra",
    "log_metric",
)
"""What reward functions get besides the dataset's columns."""
_CALLBACKS = {"log_extra", "log_metric"}


@dataclass(frozen=True, slots=True)
class Scored:
    """What one reward function gave to some completions of a group."""

    values: list[float]
    """One per completion; NaN for None."""
    seconds: float
    logged: list[Logged] = field(default_factory=list)
    """What the function logged, one per completion; empty if nothing."""


class Reward:
    """One reward function of a run, ready to be called."""

    def __init__(self, name: str, params: Params | None = None, run_values: Params | None = None):
        """Instantiate it, with the settings of `settings_of`.

        Raises:
            ValueError: an unknown name, or settings that do not fit.
            RewardError: its class raised when it was instantiated.
        """
        self.name = name
        settings = settings_of(name, params or {}, run_values or {})
        self.function = instantiate(name, settings)
        self._call_settings = call_settings(name, settings)
        self.is_async = is_async(orms[name])

    def check_row(self, row: Mapping[str, Any]) -> None:
        """Ask the function to check a row of the dataset, see `ORM.check_row`.

        Raises:
            ValueError: it refuses the row.
        """
        check = getattr(self.function, "check_row", None)
        if check is not None:
            check(row)

    def score(self, group: RolloutGroup, state: TrainerState | None = None) -> Scored:
        """Score a group by a function that is not async.

        Args:
            group: the completions and their prompt.
            state: `trainer_state`; None: the state of the first step.

        Raises:
            RewardError: the function raised (the cause is its exception), its signature does not
                fit the columns, it did not return one finite number or None per completion, or it
                logged what does not fit them.
        """
        start, log = time.perf_counter(), CallLog(len(group.completions))
        columns = reward_columns(group, state, log)
        values = self.score_columns(columns, group.prompt.prompt_id)
        return self._scored(values, start, log)

    async def score_async(self, group: RolloutGroup, state: TrainerState | None = None) -> Scored:
        """Score a group by an async function, in the running event loop; see `score`."""
        start, log = time.perf_counter(), CallLog(len(group.completions))
        columns = reward_columns(group, state, log)
        args, kwargs = self._arguments(columns)
        with self._named_errors(group.prompt.prompt_id) as who:
            returned = await self.function(*args, **kwargs)  # type: ignore[misc]
        return self._scored(checked(returned, len(group.completions), who), start, log)

    def score_columns(
        self, columns: Mapping[str, Any], prompt_id: str | None = None
    ) -> list[float]:
        """[G] the values of a function that is not async, NaN for None; see `score`.

        Args:
            columns: see `reward_columns`.
            prompt_id: for error messages; None when their reader knows it.
        """
        args, kwargs = self._arguments(columns)
        with self._named_errors(prompt_id) as who:
            returned = self.function(*args, **kwargs)
        return checked(returned, len(columns["completions"]), who)

    def _scored(self, values: list[float], start: float, log: CallLog) -> Scored:
        seconds = time.perf_counter() - start
        try:
            return Scored(values, seconds, log.per_completion())
        except ValueError as error:
            raise RewardError(f"reward function {self.name!r}: {error}") from None

    def _arguments(self, columns: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if getattr(self.function, "reads_think_tags", False):
            columns = {**columns, "completions": _with_opened_think(columns)}
        return call_arguments(self.name, self.function, {**columns, **self._call_settings})

    @contextmanager
    def _named_errors(self, prompt_id: str | None) -> Iterator[str]:
        """Name the function and the prompt in whatever it raises; yields its name for errors."""
        on = "" if prompt_id is None else f" on prompt {prompt_id!r}"
        try:
            yield f"reward function {self.name!r}{on}"
        except (Exception, SystemExit) as error:  # user code may raise anything
            hint = ""
            if "string ind" in str(error) or "'str' object has no attribute 'get'" in str(error):
                hint = (
                    ". A completion is a text here. If the function takes message lists, as TRL "
                    f"passes them, name it trl/{self.name}, or put @trl_style below "
                    "@register_reward"
                )
            raise RewardError(
                f"reward function {self.name!r} raised {type(error).__name__}{on}: {error}{hint}"
            ) from error


def check_call(name: str, params: Params, run_values: Params, columns: Iterable[str]) -> None:
    """Check that a reward function takes its settings and the columns.

    Args:
        name, params, run_values: see `settings_of`.
        columns: names of the dataset's columns, besides `OWN_COLUMNS`.

    Raises:
        ValueError: an unknown name, or settings or columns that do not fit.
    """
    settings = settings_of(name, params, run_values)
    given: dict[str, Any] = {column: [] for column in (*columns, *OWN_COLUMNS)}
    call_arguments(name, orms[name], given | call_settings(name, settings))


def call_settings(name: str, settings: Params) -> dict[str, Any]:
    """The settings that each call gets; none for a class, which got them when instantiated."""
    return {} if isinstance(orms[name], type) else dict(settings)


def call_arguments(
    name: str, function: type[ORM] | RewardFunction, columns: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call of a function, or of instances of a class.

    Raises:
        RewardError: the signature does not fit the columns.
    """
    # A method has a parameter `self` already.
    kwargs = {column: values for column, values in columns.items() if column != "self"}
    args: tuple[Any, ...] = ()
    if isinstance(function, TrlStyle) or _is_unmarked_trl(function):
        kwargs["completions"] = as_messages(columns["completions"])
    if takes_completions_first(function):
        args = (kwargs.pop("completions"),)
    try:
        call_signature(function).bind(*args, **kwargs)
    except TypeError as error:
        required = [p.name for p in call_signature(function).parameters.values()]
        columns_given = ", ".join(sorted(set(kwargs) - _CALLBACKS))
        remedy = foreign_remedy(name, set(required) - set(kwargs)) or (
            f"It gets the columns {columns_given}; add what is missing to the dataset, and end the "
            "function's parameters with **columns for those that it does not use."
        )
        raise RewardError(f"reward function {name!r} cannot be called: {error}. {remedy}") from None
    return args, kwargs


def _is_unmarked_trl(function: Any) -> bool:
    """Whether a function, or the `__call__` of an object, reads completions as TRL passes them."""
    if isinstance(function, VerlStyle):
        return False
    if isinstance(function, type) or not inspect.isfunction(function):
        function = (function if isinstance(function, type) else type(function)).__call__
    return expects_messages(function)


def takes_completions_first(function: type[ORM] | RewardFunction) -> bool:
    """Whether completions are the first argument, whatever its name: ms-swift's way, for objects.

    Functions are called as TRL does, all by keyword.
    """
    return not (inspect.isfunction(function) or isinstance(function, TrlStyle | VerlStyle))


def call_signature(function: type[ORM] | RewardFunction) -> inspect.Signature:
    """The signature of a reward function, or of calling an instance of a class.

    Raises:
        RewardError: the class has no `__call__` of its own.
    """
    if not isinstance(function, type):
        call = inspect.getattr_static(type(function), "__call__")
        if isinstance(call, staticmethod | classmethod):
            # For the object itself, Python 3.11 would leave out the first parameter as self.
            return inspect.signature(call.__get__(function, type(function)))
        return inspect.signature(function)
    # Not function.__call__, which for a class without one is how it is instantiated.
    own = [vars(base) for base in function.__mro__ if base is not ORM and "__call__" in vars(base)]
    if not own:
        raise RewardError(
            f"the reward class {function.__name__} has no method __call__(self, completions, "
            "**columns), which scores completions: add it"
        )
    call = own[0]["__call__"]
    # Bound as by an instance, without making one.
    return inspect.signature(call.__get__(object(), function) if hasattr(call, "__get__") else call)


def weighted_total(values: Sequence[float] | Any, weights: Sequence[float]) -> float:
    """The weighted sum of the values that are not NaN; NaN when all are, as in TRL."""
    terms = [w * value for w, value in zip(weights, values, strict=True) if not math.isnan(value)]
    return sum(terms) if terms else math.nan


def check_functions(config: RewardConfig) -> None:
    """Check that the reward functions are registered and that weights and gates fit them.

    Raises:
        ValueError: they are not, or do not.
    """
    for name in config.names:
        orms[name]
    if problems := list(reward_problems(config)):
        raise ProblemsError("the reward section", problems)


def is_async(registered: Any) -> bool:
    """Whether a registered class or function is async."""
    if isinstance(registered, TrlStyle | VerlStyle):
        registered = registered.function
    if isinstance(registered, type):
        return inspect.iscoroutinefunction(registered.__call__)
    return any(map(inspect.iscoroutinefunction, (registered, type(registered).__call__)))


def reward_columns(
    group: RolloutGroup, state: TrainerState | None = None, log: CallLog | None = None
) -> dict[str, Any]:
    """Every keyword that reward functions get: columns of [G] values, and three objects.

    Args:
        group: the completions and the columns of their prompt.
        state: `trainer_state`; None: the state of the first step.
        log: takes what `log_extra` and `log_metric` log; None drops it.
    """
    log = log or CallLog(len(group.completions))
    prompt, completions = group.prompt, group.completions
    token_ids = [completion.token_ids for completion in completions]
    repeated = {name: [value] * len(completions) for name, value in prompt.columns.items()}
    return repeated | {
        "completions": [completion.text for completion in completions],
        "prompts": [prompt.messages for _ in completions],
        "messages": [
            [*prompt.messages, {"role": "assistant", "content": completion.text}]
            for completion in completions
        ],
        "completion_ids": token_ids,
        "response_token_ids": token_ids,  # ms-swift's name
        "finish_reasons": [completion.finish_reason for completion in completions],
        "prompt_opens_think": [prompt.opens_think] * len(completions),
        "trainer_state": state or TrainerState(global_step=0, max_steps=0),
        "log_extra": log.log_extra,
        "log_metric": log.log_metric,
    }


def _with_opened_think(columns: Mapping[str, Any]) -> list[str]:
    """The completions, each with the `<think>` that its prompt ends with, if it does."""
    opened = columns.get("prompt_opens_think") or [False] * len(columns["completions"])
    return [
        OPEN_THINK + text if opens else text
        for text, opens in zip(columns["completions"], opened, strict=True)
    ]


def checked(returned: Any, num_completions: int, who: str) -> list[float]:
    """`returned` as one finite float per completion, NaN for None.

    Raises:
        RewardError: it is something else.
    """
    remedy = (
        f"Return a list with one finite number for each of the {num_completions} completions, or "
        "None where the function does not apply."
    )
    # A list, a tuple, a numpy array or a torch tensor; not a text, a generator or a coroutine.
    if isinstance(returned, str | bytes | dict) or not hasattr(returned, "__getitem__"):
        raise RewardError(f"{who} returned {reprlib.repr(returned)}. {remedy}")
    if len(returned) != num_completions:
        raise RewardError(
            f"{who} returned {counted(len(returned), 'value')}, {reprlib.repr(returned)}. {remedy}"
        )
    rewards = []
    for index, value in enumerate(returned):
        reward = math.nan if value is None else _finite_float(value)
        if reward is None:
            raise RewardError(
                f"{who} returned {reprlib.repr(value)} for completion {index}. {remedy}"
            )
        rewards.append(reward)
    return rewards


def _finite_float(value: Any) -> float | None:
    """A Python, numpy or torch number as a float; None if it is not a finite number."""
    if not isinstance(value, SupportsFloat):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):  # an array of several, 10**400
        return None
    return number if math.isfinite(number) else None
