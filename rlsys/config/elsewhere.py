"""Tables of other projects' names: what each is in a config of rlsys, and which defaults differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from rlsys.config.distill import DistillConfig
from rlsys.config.fields import config_fields, show_default
from rlsys.config.preference import PreferenceConfig
from rlsys.config.reward_model import RewardModelConfig
from rlsys.config.schema import Config, RunConfig
from rlsys.config.sft import SftConfig

TABLES: dict[type[RunConfig], Path] = {
    Config: Path(__file__).with_name("names_elsewhere.txt"),
    SftConfig: Path(__file__).with_name("names_elsewhere_sft.txt"),
    PreferenceConfig: Path(__file__).with_name("names_elsewhere_preference.txt"),
    RewardModelConfig: Path(__file__).with_name("names_elsewhere_reward_model.txt"),
    DistillConfig: Path(__file__).with_name("names_elsewhere_distill.txt"),
}
"""Names that a table lacks are those of the first one."""
NOT_NEEDED, NOT_SUPPORTED = "-", "!"


@dataclass(frozen=True, slots=True)
class Counterpart:
    """A line of a table: another project's name for something."""

    project: str
    names: tuple[str, ...]
    fields: tuple[str, ...]
    """Our fields; empty where nothing is needed, or rlsys cannot do it."""
    supported: bool
    default: str
    """The project's default, as our config would write it; empty where it counts something else."""
    same_default: bool
    """Whether our default does the same."""
    note: str
    """What differs, or why there is no field."""
    same_value: bool
    """Whether one field of ours takes the same value."""

    def says(self) -> str:
        """The answer where there is no field."""
        return f"Not {'needed' if self.supported else 'supported'}: {self.note}"


def normal(name: str) -> str:
    """A name as the tables write it."""
    return name.replace("-", "_").lower()


@cache
def counterparts(schema: type[RunConfig]) -> tuple[Counterpart, ...]:
    """All that other projects call what this config has, project by project."""
    own = own_counterparts(schema)
    if schema is Config:
        return own
    known = {(row.project, name) for row in own for name in row.names}
    others = (
        replace(row, names=tuple(n for n in row.names if (row.project, n) not in known))
        for row in own_counterparts(Config)
    )
    return own + tuple(_in_other_config(row, schema) for row in others if row.names)


@cache
def own_counterparts(schema: type[RunConfig]) -> tuple[Counterpart, ...]:
    """The lines of the config's own table."""
    found, project = [], ""
    for line in TABLES[schema].read_text("utf-8").splitlines():
        if line.startswith("["):
            project = line[1 : line.index("]")]
        elif line and not line.startswith("#"):
            names, meant, default, note = (part.strip() for part in line.split("|"))
            own = () if meant in (NOT_NEEDED, NOT_SUPPORTED) else tuple(meant.split(", "))
            same = default[:2] in ("", "= ") or default == show_defaults(own, schema)
            row = Counterpart(
                project,
                tuple(names.split(", ")),
                own,
                supported=meant != NOT_SUPPORTED,
                default=default.removeprefix("= "),
                same_default=same,
                note=note.removeprefix("= "),
                same_value=len(own) == 1 and note[:2] in ("", "= "),
            )
            found.append(row)
    return tuple(found)


def _in_other_config(row: Counterpart, schema: type[RunConfig]) -> Counterpart:
    """A line of the first table for another config, which may lack its fields."""
    missing = [name for name in row.fields if name not in config_fields(schema)]
    if not missing:
        ours = show_defaults(row.fields, schema)
        if ours == show_defaults(row.fields, Config):
            return row
        return replace(row, same_default=row.default in ("", ours))
    has = "is" if len(missing) == 1 else "are"
    note = f"{', '.join(missing)} {has} for `rlsys grpo`."
    return replace(
        row, fields=(), supported=True, default="", same_default=True, note=note, same_value=False
    )


def show_defaults(names: Sequence[str], schema: type[RunConfig]) -> str:
    """The defaults of these fields of ours."""
    return ", ".join(show_default(config_fields(schema)[name]) for name in names)


def projects(schema: type[RunConfig]) -> dict[str, str]:
    """Name -> command or class, for every project in the config's own table."""
    lines = TABLES[schema].read_text("utf-8").splitlines()
    return dict(line[1:].split("] ") for line in lines if line.startswith("["))


def counterpart(name: str, project: str, schema: type[RunConfig]) -> Counterpart | None:
    """The line of a project's name."""
    rows = (row for row in counterparts(schema) if row.project == project)
    return next((row for row in rows if normal(name) in map(normal, row.names)), None)
