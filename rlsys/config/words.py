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

from rlsys.config.fields import config_fields, config_sections, first_sentence
from rlsys.config.hints import hint
from rlsys.config.texts import kinds_of, split_list
from rlsys.config.yaml_text import load_yaml, read_scalar

_OPTION = re.compile(r"--(?P<name>[^=]*)(?:=(?P<value>.*))?", re.DOTALL)
_HYDRA = re.compile(r"\+{0,2}(?P<name>[A-Za-z_][\w.-]*)=(?P<value>.*)", re.DOTALL)
_ONE_DASH = re.compile(r"-(?P<name>[A-Za-z_][\w.-]*)(?:=(?P<value>.*))?", re.DOTALL)


@dataclass(slots=True)
class Option:
    """A name and the words behind it."""

    written: str
    """As the user wrote it, with the dashes."""
    name: str
    texts: list[str] = field(default_factory=list)

    def wants_value(self) -> bool:
        """Whether the next word is its value, whatever it looks like."""
        info = config_fields().get(self.name)
        return not self.texts and (info is None or bool not in kinds_of(info))

    def wants_values(self) -> bool:
        """Whether more words may be its values."""
        info = config_fields().get(self.name)
        if info is None:
            return not self.written.endswith("=")
        return bool({list, dict} & kinds_of(info))


def apply_words(
    words: Sequence[str],
    values: dict[str, Any],
    problems: list[str],
    project: str | None = None,
) -> tuple[list[str], list[str]]:
    """Put what `words` say into `values`, a config file's mapping.

    Args:
        words: of the command line.
        values: changed in place.
        problems: gets what is wrong.
        project: whose names the words are, if not ours.

    Returns:
        the fields that were set, and the names that no field has.
    """
    fields = config_fields()
    options = read_options(words, problems)
    for name, count in Counter(option.name for option in options).items():
        if count > 1:
            problems.append(f"--{name}: is given {count} times: keep one, with all its values")
    found: list[str] = []
    unknown: list[str] = []
    for option in options:
        name, keys = _field_and_keys(option.name, fields)
        problem = _problem_of_name(option, name, keys, fields, project)
        if problem is not None:
            problems.append(problem)
            unknown.append(name)
            continue
        section, _, field_name = name.rpartition(".")
        parent = values.setdefault(section, {}) if section else values
        if not isinstance(parent, dict):  # the section itself is reported as wrong
            continue
        if keys:
            parent[field_name] = _with_key(
                parent.get(field_name), keys, _mapping(" ".join(option.texts))
            )
        else:
            try:
                parent[field_name] = value_of(option.texts, fields[name])
            except ValueError as error:
                problems.append(f"{option.written.rstrip('=')}: {error}")
                continue
        found.append(name)
    return found, unknown


def read_options(words: Sequence[str], problems: list[str]) -> list[Option]:
    """The names that are given, each with its words."""
    options: list[Option] = []
    for word in words:
        last = options[-1] if options else None
        found = _OPTION.fullmatch(word) or _other_spelling(word, last)
        if found is None and last is None:
            known = _normal(word) in config_fields()
            way = (
                f"write --{_normal(word)} VALUE" if known else "expected --section.field before it"
            )
            problems.append(f"{word}: {way}")
        elif found is None:
            assert last is not None
            last.texts.append(word)
        elif _ONE_DASH.fullmatch(word):
            name = _normal(found["name"])
            problems.append(f"-{found['name']}: write it with two dashes: --{name}")
            options.append(Option(word, ""))
        else:
            written = word.partition("=")[0]
            if found["value"] is None:
                options.append(Option(written, _normal(found["name"])))
            else:
                options.append(Option(f"{written}=", _normal(found["name"]), [found["value"]]))
    return [option for option in options if option.name or option.written.startswith("--")]


def _other_spelling(word: str, last: Option | None) -> re.Match[str] | None:
    """`name=value` or `-name`, where it is not a value of the option before it."""
    found = _HYDRA.fullmatch(word) or _ONE_DASH.fullmatch(word)
    if found is None or (last is not None and last.wants_value()):
        return None
    name = _normal(found["name"])
    known = name in config_fields() or name.partition(".")[0] in config_sections()
    if last is not None and last.wants_values() and not known:
        return None
    return found if known or "=" in word else None


def _normal(name: str) -> str:
    return name.replace("-", "_")


def _field_and_keys(name: str, fields: dict[str, FieldInfo]) -> tuple[str, list[str]]:
    """`reward.reward_params.length.max_length` as that field and the keys below it."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 1, -1):
        start = ".".join(parts[:end])
        if start in fields and dict in kinds_of(fields[start]):
            return start, parts[end:]
    return name, []


def _problem_of_name(
    option: Option,
    name: str,
    keys: list[str],
    fields: dict[str, FieldInfo],
    project: str | None,
) -> str | None:
    written = option.written.rstrip("=")
    if name in config_sections():
        example = next(field for field in fields if field.startswith(f"{name}."))
        return f"{written}: is a section; set one of its fields, such as --{example}"
    if name in fields:
        if keys and not option.texts:
            return f"{written}: needs a value. {first_sentence(fields[name].description)}"
        return None
    positive = re.sub(r"(^|\.)no_", r"\1", name)
    if positive in fields and bool in kinds_of(fields[positive]):
        return f"{written}: there is no such field. Write --{positive} false"
    return f"{written}: there is no such field.{hint(name, project)}"


def value_of(texts: list[str], info: FieldInfo) -> Any:
    """What the words mean for a field of these types; what remains a text, validation reports.

    Raises:
        ValueError: too few words, or too many.
    """
    kinds = kinds_of(info)
    if list in kinds:
        if NoneType in kinds and texts in (["null"], ["none"], ["None"]):
            return None
        return _list(texts)
    if dict in kinds and texts:
        return _mapping(" ".join(texts))
    if not texts:
        if bool in kinds:
            return True
        raise ValueError(f"needs a value. {first_sentence(info.description)}")
    if len(texts) > 1:
        raise ValueError(f"takes one value, but has {len(texts)}: {' '.join(texts)}")
    [text] = texts
    if NoneType in kinds and text == "null":
        return None
    if not kinds & {int, float, bool}:
        return text
    if not text:  # as "$LR" is where LR is not set; YAML reads it as null
        raise ValueError(f"needs a value. {first_sentence(info.description)}")
    return read_scalar(text)


def _list(texts: list[str]) -> Any:
    together = " ".join(texts)
    if together.startswith("[") and together.endswith("]"):
        return _mapping(together)
    return [part for text in texts for part in split_list(text)]


def _mapping(text: str) -> Any:
    """What it means in YAML; another text stays one, to be reported."""
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text


def _with_key(mapping: Any, keys: list[str], value: Any) -> dict[str, Any]:
    """`mapping` with the value at `keys`, one below the other."""
    changed = deepcopy(mapping) if isinstance(mapping, dict) else {}
    if keys[1:]:
        value = _with_key(changed.get(keys[0]), keys[1:], value)
    return changed | {keys[0]: value}
