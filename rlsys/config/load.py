"""A YAML file and command-line words -> a checked `Config` with the origin of each value.

All problems are collected first and reported in one error, each with its remedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Generic, Literal

import yaml

from rlsys.config.fields import (
    MISSING,
    config_fields,
    config_sections,
    optional_sections,
    value_at,
)
from rlsys.config.hints import is_of_elsewhere
from rlsys.config.local_paths import is_in_job_copy
from rlsys.config.method import (
    for_other_command,
    perhaps_for_other_command,
    schema_of_command,
)
from rlsys.config.pasted_command import advice, read_command_line
from rlsys.config.schema import AnyConfig, Config, RunConfig
from rlsys.config.validation import validate
from rlsys.config.words import apply_options
from rlsys.config.yaml_text import dump_yaml, load_yaml
from rlsys.files import replacing, unused_folder
from rlsys.problems import Problem, ProblemsError
from rlsys.redact import names_of_secrets
from rlsys.text import not_utf8

Origin = Literal["default", "file", "command line", "adapter", "model"]
"""Who set a value: adapter is the one in policy.lora.path, model the positions of model.path."""

_SAVED_HEAD = "# The resolved config of the run in this folder."


@dataclass(frozen=True)
class ResolvedConfig(Generic[AnyConfig]):
    """A config that can run, and where each of its values came from."""

    config: AnyConfig
    origins: dict[str, Origin]
    """Every field, `section.field` or a top-level one -> who set it. An optional section is a field
    where it is null, else it has fields."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> ResolvedConfig[Config]:
    """`load_config_as`, for GRPO."""
    return load_config_as(Config, path, overrides)


def load_config_as(
    schema: type[AnyConfig], path: str | Path, overrides: Sequence[str] = ()
) -> ResolvedConfig[AnyConfig]:
    """The config of YAML file `path` with command-line `overrides` applied.

    Args:
        schema: the class of the config.
        path: the YAML file.
        overrides: command-line words: `["--policy.lr", "1e-5", "--checkpoint.resume"]`.

    Raises:
        ProblemsError: lists every problem of the file, the overrides and their combination.
    """
    problems: list[Problem] = []
    values = _read_file(Path(path), problems, schema)
    in_file = _leaves(values, schema)
    if text := for_other_command(path, values, schema):
        raise _refused(Path(path), text)
    options, project = read_command_line(overrides, in_file, problems, schema)
    in_words, unknown = apply_options(options, values, problems, project, schema)
    origins: dict[str, Origin] = dict.fromkeys(config_fields(schema), "default")
    origins |= dict.fromkeys((name for name in in_file if name in origins), "file")
    origins |= dict.fromkeys(in_words, "command line")
    if "num_train_epochs" in in_words and "max_steps" not in in_words and "max_steps" in values:
        del values["max_steps"]  # the command line says how long the run is
        origins["max_steps"] = "default"
    unknown += [name for name in _leaves(values, schema) if name not in origins]
    config = validate(schema, values, set(in_words), problems, project)
    if config is None:
        given = [name for name, origin in origins.items() if origin != "default"]
        note = perhaps_for_other_command(path, given, schema)
        if project:
            note = advice(options, project, unknown, given, path, schema)
        raise ProblemsError(str(path), problems, note=note)
    return ResolvedConfig(config, _of_values(origins, config))


def _of_values(origins: dict[str, Origin], config: RunConfig) -> dict[str, Origin]:
    """The origins of fields with a value: of an optional section, it is null or has its fields."""
    values, inside = config.model_dump(), optional_sections(type(config))
    found = {name: value_at(values, name) for name in origins}
    return {
        name: origin
        for name, origin in origins.items()
        if found[name] is not MISSING and (name not in inside or found[name] is None)
    }


def problems_of_words(words: Sequence[str], command: str) -> str | None:
    """What is wrong with the words of a command without CONFIG; None where nothing else is."""
    schema, problems = schema_of_command(command), list[Problem]()
    options, project = read_command_line(words, [], problems, schema)
    given, unknown = apply_options(options, {}, problems, project, schema)
    if not problems:
        return None
    note = advice(options, project, unknown, given, None, schema) if project else None
    return str(ProblemsError("the command line", problems, note=note))


def save_config(config: RunConfig, path: Path) -> None:
    """Write every field to YAML file `path`, which `load_config` reads back to an equal config.

    The file begins with the command that runs it again, in another folder. Its relative paths start
    at the working directory, which that command enters.
    """
    path = path.absolute()
    folder = quote(str(unused_folder(path.parent)))
    again = f"rlsys {config.command} {quote(str(path))} --output_dir {folder}"
    if config.checkpoint.resume:
        again += " --checkpoint.resume false"
    where = ""
    if is_in_job_copy(Path.cwd()):  # Ray deletes it
        where = ", in the folder that the Ray job was submitted from"
    else:
        again = f"cd {quote(str(Path.cwd()))} && {again}"
    head = f"{_SAVED_HEAD} To run it again{where}:\n#   {again}\n"
    values = config.model_dump()
    with replacing(path) as scratch:
        if any(names_of_secrets(values)):
            scratch.touch(mode=0o600)  # for the owner alone
        scratch.write_text(head + dump_yaml(values), encoding="utf-8")


def is_saved_config(path: Path) -> bool:
    """Whether `save_config` wrote this file, and not a user."""
    return path.read_text(encoding="utf-8", errors="replace").startswith(_SAVED_HEAD)


# --- the file ------------------------------------------------------------------------------------


def _read_file(path: Path, problems: list[Problem], schema: type[RunConfig]) -> dict[str, Any]:
    """The file's mapping: sections -> fields, both with text keys.

    Raises:
        ProblemsError: the file holds no mapping.
    """
    if path.is_dir():
        inside = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
        example = f", such as {inside[0]}" if inside else ""
        raise _refused(path, f"it is a folder; name a YAML file{example}")
    if not path.is_file():
        raise _refused(path, "there is no such file")
    content = path.read_bytes()
    repeated: list[str] = []
    try:
        values = load_yaml(content.decode("utf-8"), repeated=repeated)
    except UnicodeDecodeError as error:
        before = content[: error.start].split(b"\n")
        line = content.split(b"\n")[len(before) - 1]
        text = f"line {len(before)} {not_utf8(line, len(before[-1]))}"
        raise _refused(path, text) from None
    except yaml.YAMLError as error:
        text = f"it is not valid YAML: {' '.join(str(error).split())}"
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            mark = error.problem_mark
            place = f"{path.name}, line {mark.line + 1}, column {mark.column + 1}"
            text = f"{place}: it is not valid YAML: {error.problem}"
        raise _refused(path, text) from None
    if not isinstance(values, dict):
        raise _refused(path, "it should hold `section:` blocks of `field: value` lines")
    problems += map(Problem, repeated)
    checked = _with_text_keys(values, schema)
    for name in [key for key in checked if "." in key and key in config_fields(schema)]:
        section, _, field = name.rpartition(".")
        inside = checked.setdefault(section, {})
        value = checked.pop(name)
        if isinstance(inside, dict) and field not in inside:
            inside[field] = value
        else:
            text = f"{name}: is given under {section}: too: keep one of them"
            problems.append(Problem(text))
    return checked


def _refused(path: Path, text: str) -> ProblemsError:
    return ProblemsError(str(path), [Problem(text)])


def _with_text_keys(values: dict[Any, Any], schema: type[RunConfig]) -> dict[str, Any]:
    """The file's mapping with names of sections and fields as texts.

    An empty section, `grpo:` with nothing below it, means all its defaults. A section of another
    project is taken apart, so that each of its names gets an answer.
    """
    sections = config_sections(schema)
    checked: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key)
        if isinstance(value, dict):
            value = {str(field): inner for field, inner in value.items()}
            names = _names_below(name, value)
            if name not in sections and any(is_of_elsewhere(below, schema) for below in names):
                checked |= names
                continue
        checked[name] = {} if value is None and name in sections else value
    return checked


def _names_below(name: str, value: Any) -> dict[str, Any]:
    """`{"a.b.c": 1}` for `a` and `{"b": {"c": 1}}`."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _names_below(f"{name}.{key}", inner)
    return found


def _leaves(values: dict[str, Any], schema: type[RunConfig]) -> list[str]:
    """The names of the fields and of whatever stands in place of fields."""
    names: list[str] = []
    for key, value in values.items():
        if not isinstance(value, dict):
            names.append(str(key))
            continue
        for field, inner in value.items():
            name = f"{key}.{field}"
            is_section = name in optional_sections(schema) and isinstance(inner, dict) and inner
            names += [f"{name}.{below}" for below in inner] if is_section else [name]
    return names
