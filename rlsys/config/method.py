"""Which training method a config is for, and names that only another method's config has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import yaml

from rlsys.config.distill import DistillConfig
from rlsys.config.fields import config_fields, config_sections
from rlsys.config.preference import PreferenceConfig
from rlsys.config.reward_model import RewardModelConfig
from rlsys.config.schema import Config, RunConfig
from rlsys.config.sft import SftConfig
from rlsys.config.yaml_text import load_yaml

METHODS: tuple[type[RunConfig], ...] = (
    Config,
    SftConfig,
    PreferenceConfig,
    RewardModelConfig,
    DistillConfig,
)
"""The class of config of each command that trains."""


def schema_of_command(command: str) -> type[RunConfig]:
    """The class of config that a command reads; GRPO's for those that read several."""
    return next((schema for schema in METHODS if schema.command == command), Config)


def schema_of(path: str | Path, overrides: Sequence[str] = ()) -> type[RunConfig]:
    """The class of a config, by its sections: of the method that alone has one of them.

    A file without such a section is GRPO's if it has one that supervised training has not, and
    else for supervised training. One with sections of GRPO and of another method is the other's. A
    file that cannot be read is GRPO's, whose loading reports what is wrong with it.
    """
    try:
        values = load_yaml(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return Config
    if not isinstance(values, dict):
        return Config
    names = [*map(str, values), *(word.lstrip("-") for word in overrides)]
    others_first: list[type[RunConfig]] = [*_special_first(METHODS[1:]), Config]
    beyond_sft = config_sections(Config).keys() - config_sections(SftConfig).keys()
    shared = Config if beyond_sft & {name.partition(".")[0] for name in names} else SftConfig
    return next((schema for schema in others_first if _own_sections(schema, names)), shared)


def _special_first(schemas: Iterable[type[RunConfig]]) -> list[type[RunConfig]]:
    """A method that adds sections to another's comes before it."""
    return sorted(schemas, key=lambda schema: -len(schema.mro()))


def _own_sections(schema: type[RunConfig], names: Iterable[str]) -> list[str]:
    """The sections of these names that only configs of `schema`, or based on it, have."""
    others = {
        name
        for other in METHODS
        if not issubclass(other, schema)
        for name in config_sections(other)
    }
    own = [name for name in config_sections(schema) if name not in others]
    given = {name.partition(".")[0] for name in names}
    return [name for name in own if name in given]


def for_other_command(
    path: str | Path, names: Collection[str], schema: type[RunConfig]
) -> str | None:
    """What to do with a file of another method; None if it may be of this one.

    Args:
        path: the config file.
        names: of its sections and fields.
        schema: the class of config that is wanted.
    """
    if _own_sections(schema, names):
        return None
    for other in _special_first(METHODS):
        if sections := _own_sections(other, names):
            named = f"the section{'s' if sections[1:] else ''} {', '.join(sections)}"
            return (
                f"it is a config for `rlsys {other.command}`, with {named}, and one for `rlsys "
                f"{schema.command}` is wanted: run `rlsys {other.command} {path}`, or leave out "
                "what only that command reads"
            )
    return None


def perhaps_for_other_command(
    path: str | Path, names: Collection[str], schema: type[RunConfig]
) -> str | None:
    """Which command may be meant by a file with problems and nothing of `schema` alone."""
    if schema is SftConfig or _own_sections(schema, names):
        return None
    sections = {name.partition(".")[0] for name in names} & config_sections(schema).keys()
    in_order: list[type[RunConfig]] = [*METHODS[1:], Config]
    others = [other for other in in_order if other is not schema]
    reader = next((other for other in others if sections <= config_sections(other).keys()), None)
    if reader is None:
        return None
    wanted = ", ".join(_own_sections(schema, config_sections(schema)))
    return (
        f"It has no section that only `rlsys {schema.command}` reads ({wanted}), and may be for "
        f"another command: rlsys {reader.command} {path}"
    )


def hint_of_method(name: str, schema: type[RunConfig]) -> str:
    """The command whose config has a field or section that `schema` lacks; else empty."""
    for other in METHODS:
        if name in {**config_fields(other), **config_sections(other)}:
            return f" It is for `rlsys {other.command}`: leave it out of `rlsys {schema.command}`."
    return ""
