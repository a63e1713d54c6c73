"""Which dataset columns the reward functions of a run ask for, by their signatures."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlsys.rewards import OWN_COLUMNS, orms
from rlsys.rewards.instances import KEYWORD_KINDS


@dataclass(frozen=True, slots=True)
class ColumnUse:
    """What one reward function takes from the dataset."""

    needed: tuple[str, ...]
    """Parameters without a default: it cannot be called without these columns."""
    optional: tuple[str, ...]
    """Parameters with a default."""
    takes_all: bool
    """Whether it gets every other column too, by **kwargs, and may use it."""


def column_use(name: str, settings: Collection[str] = ()) -> ColumnUse:
    """The columns that the registered reward `name` asks for.

    Args:
        name: of a reward function.
        settings: parameters that reward.reward_params sets.

    Raises:
        ValueError: no such reward function.
    """
    registered = orms[name]
    # Instances are called with the completions first, whatever that parameter is called.
    is_class = isinstance(registered, type)
    function = registered.__call__ if isinstance(registered, type) else registered
    parameters = list(inspect.signature(function).parameters.values())[2 if is_class else 0 :]
    known = {*OWN_COLUMNS, *settings}
    named = [p for p in parameters if p.kind in KEYWORD_KINDS and p.name not in known]
    return ColumnUse(
        tuple(p.name for p in named if p.default is p.empty),
        tuple(p.name for p in named if p.default is not p.empty),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )


def missing_columns(
    reward_funcs: Sequence[str],
    reward_params: Mapping[str, Mapping[str, Any]],
    columns: Collection[str],
) -> list[str]:
    """Problems of reward functions that need a column which no dataset has."""
    problems = []
    for name in reward_funcs:
        use = column_use(name, reward_params.get(name, {}))
        missing = [column for column in use.needed if column not in columns]
        if missing:
            problems.append(
                f"reward function {name!r} needs the column{'s' * (len(missing) > 1)} "
                f"{', '.join(missing)}, which the data does not have. It has: "
                f"{', '.join(columns) or 'none besides the prompt'}. Rename one with data.columns, "
                "or add it with a data.preprocessor"
            )
    return problems
