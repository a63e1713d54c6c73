"""A YAML file and command-line overrides -> a checked Config that knows where each value is from.

All problems are found first and told in one error, each with its remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import join, quote
from textwrap import indent
from types import NoneType
from typing import Any, Literal

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlsys.config.fields import config_fields, config_sections, first_sentence
from rlsys.config.hints import coming_from, counterpart, hint, is_of_elsewhere, likely_project
from rlsys.config.local_paths import is_in_job_copy
from rlsys.config.pasted_command import PastedCommand, split_command
from rlsys.config.schema import Config
from rlsys.config.texts import kinds_of
from rlsys.config.words import apply_words, read_options, value_of
from rlsys.config.yaml_text import dump_yaml, load_yaml
from rlsys.files import replacing, unused_folder
from rlsys.problems import Problem, ProblemsError
from rlsys.text import not_utf8

Origin = Literal["default", "file", "command line"]

_PLACEHOLDERS: dict[str, Any] = {
    "output_dir": "-",
    "data.dataset": ["-"],
    "model.path": "-",
    "rollout.generation_batch_size": 8,
}
"""Stand in for required fields that are missing or wrong, so that the rest can be checked."""


_SAVED_HEAD = "# The resolved config of the run in this folder."


@dataclass(frozen=True)
class ResolvedConfig:
    """A config that can run, and where each of its values came from."""

    config: Config
    origins: dict[str, Origin]
    """`section.field` (or a top-level field) -> who set it; one entry for every field."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ResolvedConfig:
    """The config of YAML file `path` with command-line `overrides` applied.

    Args:
        path: The YAML file.
        overrides: Command-line words: `["--policy.lr", "1e-5", "--checkpoint.resume"]`.

    Raises:
        ProblemsError: with every problem found in the file, the overrides and their combination.
    """
    problems: list[str] = []
    values = _read_yaml(Path(path), problems)
    origins: dict[str, Origin] = dict.fromkeys(config_fields(), "default")
    origins |= {name: "file" for name in _leaves(values) if name in origins}
    command = split_command(overrides)
    problems += command.problems()
    project = _project(command, _leaves(values))
    found, unknown = apply_words(command.options, values, problems, project)
    origins |= dict.fromkeys(found, "command line")
    if "num_train_epochs" in found and "max_steps" not in found and "max_steps" in values:
        del values["max_steps"]  # in the file, where it was said before
        origins["max_steps"] = "default"
    unknown += [name for name in _leaves(values) if name not in origins]
    config = _validate(values, origins, problems, project)
    if config is None:
        given = [name for name, origin in origins.items() if origin != "default"]
        advice = _advice(command, project, unknown, given, path)
        raise ProblemsError(str(path), list(map(Problem, problems)), note=advice)
    return ResolvedConfig(config, origins)


def problems_of_words(words: Sequence[str]) -> str | None:
    """What is wrong with a command line that has no CONFIG; None where only that is missing."""
    command = split_command(words)
    problems = command.problems()
    project = _project(command, [])
    given, unknown = apply_words(command.options, {}, problems, project)
    if not problems:
        return None
    note = _advice(command, project, unknown, given, None)
    return str(ProblemsError("the command line", list(map(Problem, problems)), note=note))


def save_config(config: Config, path: Path) -> None:
    """Write every field to YAML file `path`, which `load_config` reads back to an equal config.

    It begins with the command that runs it again, in another folder. Its relative paths start at
    the working directory, which that command enters.
    """
    path = path.absolute()
    again = f"rlsys grpo {quote(str(path))} --output_dir {quote(str(unused_folder(path.parent)))}"
    if config.checkpoint.resume:
        again += " --checkpoint.resume false"
    where = ""
    if is_in_job_copy(Path.cwd()):  # Ray deletes it
        where = ", in the folder that the Ray job was submitted from"
    else:
        again = f"cd {quote(str(Path.cwd()))} && {again}"
    head = f"{_SAVED_HEAD} To run it again{where}:\n#   {again}\n"
    with replacing(path) as scratch:
        scratch.write_text(head + dump_yaml(config.model_dump()), encoding="utf-8")


def is_saved_config(path: Path) -> bool:
    """Whether `save_config` wrote this file, and not a user."""
    return path.read_text(encoding="utf-8").startswith(_SAVED_HEAD)


# --- the file ------------------------------------------------------------------------------------


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    """The file's mapping; raises ProblemsError when there is nothing to go on with."""
    if path.is_dir():
        inside = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
        example = f", such as {inside[0]}" if inside else ""
        raise ProblemsError(str(path), [Problem(f"it is a folder; name a YAML file{example}")])
    if not path.is_file():
        raise ProblemsError(str(path), [Problem("there is no such file")])
    text = _decode(path)
    try:
        values = load_yaml(text, repeated=problems)
    except yaml.YAMLError as error:
        raise ProblemsError(str(path), [Problem(f"it is not valid YAML: {error}")]) from None
    if not isinstance(values, dict):
        raise ProblemsError(
            str(path), [Problem("it should hold `section:` blocks of `field: value` lines")]
        )
    checked = _with_text_keys(values)
    for name in [key for key in checked if "." in key and key in config_fields()]:
        section, _, field = name.rpartition(".")
        inside = checked.setdefault(section, {})
        if isinstance(inside, dict) and field not in inside:
            inside[field] = checked.pop(name)
        else:
            problems.append(f"{name}: is given under {section}: too: keep one of them")
            del checked[name]
    return checked


def _with_text_keys(values: dict[Any, Any]) -> dict[str, Any]:
    """The file's mapping with names of sections and fields as texts.

    An empty section, `grpo:` with nothing below it, means all its defaults. A section of another
    project is taken apart, so that each of its names gets an answer.
    """
    sections = config_sections()
    checked: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key)
        if isinstance(value, dict):
            value = {str(field): inner for field, inner in value.items()}
            names = _names_below(name, value)
            if name not in sections and any(map(is_of_elsewhere, names)):
                checked |= names
                continue
        checked[name] = {} if value is None and name in sections else value
    return checked


def _names_below(name: str, value: Any) -> dict[str, Any]:
    """`{"a.b.c": 1}` of `a` and `{"b": {"c": 1}}`."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _names_below(f"{name}.{key}", inner)
    return found


def _decode(path: Path) -> str:
    """The text of a file in UTF-8; raises ProblemsError with line and byte when it is none."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start].split(b"\n")
        line = content.split(b"\n")[len(before) - 1]
        problem = f"line {len(before)} {not_utf8(line, len(before[-1]))}"
        raise ProblemsError(str(path), [Problem(problem)]) from None


def _leaves(values: dict[str, Any]) -> list[str]:
    names = []
    for key, value in values.items():
        names += [f"{key}.{field}" for field in value] if isinstance(value, dict) else [str(key)]
    return names


# --- commands and files of other projects --------------------------------------------------------


def _project(command: PastedCommand, names: Sequence[str]) -> str | None:
    """Whose command or file it is, if not ours."""
    names = [*names, *(option.name for option in read_options(command.options, []))]
    return command.project or likely_project(
        [name for name in names if name not in config_fields()]
    )


def _advice(
    command: PastedCommand,
    project: str | None,
    unknown: Sequence[str],
    given: Sequence[str],
    path: str | Path | None,
) -> str | None:
    """What differs for someone from another project, and the part of the command that does not.

    Args:
        command: what was pasted.
        project: where it is from.
        unknown: names that no field has.
        given: fields that were set.
        path: of the CONFIG; without one, the translation is a file.
    """
    if project is None:
        return None
    start, differing = _translated(command, project)
    lines = [coming_from(project, unknown, given)]
    lines += [f"{name} means something else there: {note}" for name, note in differing.items()]
    if start and path is None:
        text = indent(dump_yaml(_nested({name: value for name, (value, _) in start.items()})), "  ")
        lines.append(f"What means the same here, as a CONFIG to start from and to check:\n\n{text}")
    elif start:
        words = [word for name, (_, texts) in start.items() for word in (f"--{name}", *texts)]
        text = join(["rlsys", "explain", str(path), *words])
        lines.append(f"What means the same here, to start from and to check:\n\n  {text}")
    return "\n".join(lines)


def _translated(
    command: PastedCommand, project: str
) -> tuple[dict[str, tuple[Any, list[str]]], dict[str, str]]:
    """Fields with value and words, where both projects mean the same by them.

    Returns:
        those, and the names that are fields of ours and count something else there.
    """
    fields = config_fields()
    found: dict[str, tuple[Any, list[str]]] = {}
    differing: dict[str, str] = {}
    for option in read_options(command.options, []):
        row = counterpart(option.name, project)
        if row is not None and not row.same_value:
            if option.name in fields:
                differing[option.name] = row.note
            continue
        name = option.name if row is None else row.fields[0]
        if name in fields and name not in found:
            with suppress(ValueError):
                found[name] = (value_of(option.texts, fields[name]), option.texts)
    try:
        Config.model_validate(_nested(_PLACEHOLDERS | {n: v for n, (v, _) in found.items()}))
    except ValidationError as error:
        for name in {_field_of(detail)[0] for detail in error.errors()}:
            found.pop(name, None)
    return {name: found[name] for name in fields if name in found}, differing


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """`{"a": {"b": 1}}` of `{"a.b": 1}`."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[field] = value
    return nested


# --- validation ----------------------------------------------------------------------------------


def _validate(
    values: dict[str, Any],
    origins: dict[str, Origin],
    problems: list[str],
    project: str | None,
) -> Config | None:
    """The config, or None when there are problems, which are all added to `problems`."""
    for section in config_sections():
        values.setdefault(section, {})  # so that what it lacks is told field by field
    broken: set[str] = set()
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        for detail in _types_together(error.errors()):
            rules = detail.get("ctx", {}).get("error")
            if isinstance(rules, ProblemsError):
                problems += [problem.text for problem in rules.problems]
            else:
                broken.add(_field_of(detail)[0])
                problems.append(_describe(detail, origins, project))
    else:
        return None if problems else config
    if broken:
        problems += _rules_broken_by_the_rest(values, broken)
    return None


def _rules_broken_by_the_rest(values: dict[str, Any], wrong: set[str]) -> list[str]:
    """The cross-field rules that the fields without a mistake of their own break."""
    rest: dict[str, Any] = {}
    for name in config_fields():
        section, _, field = name.rpartition(".")
        source = values[section] if section else values
        target = rest.setdefault(section, {}) if section else rest
        usable = name not in wrong and section not in wrong
        if usable and field in source:
            target[field] = source[field]
        elif name in _PLACEHOLDERS:
            wrong.add(name)
            target[field] = _PLACEHOLDERS[name]
    try:
        Config.model_validate(rest)
    except ValidationError as error:
        (detail,) = error.errors()
        rules = detail["ctx"]["error"]
        assert isinstance(rules, ProblemsError)
        return [p.text for p in rules.problems if not _concerns(p.fields, wrong)]
    return []


def _concerns(fields: tuple[str, ...], wrong: set[str]) -> bool:
    return any(field in wrong or field.rpartition(".")[0] in wrong for field in fields)


def _types_together(details: list[ErrorDetails]) -> list[ErrorDetails]:
    """One error for a field that may be of several types; pydantic has one for each type."""
    together: dict[tuple[Any, ...], ErrorDetails] = {}
    for detail in details:
        name, below = _field_of(detail)
        first = together.setdefault((name, *below), detail)
        if first is not detail:
            first["msg"] = f"{_rule(first)}, or {_rule(detail).removeprefix('should be ')}"
    return list(together.values())


def _field_of(detail: ErrorDetails) -> tuple[str, list[Any]]:
    """The name of the field, and list indices and keys of the user's own below it."""
    place = list(detail["loc"])
    depth = 2 if place and place[0] in config_sections() else 1
    name, below = ".".join(str(part) for part in place[:depth]), place[depth:]
    info = config_fields().get(name)
    if info is not None and len(kinds_of(info) - {NoneType}) > 1:
        del below[:1]  # the type for which it is wrong
    return name, below


def _rule(detail: ErrorDetails) -> str:
    rule = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return rule.split(", unable to ")[0]


def _describe(detail: ErrorDetails, origins: dict[str, Origin], project: str | None) -> str:
    """One problem as a line: the field, its value, the rule, and what the field means."""
    fields = config_fields()
    name, below = _field_of(detail)
    label = name + "".join(f"[{part}]" for part in below)
    if detail["type"] == "extra_forbidden":
        return f"{name}: there is no such field.{hint(name, project)}"
    if name in config_sections():
        return f"{name}: should be a section with fields below it, not {detail['input']!r}"
    meaning = first_sentence(fields[name].description)
    if detail["type"] == "missing":
        return f"{name}: is missing. {meaning}"
    rule = _rule(detail)
    if detail["type"] == "list_type":
        rule = f"should be a list: [{detail['input']}]"
    where = " (command line)" if origins[name] == "command line" else ""
    return f"{label} = {detail['input']!r}{where}: {rule}. {meaning}"
