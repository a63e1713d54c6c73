"""The words behind CONFIG on a command line -> values of fields, or what to write instead.

`--section.field value`, `--section.field=value` and Hydra's `section.field=value` (also with `+`)
mean the same. `-` and `_` mean the same in a name. A list is `a b`, `a,b` or `[a, b]`; a mapping is
`{name: value}`, or one of its keys as `--section.field.name value`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from rlsys.config.elsewhere import counterpart
from rlsys.config.field_types import kinds_of, split_list
from rlsys.config.fields import config_fields, config_sections, first_sentence
from rlsys.config.hints import hint
from rlsys.config.schema import RunConfig, Section
from rlsys.config.yaml_text import load_yaml, read_scalar
from rlsys.problems import Problem

_OPTION = re.compile(r"--(?P<name>[^=]*)(?:=(?P<value>.*))?", re.DOTALL)
_HYDRA = re.compile(r"\+{0,2}(?P<name>[A-Za-z_][\w.-]*)=(?P<value>.*)", re.DOTALL)
_ONE_DASH = re.compile(r"-(?P<name>[A-Za-z_][\w.-]*)(?:=(?P<value>.*))?", re.DOTALL)


@dataclass(slots=True)
class Option:
    """A name and the words behind it."""

    written: str
    """The name as the user wrote it, with dashes."""
    name: str
    has_equals: bool
    """Whether the first value stands behind `=`."""
    schema: type[RunConfig]
    """Of the config whose field it may be."""
    texts: list[str] = field(default_factory=list)

    def wants_value(self) -> bool:
        """Whether the next word is its value, whatever it looks like."""
        info = config_fields(self.schema).get(self.name)
        return not self.texts and (info is None or bool not in kinds_of(info))

    def wants_values(self) -> bool:
        """Whether more words may be its values."""
        info = config_fields(self.schema).get(self.name)
        return bool({list, dict} & kinds_of(info)) if info is not None else not self.has_equals


def read_options(
    words: Sequence[str], problems: list[Problem], schema: type[RunConfig]
) -> list[Option]:
    """The names that are given, each with its words; words before the first are problems."""
    options: list[Option] = []
    for word in words:
        last = options[-1] if options else None
        found = _OPTION.fullmatch(word) or _other_spelling(word, last, schema)
        if found is not None:
            value = found["value"]
            name = _normal(found["name"])
            option = Option(word.partition("=")[0], name, value is not None, schema)
            options.append(option)
            option.texts += [] if value is None else [value]
        elif last is not None:
            last.texts.append(word)
        elif _normal(word) in config_fields(schema):
            problems.append(Problem(f"{word}: write --{_normal(word)} VALUE"))
        else:
            problems.append(Problem(f"{word}: expected --section.field before it"))
    return options


def _other_spelling(
    word: str, last: Option | None, schema: type[RunConfig]
) -> re.Match[str] | None:
    """`name=value` or `-name`, where it is not a value of the option before it."""
    found = _HYDRA.fullmatch(word) or _ONE_DASH.fullmatch(word)
    if found is None or (last is not None and last.wants_value()):
        return None
    name = _normal(found["name"])
    known = name in config_fields(schema) or name.partition(".")[0] in config_sections(schema)
    if last is not None and last.wants_values() and not known:
        return None
    return found if known or "=" in word else None


def _normal(name: str) -> str:
    return name.replace("-", "_")


def apply_options(
    options: Sequence[Option],
    values: dict[str, Any],
    problems: list[Problem],
    project: str | None,
    schema: type[RunConfig],
) -> tuple[list[str], list[str]]:
    """Put the values of `options` into `values`, the mapping of a config file.

    Args:
        options: from the command line.
        values: changed in place.
        problems: gets what is wrong.
        project: the other project that the names are from, if any.
        schema: the class of the config.

    Returns:
        the fields that were set, and the names that no field has.
    """
    for name, count in Counter(option.name for option in options).items():
        if count > 1:
            text = f"--{name}: is given {count} times: keep one, with all its values"
            problems.append(Problem(text))
    found: list[str] = []
    unknown: list[str] = []
    for option in options:
        name, keys = _field_and_keys(option.name, schema)
        problem = _problem_of_name(option, name, keys, project, schema)
        if problem is not None:
            problems.append(Problem(f"{option.written}: {problem}"))
            unknown.append(name)
            continue
        field_name = name.rpartition(".")[2]
        parent = _section_of(name, values)
        if parent is None:  # validation reports that the section is not a mapping
            continue
        if keys:
            value = _yaml_or_text(" ".join(option.texts))
            parent[field_name] = _with_key(parent.get(field_name), keys, value)
        else:
            try:
                parent[field_name] = value_of(option.texts, config_fields(schema)[name])
            except ValueError as error:
                problems.append(Problem(f"{option.written}: {error}"))
                continue
        found.append(name)
    return found, unknown


def _section_of(name: str, values: dict[str, Any]) -> dict[str, Any] | None:
    """The mapping of the field's section, made where it is missing or null."""
    parent = values
    for section in name.split(".")[:-1]:
        if parent.get(section) is None:
            parent[section] = {}
        parent = parent[section]
        if not isinstance(parent, dict):
            return None
    return parent


def _field_and_keys(name: str, schema: type[RunConfig]) -> tuple[str, list[str]]:
    """`reward.reward_params.length.max_length` as that field and the keys below it."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 1, -1):
        info = config_fields(schema).get(".".join(parts[:end]))
        if info is not None and dict in kinds_of(info):
            return ".".join(parts[:end]), parts[end:]
    return name, []


def _problem_of_name(
    option: Option, name: str, keys: list[str], project: str | None, schema: type[RunConfig]
) -> str | None:
    fields = config_fields(schema)
    if option.written.startswith("-") and not option.written.startswith("--"):
        return f"write it with two dashes: --{option.name}"
    if name in config_sections(schema):
        example = next(field for field in fields if field.startswith(f"{name}."))
        return f"is a section; set one of its fields, such as --{example}"
    if name in fields:
        return _needs_value(fields[name]) if keys and not option.texts else None
    positive = re.sub(r"(^|\.)no_", r"\1", name)
    if positive in fields and bool in kinds_of(fields[positive]):
        return f"there is no such field. Write --{positive} false"
    row = counterpart(name, project, schema) if project else None
    if row is not None and row.same_value:
        return f"-> {row.fields[0]}. {first_sentence(fields[row.fields[0]].description)}"
    return f"there is no such field.{hint(name, project, schema)}"


def _needs_value(info: FieldInfo) -> str:
    return f"needs a value. {first_sentence(info.description)}"


# --- values --------------------------------------------------------------------------------------


def value_of(texts: list[str], info: FieldInfo) -> Any:
    """What the words mean for a field of these types; validation reports a text that stays one.

    Raises:
        ValueError: the words are too few or too many.
    """
    kinds = kinds_of(info)
    if list in kinds:
        if NoneType in kinds and texts in (["null"], ["none"], ["None"]):
            return None
        together = " ".join(texts)
        if together.startswith("[") and together.endswith("]"):
            return _yaml_or_text(together)
        if str in kinds and len(texts) == 1:  # such as a pattern; the field decides
            return texts[0]
        return [part for text in texts for part in split_list(text)]
    if texts and texts != ["null"] and any(map(_is_mapping, kinds)):
        return _yaml_or_text(" ".join(texts))
    if not texts:
        if bool in kinds:
            return True
        raise ValueError(_needs_value(info))
    if len(texts) > 1:
        raise ValueError(f"takes one value, but has {len(texts)}: {' '.join(texts)}")
    [text] = texts
    if NoneType in kinds and text == "null":
        return None
    if not kinds & {int, float, bool}:
        return text
    if not text:  # from "$LR" where LR is not set; YAML reads it as null
        raise ValueError(_needs_value(info))
    return read_scalar(text)


def _is_mapping(kind: Any) -> bool:
    return kind is dict or (isinstance(kind, type) and issubclass(kind, Section))


def _yaml_or_text(text: str) -> Any:
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text


def _with_key(mapping: Any, keys: list[str], value: Any) -> dict[str, Any]:
    """A copy of `mapping` with the value at `keys`, one below the other."""
    changed = deepcopy(mapping) if isinstance(mapping, dict) else {}
    if keys[1:]:
        value = _with_key(changed.get(keys[0]), keys[1:], value)
    return changed | {keys[0]: value}
