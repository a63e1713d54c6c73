"""The fields of a config by name, and what each means."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlsys.config.field_types import kinds_of
from rlsys.config.schema import Config, RunConfig, Section
from rlsys.config.yaml_text import read_scalar


@cache
def config_sections(schema: type[RunConfig] = Config) -> dict[str, type[Section]]:
    """The sections of a config by name, in order."""
    return {
        name: info.annotation
        for name, info in schema.model_fields.items()
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section)
    }


@cache
def optional_sections(schema: type[RunConfig] = Config) -> dict[str, type[Section]]:
    """The sections inside of sections, which may be null: `policy.lora`, `tracking.health`."""
    return {
        f"{section}.{name}": kind
        for section, cls in config_sections(schema).items()
        for name, info in cls.model_fields.items()
        for kind in kinds_of(info)
        if isinstance(kind, type) and issubclass(kind, Section)
    }


@cache
def config_fields(schema: type[RunConfig] = Config) -> dict[str, FieldInfo]:
    """Every field: top-level ones by name, then the others as `section.field`, in order.

    An optional section is a field, and has its own fields behind those of the section around it.
    """
    sections, inside = config_sections(schema), optional_sections(schema)
    fields = {name: info for name, info in schema.model_fields.items() if name not in sections}
    for section, cls in sections.items():
        fields |= {f"{section}.{name}": info for name, info in cls.model_fields.items()}
        for name, inner in inside.items():
            if name.startswith(f"{section}."):
                fields |= {f"{name}.{field}": info for field, info in inner.model_fields.items()}
    return fields


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """`{"a": {"b": 1}}` for `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        *sections, field = name.split(".")
        place = found
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    return found


MISSING = object()


def value_at(values: Any, name: str) -> Any:
    """The value of a field in the mapping of a config; MISSING where it has none."""
    for part in name.split("."):
        if not isinstance(values, dict) or part not in values:
            return MISSING
        values = values[part]
    return values


def first_sentence(docstring: str | None) -> str:
    """The first sentence of the first paragraph, on one line."""
    text = " ".join((docstring or "").partition("\n\n")[0].split())
    end = text.find(". ")
    return text if end < 0 else text[: end + 1]


def show_value(value: object) -> str:
    """The value as the YAML file would have it."""
    if isinstance(value, list):
        return "[" + ", ".join(map(show_value, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Section):
        return show_value(value.model_dump())
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str) and not isinstance(read_scalar(value), str):
        return json.dumps(value)  # such as the text "1e-3"
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_default(info: FieldInfo) -> str:
    """The default as the YAML file would have it."""
    return "required" if info.default is PydanticUndefined else show_value(info.default)
