"""The dataset columns that reward functions take, and their checks of rows."""

from __future__ import annotations

import inspect
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsys.config import Config
from rlsys.model.chat_template import TEMPLATE_COLUMNS
from rlsys.rewards import ORM, OWN_COLUMNS, Reward, RewardError, check_call, orms
from rlsys.rewards.instances import KEYWORD_KINDS, Params
from rlsys.rewards.scoring import call_settings, call_signature, takes_completions_first

_SHOWN = 12
"""Columns that one line names."""


@dataclass(frozen=True, slots=True)
class ColumnUse:
    """The columns that one reward function takes from the dataset."""

    needed: tuple[str, ...]
    """Parameters without a default: it cannot be called without these columns."""
    optional: tuple[str, ...]
    """Parameters with a default."""
    takes_all: bool
    """Whether **kwargs give it every other column too."""


def column_use(
    name: str, params: Params | None = None, run_values: Params | None = None
) -> ColumnUse:
    """The columns that a registered reward function takes.

    Args:
        name: of the reward function.
        params, run_values: as for `settings_of`; a parameter that these set is not a column.

    Raises:
        ValueError: an unknown reward function, or a class that cannot be called.
    """
    registered = orms[name]
    parameters = list(call_signature(registered).parameters.values())
    if takes_completions_first(registered):
        parameters = parameters[1:]
    known = {*OWN_COLUMNS, *call_settings(name, {**(run_values or {}), **(params or {})})}
    named = [p for p in parameters if p.kind in KEYWORD_KINDS and p.name not in known]
    return ColumnUse(
        tuple(p.name for p in named if p.default is p.empty),
        tuple(p.name for p in named if p.default is not p.empty),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def row_check(
    reward_funcs: Sequence[str],
    reward_params: Mapping[str, Mapping[str, Any]],
    run_values: Mapping[str, Any],
) -> Callable[[Mapping[str, Any]], list[str]]:
    """One check out of `check_row` of all reward functions that have it.

    A class is instantiated for it, unless its `check_row` is a static method. The check skips a
    function whose columns the row lacks, which `column_problems` reports once.

    Raises:
        ValueError: an unknown function, or settings that do not fit.
        RewardError: a class raised when it was instantiated. The check raises it where a
            `check_row` raises something else than ValueError.
    """
    checks = {}
    for name in reward_funcs:
        params = reward_params.get(name, {})
        check = _own_check(name, params, run_values)
        if check is not None:
            checks[name] = (check, column_use(name, params, run_values).needed)

    def problems(row: Mapping[str, Any]) -> list[str]:
        found = []
        for name, (check, needed) in checks.items():
            if all(column in row for column in needed):
                try:
                    check(row)
                except ValueError as error:
                    found.append(f"reward function {name!r}: {error}")
                # User code: whatever else it raises is a mistake of its own.
                except Exception as error:
                    raise RewardError(
                        f"check_row of the reward function {name!r} raised "
                        f"{type(error).__name__}: {error}\n(its row: {reprlib.repr(dict(row))}). "
                        "For a row that is wrong it has to raise ValueError."
                    ) from error
        return found

    return problems


def _own_check(
    name: str, params: Mapping[str, Any], run_values: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], None] | None:
    registered = orms[name]
    check = getattr(registered, "check_row", None)
    if check is None or check is ORM.check_row:
        return None
    static = inspect.getattr_static(registered, "check_row")
    if isinstance(registered, type) and not isinstance(static, staticmethod | classmethod):
        return Reward(name, params, run_values).check_row
    return check


def column_uses(config: Config) -> dict[str, ColumnUse]:
    """The columns that each reward function of a run takes, by its name.

    Raises:
        ValueError: as `column_use`.
    """
    params = config.reward.params
    return {
        name: column_use(name, params.get(name), config.run_values) for name in config.reward.names
    }


def column_problems_of_run(
    config: Config, train: Collection[str] | None, held_out: Collection[str] | None
) -> list[str]:
    """`column_problems` of the training data and of the data that a run evaluates on.

    Args:
        config: of the run.
        train: columns of the training prompts; None if they are not known.
        held_out: columns of the held-out prompts; None if they are not known, or without any.
    """
    problems = []
    if train is not None:
        problems += column_problems(config, train)
    if held_out is not None and config.eval_steps is not None:
        problems += column_problems(config, held_out, "the held-out data")
    return problems


def column_problems(config: Config, columns: Collection[str], data: str = "the data") -> list[str]:
    """Problems of reward functions with the columns of `data`.

    A function may need a column that no row has, not take one that rows have, or get a value from
    the run that has the name of a column.
    """
    problems = []
    for name, use in column_uses(config).items():
        missing = [column for column in use.needed if column not in columns]
        if missing:
            problems.append(
                f"reward function {name!r} needs the column{'s' * (len(missing) > 1)} "
                f"{', '.join(missing)}, which {data} does not have. It has: "
                f"{', '.join(columns) or 'none besides the prompt'}. Rename one with data.columns, "
                "add it with a data.preprocessor, or set the parameter with reward.reward_params"
            )
            continue
        hidden = [column for column in columns if _is_hidden(name, column)]
        if hidden:
            problems.append(
                f"reward function {name!r} takes {hidden[0]!r}, which the run fills in, and {data} "
                f"has the column {hidden[0]!r} too. Rename it with data.columns: "
                f"{{{hidden[0]}: dataset_{hidden[0]}}}"
            )
            continue
        try:
            check_call(name, config.reward.params.get(name, {}), config.run_values, columns)
        except ValueError as error:
            problems.append(str(error))
    return problems


def unread_columns(config: Config, columns: Collection[str]) -> str | None:
    """A line that names the columns which neither the prompt nor a reward function takes.

    None if every column is taken.
    """
    uses = column_uses(config).values()
    named = {column for use in uses for column in (*use.needed, *use.optional)}
    unread = [column for column in columns if column not in named | set(TEMPLATE_COLUMNS)]
    if not unread:
        return None
    more = f" and {len(unread) - _SHOWN:,} more" if len(unread) > _SHOWN else ""
    may = "; functions with **columns may read them" if any(u.takes_all for u in uses) else ""
    noun = "column" if len(unread) == 1 else "columns"
    return f"no reward function names the {noun} {', '.join(unread[:_SHOWN])}{more}{may}"


def _is_hidden(name: str, column: str) -> bool:
    """Whether the run gives a reward function a value with the name of this column."""
    parameters = list(call_signature(orms[name]).parameters)
    if takes_completions_first(orms[name]) and parameters[:1] == [column]:
        return True
    return column == "completions" or (column in OWN_COLUMNS and column in parameters)
