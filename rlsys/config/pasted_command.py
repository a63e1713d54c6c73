"""A command of another project behind `rlsys grpo`: its program, and what it is in rlsys."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from textwrap import indent
from typing import Any

from rlsys.config.elsewhere import counterpart
from rlsys.config.fields import config_fields, nested
from rlsys.config.hints import coming_from, hint, likely_project
from rlsys.config.schema import Config, RunConfig
from rlsys.config.validation import wrong_fields
from rlsys.config.words import Option, read_options, value_of
from rlsys.config.yaml_text import dump_yaml
from rlsys.problems import Problem

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*=.*", re.DOTALL)
_PROJECTS = {
    "swift": "ms-swift",
    "megatron": "ms-swift",
    "trl": "TRL",
    "verl": "verl",
    "openrlhf": "OpenRLHF",
}
"""Program or package -> project."""
_LAUNCHER = re.compile(r"python[\d.]*|torchrun|accelerate|deepspeed|uv|ray|env|nohup")
_LAUNCHING_MODULES = ("torch.distributed", "accelerate")
_PROCESSES = re.compile(r"--(nproc[-_]per[-_]node|num_processes|num_gpus)(?:=(?P<value>.+))?")


@dataclass(frozen=True, slots=True)
class PastedCommand:
    """The words behind CONFIG, without another project's program in front of its options."""

    program: list[str]
    """`swift rlhf`, or `torchrun --nproc_per_node 8 train.py`; empty for an rlsys command."""
    variables: list[str]
    """`NAME=value` words before or between the words of the program, without a field in rlsys."""
    options: list[str]
    """All other words. A variable with a field in rlsys is one of them."""
    project: str | None
    """The project of the program, where its name shows it."""

    def problems(self) -> list[Problem]:
        """What to do with the words that are not options."""
        found = [
            Problem(f"{word}: is a variable of the environment: write it before `rlsys`")
            for word in self.variables
        ]
        if self.program:
            text = f"{shlex.join(self.program)}: leave it out, `rlsys` is the program"
            found.append(Problem(text))
        return found


def read_command_line(
    words: Sequence[str],
    names_of_file: Collection[str],
    problems: list[Problem],
    schema: type[RunConfig],
) -> tuple[list[Option], str | None]:
    """The options among the words behind CONFIG; other words are added to `problems`.

    Returns:
        the options, and the other project that the command or the config file is from; None for
        rlsys itself.
    """
    command = split_command(words, schema)
    problems += command.problems()
    options = read_options(command.options, problems, schema)
    names = [*names_of_file, *(option.name for option in options)]
    unknown = [name for name in names if name not in config_fields(schema)]
    return options, command.project or likely_project(unknown, schema)


# --- the program ---------------------------------------------------------------------------------


def split_command(words: Sequence[str], schema: type[RunConfig] = Config) -> PastedCommand:
    """Remove environment variables and the program from the front."""
    rest = list(words)
    program: list[str] = []
    variables: list[str] = []
    while rest:
        if _VARIABLE.fullmatch(rest[0]):
            variables.append(rest.pop(0))
            continue
        length = _program_length(rest)
        if not length:
            break
        program += rest[:length]
        del rest[:length]
    for word, after in pairwise([*program, ""]):
        match = _PROCESSES.fullmatch(word)
        if match and (number := match["value"] or after):
            variables.append(f"NPROC_PER_NODE={number}")
    known = [word for word in variables if hint(word.partition("=")[0], None, schema)]
    packages = [Path(word).name.partition(".")[0] for word in program]
    return PastedCommand(
        program,
        [word for word in variables if word not in known],
        known + rest,
        next((_PROJECTS[name] for name in packages if name in _PROJECTS), None),
    )


def _program_length(words: list[str]) -> int:
    """How many words in front are the program; 0 where an option comes first."""
    name = Path(words[0]).name
    if name.endswith(".py") and "=" not in name:
        return 1
    if _LAUNCHER.fullmatch(name):
        for index, (word, after) in enumerate(pairwise([*words, ""])):
            if word == "-m" and not after.startswith(_LAUNCHING_MODULES):
                return index + 2
            if word == "--" or (word.endswith(".py") and not word.startswith("-")):
                return index + 1
    elif name not in _PROJECTS:
        return 0
    return 1 + sum(1 for _ in takewhile(_is_command_word, words[1:]))


def _is_command_word(word: str) -> bool:
    return not word.startswith("-") and "=" not in word and Path(word).name not in _PROJECTS


# --- the translation -----------------------------------------------------------------------------


def advice(
    options: Sequence[Option],
    project: str,
    unknown: Collection[str],
    given: Collection[str],
    path: str | Path | None,
    schema: type[RunConfig],
) -> str:
    """What differs for a user of another project, and the part of the command that does not.

    Args:
        options: of the command line.
        project: the other project.
        unknown: names that no field has.
        given: fields that were set.
        path: CONFIG; without it, the translation is a file instead of a command.
        schema: the class of the config.
    """
    start, differing, left = _translated(options, project, schema)
    lines = [coming_from(project, unknown, given, schema)]
    lines += [f"{name} means something else there: {note}" for name, note in differing.items()]
    if start and path is None:
        text = indent(dump_yaml(nested({name: value for name, (value, _) in start.items()})), "  ")
        lines.append(f"What means the same here, as a CONFIG to start from and to check:\n\n{text}")
        lines.append(_still_to_do(start, left, schema))
    elif start:
        words = [word for name, (_, texts) in start.items() for word in (f"--{name}", *texts)]
        text = shlex.join(["rlsys", "explain", str(path), *words])
        lines.append(f"What means the same here, to start from and to check:\n\n  {text}")
    return "\n".join(lines)


def _still_to_do(start: Collection[str], left: Sequence[str], schema: type[RunConfig]) -> str:
    """What the translation lacks: fields that a run needs, and options without a counterpart."""
    fields = config_fields(schema).items()
    needed = [name for name, info in fields if info.is_required() and name not in start]
    if not {"max_steps", "num_train_epochs"} & set(start):
        needed.append("max_steps or num_train_epochs")
    parts = [f"Still to set: {', '.join(needed)}"] if needed else []
    parts += [f"not translated: {', '.join(left)}"] if left else []
    text = "; ".join(parts)
    return text[:1].upper() + text[1:]


def _translated(
    options: Sequence[Option], project: str, schema: type[RunConfig]
) -> tuple[dict[str, tuple[Any, list[str]]], dict[str, str], list[str]]:
    """Field -> value and its words, for options that mean the same here.

    Values that do not fit are left out.

    Returns:
        these, a note for each of our own names that means something else in `project`, and the
        options that have a field here and are not among these.
    """
    fields = config_fields(schema)
    found: dict[str, tuple[Any, list[str]]] = {}
    differing: dict[str, str] = {}
    left: list[str] = []
    meant: dict[str, str] = {}
    for option in options:
        row = counterpart(option.name, project, schema)
        if row is not None and not row.same_value:
            if option.name in fields:
                differing[option.name] = row.note
            if row.fields:
                left.append(f"--{option.name}")
            continue
        name = option.name if row is None else row.fields[0]
        if name in fields:
            meant[f"--{option.name}"] = name
        if name in fields and name not in found:
            with suppress(ValueError):
                found[name] = (value_of(option.texts, fields[name]), option.texts)
    wrong = wrong_fields(schema, {name: value for name, (value, _) in found.items()})
    right = {name: found[name] for name in fields if name in found and name not in wrong}
    return right, differing, left + [own for own, name in meant.items() if name not in right]
