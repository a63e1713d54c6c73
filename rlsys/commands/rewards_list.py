"""`rlsys rewards list`: the reward functions, their settings, columns and files."""

from __future__ import annotations

import argparse
import inspect
import os

from rich.console import Console
from rich.text import Text

from rlsys.commands.console import make_console
from rlsys.config.fields import first_sentence
from rlsys.plugins.load import describe, entry_points, load_plugins
from rlsys.registry import where_defined
from rlsys.rewards import orms
from rlsys.rewards.answers import AnswerReward
from rlsys.rewards.builtin.code import Code
from rlsys.rewards.columns import column_use
from rlsys.rewards.instances import parameters_of
from rlsys.rewards.scoring import is_async
from rlsys.rewards.styles import TrlStyle, VerlStyle
from rlsys.tracking.columns import print_wrapped

MAX_SETTING = 60
"""Characters of a setting and its default."""


def main(args: argparse.Namespace) -> None:
    """Print the reward functions: built in, of plugins and of installed packages."""
    console = make_console()
    load_plugins(args.external_plugins)
    for name in sorted({*orms, *entry_points()}):
        _print_function(name, console)
    print_wrapped(
        console,
        "settings: reward.reward_params, {NAME: {SETTING: VALUE}}. columns: what the dataset must "
        "have; in brackets, what is used if it is there.",
        style="dim",
    )


def _print_function(name: str, console: Console) -> None:
    """Print name and file; below them the first sentence of its docstring, settings, columns."""
    try:
        function = orms[name]
        use = column_use(name)
    except ValueError as error:  # the others can be used
        offered = ", ".join(map(describe, entry_points().get(name, [])))
        _print_heading(name, offered, console)
        reason = str(error).strip().splitlines()[-1]
        print_wrapped(console, reason, indent="  ", style="bold red")
        console.print()
        return
    kinds = ["TRL style"] * isinstance(function, TrlStyle) + ["async"] * is_async(function)
    kinds += ["verl style"] * isinstance(function, VerlStyle)
    about = first_sentence(inspect.getdoc(function)) + (f" ({', '.join(kinds)})" if kinds else "")
    either = _either(function)
    settings = parameters_of(function).values() if isinstance(function, type) else []
    details = {
        "settings": list(map(_as_written, settings)),
        "columns": [
            *use.needed,
            *([" or ".join(either)] if either else []),
            *(f"[{column}]" for column in use.optional if column not in either),
        ],
    }
    _print_heading(name, where_defined(function).removeprefix(f"{os.getcwd()}/"), console)
    print_wrapped(console, about, indent="  ")
    for title, items in details.items():
        if items:
            print_wrapped(console, f"{title}: {', '.join(items)}", indent="  ")
    console.print()


def _print_heading(name: str, place: str, console: Console) -> None:
    heading = Text(name, style="bold").append(f"  {place}", style="not bold dim")
    console.print(heading, soft_wrap=True)


def _either(function: object) -> tuple[str, ...]:
    """The columns of which a class needs one, in the order in which it reads them."""
    if isinstance(function, type) and issubclass(function, AnswerReward | Code):
        return function.columns
    return ()


def _as_written(parameter: inspect.Parameter) -> str:
    """`limit`, `limit=5` or `**kwargs`; a long default, such as a prompt, is cut."""
    written = str(parameter.replace(annotation=inspect.Parameter.empty))
    if len(written) <= MAX_SETTING:
        return written
    if isinstance(parameter.default, str):
        space = MAX_SETTING - len(parameter.name)
        return f"{parameter.name}={parameter.default[:space] + '...'!r}"
    return f"{written[:MAX_SETTING]}..."
