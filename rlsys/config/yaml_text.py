"""YAML 1.2's values in whatever users write: files, `--params`, mappings on the command line.

PyYAML reads YAML 1.1, where 1e-3 is a text, `no` and `on` are booleans, 12:30 is 750 and 2024-01-01
is a date. In the core schema of YAML 1.2 the first is a number and the others are texts.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_PREFIX = "tag:yaml.org,2002:"
_NUMBER_STARTS = list("-+.0123456789")
_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    # Thousands with underscores are not in the schema, but no one means a text by them.
    ("int", r"[-+]?[0-9]+|[-+]?[0-9]{1,3}(_[0-9]{3})+|0o[0-7]+|0x[0-9a-fA-F]+", _NUMBER_STARTS),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        _NUMBER_STARTS,
    ),
)
"""Tag, pattern and first characters of the texts that are not strings; the first match counts."""


class _Loader(yaml.SafeLoader):
    """Constructs the core schema only. Notes keys that are given twice: YAML keeps the last."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML reads it from the class)
        "<": yaml.SafeLoader.yaml_implicit_resolvers["<"]  # merge keys, as in `<<: *defaults`
    }
    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_PREFIX) in ("null", "str", "seq", "map")
    }

    def __init__(self, stream: str):
        super().__init__(stream)
        self.repeated: list[str] = []

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


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or 1.2 would not read as a string."""


for _tag, _pattern, _starts in _CORE_SCHEMA:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_PREFIX + _tag, re.compile(rf"(?:{_pattern})\Z"), _starts)


def _scalar(kind: str, read: Any) -> None:
    """Let the loader construct `!!kind` with `read`; a text that is not of its kind is an error."""

    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = loader.construct_scalar(node)
        try:
            return read(text)
        except (KeyError, ValueError):
            problem = f"{text!r} is not of the type {kind}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    _Loader.add_constructor(_PREFIX + kind, construct)


def _integer(text: str) -> int:
    bases = {"0o": 8, "0x": 16}
    return int(text.replace("_", ""), bases.get(text[:2], 10))


def _float(text: str) -> float:
    return float(re.sub(r"\.(inf|nan)\Z", r"\1", text.lower()))


_scalar("bool", lambda text: {"true": True, "false": False}[text.lower()])
_scalar("int", _integer)
_scalar("float", _float)


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


def dump_yaml(value: Any) -> str:
    """A document that YAML 1.1 and `load_yaml` both read back to `value`, keys in their order."""
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if load_yaml(text) != value:  # PyYAML reads some rare control characters as line ends
        text = yaml.dump(value, Dumper=_Dumper, sort_keys=False)
    return text


def read_scalar(text: str) -> Any:
    """A word of the command line as YAML reads a plain scalar, such as a number or null."""
    for tag, pattern, _ in _CORE_SCHEMA:
        if re.fullmatch(pattern, text):
            return load_yaml(f"!!{tag} '{text}'")
    return text
