"""YAML 1.2's values in whatever users write: files, `--params`, mappings on the command line.

PyYAML reads YAML 1.1, where 1e-3 is a text, `no` and `on` are booleans, 12:30 is 750 and 2024-01-01
is a date. In the core schema of YAML 1.2 the first is a number and the others are texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

MAX_DEPTH = 50
"""Lists and mappings inside of each other; a config has five."""
MAX_VALUES = 100_000
"""Values of a document, those behind an alias counted each time: a few aliases of aliases are more
than any machine can walk through."""

_PREFIX = "tag:yaml.org,2002:"
_NUMBER_STARTS = list("-+.0123456789")
_CORE_SCHEMA: dict[str, tuple[str, list[str], Callable[[str], Any]]] = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""], lambda text: None),
    "bool": (
        r"true|True|TRUE|false|False|FALSE",
        list("tTfF"),
        lambda text: {"true": True, "false": False}[text.lower()],
    ),
    "int": (
        # Thousands with underscores are not in the schema, but no one means a text by them.
        r"[-+]?[0-9]+|[-+]?[0-9]{1,3}(_[0-9]{3})+|0o[0-7]+|0x[0-9a-fA-F]+",
        _NUMBER_STARTS,
        lambda text: int(text.replace("_", ""), {"0o": 8, "0x": 16}.get(text[:2], 10)),
    ),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        _NUMBER_STARTS,
        lambda text: float(re.sub(r"\.(inf|nan)\Z", r"\1", text.lower())),
    ),
}
"""Tag -> pattern, first characters and value of the texts that are not strings; the first match
counts."""


class _Loader(yaml.SafeLoader):
    """Constructs the core schema only. Collects keys that are given twice: YAML keeps the last."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML reads it from the class)
        "<": yaml.SafeLoader.yaml_implicit_resolvers["<"]  # merge keys, as in `<<: *defaults`
    }
    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_PREFIX) in ("str", "seq", "map")
    }

    def __init__(self, stream: str):
        super().__init__(stream)
        self.repeated: list[str] = []
        self._open: list[str | None] = []
        """The anchors of the lists and mappings around the next node; None where it has none."""
        self._num_values = 0
        self._values_below: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As PyYAML does, for what ends: not too deep, too many, or inside of itself."""
        event, before = self.peek_event(), self._num_values
        is_alias = isinstance(event, yaml.AliasEvent)
        problem = None
        if is_alias and event.anchor in self._open:
            problem = f"*{event.anchor} stands inside of &{event.anchor}, so it would never end"
        elif len(self._open) > MAX_DEPTH:
            problem = f"it is nested more than {MAX_DEPTH} levels deep"
        elif self._num_values > MAX_VALUES:
            problem = f"it has more than {MAX_VALUES:,} values, with those that aliases repeat"
        if problem is not None:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self._open.append(None if is_alias else event.anchor)
        node = super().compose_node(parent, index)
        self._open.pop()
        self._num_values += self._values_below[id(node)] if is_alias else 1
        self._values_below.setdefault(id(node), self._num_values - before)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[tuple[str, str], int] = {}
        for key_node, _ in node.value:
            key, line = (key_node.tag, str(key_node.value)), key_node.start_mark.line + 1
            if key in lines:
                self.repeated.append(
                    f"{key[1]}: is given twice, in lines {lines[key]} and {line}: keep one of them"
                )
            lines[key] = line
        return super().construct_mapping(node, deep)

    def construct_core(self, node: yaml.ScalarNode) -> Any:
        """The value of a scalar with a tag of `_CORE_SCHEMA`."""
        text, tag = self.construct_scalar(node), node.tag.removeprefix(_PREFIX)
        try:
            return _CORE_SCHEMA[tag][2](text)
        except (KeyError, ValueError):
            problem = f"{text!r} is not of the type {tag}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else."""


for _tag, (_pattern, _starts, _) in _CORE_SCHEMA.items():
    _Loader.add_constructor(_PREFIX + _tag, _Loader.construct_core)
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_PREFIX + _tag, re.compile(rf"(?:{_pattern})\Z"), _starts)


def load_yaml(text: str, repeated: list[str] | None = None) -> Any:
    """The value of one YAML document.

    Args:
        text: the document.
        repeated: gets a line for every key that a mapping has twice; None makes that an error.

    Raises:
        yaml.YAMLError: it is not YAML, or holds a tag that is not in the core schema.
    """
    loader = _Loader(text)
    try:
        value = loader.get_single_data()
    finally:
        loader.dispose()
    if repeated is not None:
        repeated += loader.repeated
    elif loader.repeated:
        raise yaml.YAMLError("; ".join(loader.repeated))
    return value


def read_yaml(path: Path) -> Any:
    """The value of a YAML file in UTF-8.

    Raises:
        ValueError: it cannot be read; the text says where it is wrong.
    """
    try:
        return load_yaml(path.read_text("utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def dump_yaml(value: Any) -> str:
    """A document that YAML 1.1 and `load_yaml` both read back to `value`, keys in their order."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if load_yaml(text) != value:  # PyYAML reads some rare control characters as line ends
        text = yaml.dump(value, Dumper=_Dumper, sort_keys=False)
    return text


def read_scalar(text: str) -> Any:
    """A word of the command line as YAML reads a plain scalar, such as a number or null."""
    for pattern, _, value in _CORE_SCHEMA.values():
        if re.fullmatch(pattern, text):
            return value(text)
    return text
