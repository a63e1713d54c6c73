"""`rlsys rewards list`: which reward functions there are, what they take and where they stand."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsys.config_load import first_sentence
from rlsys.data.usage import column_use
from rlsys.registry import where_defined
from rlsys.rewards import TrlStyle, load_plugins, orms
from rlsys.rewards.instances import parameters_of
from rlsys.rewards.plugins import describe, entry_points
from rlsys.rewards.scoring import is_async

MAX_SETTING = 60
"""Characters of a setting and its default."""


def list_rewards(plugins: Sequence[str], console: Console) -> None:
    """Print a table of the reward functions: built-in ones, those of `plugins`, of packages.

    Raises:
        ValueError: a plugin cannot be loaded.
    """
    load_plugins(plugins)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("name and source", overflow="fold", ratio=3)
    table.add_column("settings", overflow="fold", ratio=2)
    table.add_column("columns", overflow="fold", ratio=1)
    table.add_column("what it pays for", ratio=3)
    for name in sorted({*orms, *entry_points()}):
        table.add_row(*_row(name))
    console.print(table)
    console.print(
        "\nsettings: reward.reward_params, {NAME: {SETTING: VALUE}}. columns: what the dataset "
        "must have; in brackets, what is used if it is there.",
        style="dim",
    )


def _row(name: str) -> tuple[Text, Text, Text, Text]:
    """Name and place, settings, columns, the first sentence of the docstring."""
    try:
        function = orms[name]
        use = column_use(name)
    except ValueError as error:  # the others can be used
        offered = ", ".join(map(describe, entry_points().get(name, [])))
        reason = str(error).strip().splitlines()[-1]
        return _named(name, offered), Text(), Text(), Text(reason, style="bold red")
    settings = ""
    if isinstance(function, type):
        settings = "\n".join(map(_as_written, parameters_of(function).values()))
    columns = "\n".join([*use.needed, *(f"[{column}]" for column in use.optional)])
    kinds = ["TRL style"] * isinstance(function, TrlStyle) + ["async"] * is_async(function)
    about = first_sentence(inspect.getdoc(function))
    if kinds:
        about += f" ({', '.join(kinds)})"
    place = where_defined(function).removeprefix(f"{os.getcwd()}/")
    return _named(name, place), Text(settings), Text(columns), Text(about)


def _named(name: str, place: str) -> Text:
    return Text(f"{name}\n", style="bold").append(place, style="not bold dim")


def _as_written(parameter: inspect.Parameter) -> str:
    """`limit`, `limit=5`, `**kwargs`; long texts, such as prompts, by their beginning."""
    written = str(parameter.replace(annotation=inspect.Parameter.empty))
    return written if len(written) <= MAX_SETTING else f"{written[:MAX_SETTING]}..."
