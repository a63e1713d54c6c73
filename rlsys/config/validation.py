"""Values of a config -> a `Config`, or every problem with them.

pydantic finds fields that are wrong by themselves, and runs the rules between fields only where
there are none. So that one message has both, the rules run a second time on the other fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import NoneType
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from rlsys.config.field_types import kinds_of
from rlsys.config.fields import (
    MISSING,
    config_fields,
    config_sections,
    first_sentence,
    nested,
    optional_sections,
    value_at,
)
from rlsys.config.hints import hint
from rlsys.config.schema import AnyConfig, RunConfig
from rlsys.problems import Problem, ProblemsError

_PLACEHOLDERS: dict[str, Any] = {
    "output_dir": "-",
    "data.dataset": ["-"],
    "model.path": "-",
    "rollout.generation_batch_size": 8,
}
"""Replace required fields that are missing or wrong, so that the others can be checked."""


def validate(
    schema: type[AnyConfig],
    values: dict[str, Any],
    command_line: set[str],
    problems: list[Problem],
    project: str | None,
) -> AnyConfig | None:
    """The config, or None when there are problems.

    Args:
        schema: the class of the config.
        values: the mapping of a config file.
        command_line: fields whose values are from the command line.
        problems: gets what is wrong.
        project: the other project that the names are from, if any.
    """
    for section in config_sections(schema):
        values.setdefault(section, {})  # so that its missing fields are reported one by one
    try:
        config = schema.model_validate(values)
    except ValidationError as error:
        details = error.errors()
    else:
        return None if problems else config
    if rules := _broken_rules(details):
        problems += rules
        return None
    wrong: set[str] = set()
    for detail in _one_for_each_field(schema, details):
        wrong.add(_field_of(schema, detail)[0])
        problems.append(Problem(_describe(schema, detail, command_line, project)))
    rules = _broken_rules(_errors(schema, _without(schema, values, wrong)))
    problems += [rule for rule in rules if not _reads(schema, rule, wrong)]
    return None


def wrong_fields(schema: type[RunConfig], values: Mapping[str, Any]) -> set[str]:
    """The fields of `values`, name -> value, whose values are wrong by themselves."""
    details = _errors(schema, nested(_placeholders(schema) | dict(values)))
    return {_field_of(schema, detail)[0] for detail in details}


def _placeholders(schema: type[RunConfig]) -> dict[str, Any]:
    fields = config_fields(schema)
    return {name: value for name, value in _PLACEHOLDERS.items() if name in fields}


def _errors(schema: type[RunConfig], values: dict[str, Any]) -> list[ErrorDetails]:
    try:
        schema.model_validate(values)
    except ValidationError as error:
        return error.errors()
    return []


# --- rules between fields ------------------------------------------------------------------------


def _broken_rules(details: list[ErrorDetails]) -> list[Problem]:
    errors = [detail.get("ctx", {}).get("error") for detail in details]
    return [p for error in errors if isinstance(error, ProblemsError) for p in error.problems]


def _without(schema: type[RunConfig], values: dict[str, Any], wrong: set[str]) -> dict[str, Any]:
    """`values` without wrong and unknown fields; adds placeholders to both arguments."""
    rest: dict[str, Any] = {}
    for name in config_fields(schema):
        value = value_at(values, name)
        if name in optional_sections(schema) and isinstance(value, dict):
            value = {}  # its fields follow
        if name not in wrong and value is not MISSING:
            rest[name] = value
        elif name in _PLACEHOLDERS:
            wrong.add(name)
            rest[name] = _PLACEHOLDERS[name]
    return {section: {} for section in config_sections(schema)} | nested(rest)


def _reads(schema: type[RunConfig], rule: Problem, wrong: set[str]) -> bool:
    """Whether the rule's text names one of these fields, or a field of one of these sections."""
    patterns = [rf"\b{name}\." for name in wrong & config_sections(schema).keys()]
    fields = wrong & config_fields(schema).keys()
    patterns += [rf"\b{name.rpartition('.')[2]}\b" for name in fields]
    return any(re.search(pattern, rule.text) for pattern in patterns)


# --- one field -----------------------------------------------------------------------------------


def _one_for_each_field(schema: type[RunConfig], details: list[ErrorDetails]) -> list[ErrorDetails]:
    """One error for a field with several types; pydantic has one for each type."""
    found: dict[tuple[Any, ...], ErrorDetails] = {}
    for detail in details:
        name, below = _field_of(schema, detail)
        first = found.setdefault((name, *below), detail)
        if first is not detail:
            first["msg"] = f"{_rule(first)}, or {_rule(detail).removeprefix('should be ')}"
    return list(found.values())


def _field_of(schema: type[RunConfig], detail: ErrorDetails) -> tuple[str, list[Any]]:
    """The name of the field; list indices and keys of the user below it."""
    place = list(detail["loc"])
    depth = 2 if place and place[0] in config_sections(schema) else 1
    if len(place) > 2 and f"{place[0]}.{place[1]}" in optional_sections(schema):
        depth = 3
    name, below = ".".join(str(part) for part in place[:depth]), place[depth:]
    info = config_fields(schema).get(name)
    if info is not None and len(kinds_of(info) - {NoneType}) > 1:
        del below[:1]  # the type for which it is wrong
    return name, below


def _first_field(schema: type[RunConfig], section: str) -> str:
    return next(name for name in config_fields(schema) if name.startswith(f"{section}."))


def _rule(detail: ErrorDetails) -> str:
    rule = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return rule.split(", unable to ")[0]


def _describe(
    schema: type[RunConfig], detail: ErrorDetails, command_line: set[str], project: str | None
) -> str:
    """The field, its value, the rule, and what the field means."""
    name, below = _field_of(schema, detail)
    if detail["type"] == "extra_forbidden":
        return f"{name}: there is no such field.{hint(name, project, schema)}"
    if name in config_sections(schema):
        return f"{name}: should be a section with fields below it, not {detail['input']!r}"
    if name in optional_sections(schema):
        inside = f"a section with fields below it, such as {_first_field(schema, name)}, or null"
        return f"{name}: should be {inside}, not {detail['input']!r}"
    meaning = first_sentence(config_fields(schema)[name].description)
    if detail["type"] == "missing":
        return f"{name}: is missing. {meaning}"
    rule = _rule(detail)
    if detail["type"] == "list_type":
        rule = f"should be a list: [{detail['input']}]"
    label = name + "".join(f"[{part}]" for part in below)
    where = " (command line)" if name in command_line else ""
    return f"{label} = {detail['input']!r}{where}: {rule}. {meaning}"
