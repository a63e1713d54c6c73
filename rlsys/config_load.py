"""A YAML file and command-line overrides -> a checked Config that knows where each value is from.

All problems are found first and told in one error, each with its remedy.
"""

from __future__ import annotations

import types
import typing
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Any, Literal

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from rlsys.config import Config, Section
from rlsys.config_names import fields_of_elsewhere, nearest_fields
from rlsys.config_rules import BrokenRules
from rlsys.data.readers import not_utf8
from rlsys.run_dir import replacing

Origin = Literal["default", "file", "command line"]

_PLACEHOLDERS: dict[str, Any] = {
    "output_dir": "-",
    "max_steps": 1,
    "data.dataset": ["-"],
    "model.path": "-",
    "rollout.generation_batch_size": 8,
}
"""Stand in for required fields that are missing or wrong, so that the rest can be checked."""


_SAVED_HEAD = """\
# The resolved config of the run in this folder. To run it again:
#   rlsys grpo THIS_FILE --output_dir ANOTHER_FOLDER
"""


class ConfigError(ValueError):
    """Everything that is wrong with a config, one line each."""

    def __init__(self, source: str, problems: list[str]):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        lines = [indent(text, "    ").replace("    ", "  - ", 1) for text in problems]
        super().__init__("\n".join([f"{source} has {count}:", *lines]))


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
        ConfigError: with every problem found in the file, the overrides and their combination.
    """
    problems: list[str] = []
    values = _read_yaml(Path(path), problems)
    origins: dict[str, Origin] = dict.fromkeys(config_fields(), "default")
    origins |= {name: "file" for name in _leaves(values) if name in origins}
    for name, value in _parse_overrides(overrides, problems).items():
        section, _, field = name.rpartition(".")
        parent = values.setdefault(section, {}) if section else values
        if isinstance(parent, dict):  # else the section itself is reported as wrong
            parent[field] = value
        origins[name] = "command line"
    config = _validate(values, origins, problems)
    if config is None:
        raise ConfigError(str(path), problems)
    return ResolvedConfig(config, origins)


def save_config(config: Config, path: Path) -> None:
    """Write every field to YAML file `path`, which `load_config` reads back to an equal config."""
    values = config.model_dump(mode="json")
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if yaml.safe_load(body) != values:  # PyYAML reads some rare control characters as line ends
        body = yaml.safe_dump(values, sort_keys=False)
    with replacing(path) as scratch:
        scratch.write_text(_SAVED_HEAD + body, encoding="utf-8")


def is_saved_config(path: Path) -> bool:
    """Whether `save_config` wrote this file, and not a user."""
    return path.read_text(encoding="utf-8").startswith(_SAVED_HEAD)


def config_sections() -> dict[str, type[Section]]:
    """The sections of the config by name, in order."""
    return {
        name: info.annotation
        for name, info in Config.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
    }


def config_fields() -> dict[str, FieldInfo]:
    """Every field: top-level ones by name, then the others as `section.field`, in order."""
    sections = config_sections()
    fields = {name: info for name, info in Config.model_fields.items() if name not in sections}
    for section, cls in sections.items():
        fields |= {f"{section}.{name}": info for name, info in cls.model_fields.items()}
    return fields


def first_sentence(docstring: str | None) -> str:
    """The first sentence of the first paragraph, on one line."""
    text = " ".join((docstring or "").partition("\n\n")[0].split())
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]


# --- the file ------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which also notes keys that are given twice (YAML keeps the last)."""

    def __init__(self, stream: str):
        super().__init__(stream)
        self.repeated: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in lines:
                self.repeated.append(
                    f"{key}: is given twice, in lines {lines[key]} and {line}: keep one of them"
                )
            lines[key] = line
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    """The file's mapping; raises ConfigError when there is nothing to go on with."""
    if path.is_dir():
        inside = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
        example = f", such as {inside[0]}" if inside else ""
        raise ConfigError(str(path), [f"it is a folder; name a YAML file{example}"])
    if not path.is_file():
        raise ConfigError(str(path), ["there is no such file"])
    text = _decode(path)
    try:
        loader = _Loader(text)
        values = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [f"it is not valid YAML: {error}"]) from None
    problems += loader.repeated
    if not isinstance(values, dict):
        raise ConfigError(str(path), ["it should hold `section:` blocks of `field: value` lines"])
    sections = config_sections()
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = {str(field): inner for field, inner in value.items()}
        # An empty section, `grpo:` with nothing below it, means all its defaults.
        checked[str(key)] = {} if value is None and key in sections else value
    return checked


def _decode(path: Path) -> str:
    """The text of a file in UTF-8; raises ConfigError with line and byte when it is none."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = content[: error.start].split(b"\n")
        line = content.split(b"\n")[len(before) - 1]
        problem = f"line {len(before)} {not_utf8(line, len(before[-1]))}"
        raise ConfigError(str(path), [problem]) from None


def _leaves(values: dict[str, Any]) -> list[str]:
    names = []
    for key, value in values.items():
        names += [f"{key}.{field}" for field in value] if isinstance(value, dict) else [str(key)]
    return names


# --- the command line ----------------------------------------------------------------------------


def _parse_overrides(words: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """`--section.field value ...` -> field name -> value; what cannot be read is a problem."""
    fields = config_fields()
    given: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            given.append((name, [value] if equals else []))
        elif given:
            given[-1][1].append(word)
        else:
            problems.append(f"{word}: expected --section.field before it")
    for name, count in Counter(name for name, _ in given).items():
        if count > 1:
            problems.append(f"--{name}: is given {count} times: keep one, with all its values")
    values: dict[str, Any] = {}
    for name, texts in given:
        if name in config_sections():
            example = next(field for field in fields if field.startswith(f"{name}."))
            problems.append(f"--{name}: is a section; set one of its fields, such as --{example}")
        elif name not in fields:
            problems.append(f"--{name}: there is no such field.{_nearest_field(name)}")
        else:
            _parse_value(name, texts, fields[name], values, problems)
    return values


def _parse_value(
    name: str, texts: list[str], info: FieldInfo, values: dict[str, Any], problems: list[str]
) -> None:
    """Texts become numbers later, in validation; here only their shape is decided."""
    kinds = _kinds(info)
    if types.NoneType in kinds and texts in (["null"], ["none"], ["None"]):
        values[name] = None
    elif list in kinds:
        values[name] = [] if texts == ["[]"] else texts
    elif not texts and bool in kinds:
        values[name] = True
    elif dict in kinds and len(texts) == 1:
        values[name] = _mapping(texts[0])
    elif len(texts) == 1:
        values[name] = _boolean(texts[0]) if bool in kinds else texts[0]
    elif not texts:
        problems.append(f"--{name}: needs a value. {first_sentence(info.description)}")
    else:
        problems.append(f"--{name}: takes one value, but has {len(texts)}: {' '.join(texts)}")


def _boolean(text: str) -> bool | str:
    """true and false as booleans; another text stays one, for the validation to report."""
    return {"true": True, "false": False}.get(text.lower(), text)


def _mapping(text: str) -> Any:
    """What `{name: {key: value}}` means in YAML; another text stays one, to be reported."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _kinds(info: FieldInfo) -> set[Any]:
    """The types that a field takes: {list, NoneType} for `list[float] | None`."""
    union = typing.get_origin(info.annotation) in (typing.Union, types.UnionType)
    members = typing.get_args(info.annotation) if union else (info.annotation,)
    return {typing.get_origin(member) or member for member in members}


# --- validation ----------------------------------------------------------------------------------


def _validate(
    values: dict[str, Any], origins: dict[str, Origin], problems: list[str]
) -> Config | None:
    """The config, or None when there are problems, which are all added to `problems`."""
    for section in config_sections():
        values.setdefault(section, {})  # so that what it lacks is told field by field
    broken: list[tuple[str, ...]] = []
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        for detail in error.errors():
            rules = detail.get("ctx", {}).get("error")
            if isinstance(rules, BrokenRules):
                problems += [problem.text for problem in rules.problems]
            else:
                broken.append(tuple(str(part) for part in detail["loc"][:2]))
                problems.append(_describe(detail, origins))
    else:
        return None if problems else config
    if broken:
        problems += _rules_broken_by_the_rest(values, broken)
    return None


def _rules_broken_by_the_rest(values: dict[str, Any], broken: list[tuple[str, ...]]) -> list[str]:
    """The cross-field rules that the fields without a mistake of their own break."""
    wrong = {".".join(place) for place in broken}
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
        assert isinstance(rules, BrokenRules)
        return [p.text for p in rules.problems if not _concerns(p.fields, wrong)]
    return []


def _concerns(fields: tuple[str, ...], wrong: set[str]) -> bool:
    return any(field in wrong or field.rpartition(".")[0] in wrong for field in fields)


def _describe(detail: ErrorDetails, origins: dict[str, Origin]) -> str:
    """One problem as a line: the field, its value, the rule, and what the field means."""
    place = list(detail["loc"])
    fields = config_fields()
    # Below a field, the place goes on with list indices and keys of the user's own.
    depth = 2 if place[0] in config_sections() else 1
    name = ".".join(str(part) for part in place[:depth])
    label = name + "".join(f"[{part}]" for part in place[depth:])
    if detail["type"] == "extra_forbidden":
        return f"{name}: there is no such field.{_nearest_field(name)}"
    if name in config_sections():
        return f"{name}: should be a section with fields below it, not {detail['input']!r}"
    meaning = first_sentence(fields[name].description)
    if detail["type"] == "missing":
        return f"{name}: is missing. {meaning}"
    rule = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
    rule = rule.split(", unable to parse")[0]
    if detail["type"] == "list_type":
        rule = f"should be a list: [{detail['input']}]"
    where = " (command line)" if origins[name] == "command line" else ""
    return f"{label} = {detail['input']!r}{where}: {rule}. {meaning}"


def _nearest_field(name: str) -> str:
    """A hint, "Did you mean ...?", for a name that no field has; empty unless one is clear."""
    fields = config_fields()
    known = [*fields, *([] if "." in name else config_sections())]
    elsewhere = fields_of_elsewhere(name)
    meant = elsewhere or nearest_fields(name, known)
    if not meant:
        return ""
    hint = f" Did you mean {' or '.join(map(repr, meant))}?"
    # Another project may count something else.
    if len(elsewhere) == 1:
        return f"{hint} {first_sentence(fields[meant[0]].description)}"
    meanings = (f" {field}: {first_sentence(fields[field].description)}" for field in elsewhere)
    return hint + "".join(meanings)
