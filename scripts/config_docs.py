"""Write docs/config.md, the table of every config field, from the fields themselves.

python scripts/config_docs.py
"""

from __future__ import annotations

import re
import textwrap
import typing
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlsys.config import (
    DistillConfig,
    PreferenceConfig,
    RewardModelConfig,
    RunConfig,
    SftConfig,
)
from rlsys.config.fields import config_fields, config_sections, optional_sections, show_value
from rlsys.config.schema import Section

TARGET = Path(__file__).parents[1] / "docs" / "config.md"
_HEAD = """# The config

A run is a YAML file of these sections. The command line can set every field too, as
`--section.field value`. Unknown fields and values that do not fit each other are errors; rlsys
reports all of them in one message. `rlsys explain CONFIG` prints every value and what follows from
it. [migration.md](migration.md) has the names of these fields in TRL, ms-swift, verl and others.

## How values are written

- **YAML 1.2**: `1e-3` is a number at every depth; `no`, `on` and `12:30` are texts. Where a field
  is true or false, `no` and `off` mean false. `1_000` is 1000.
- **Command line**: `--policy.lr 1e-6`, `--policy.lr=1e-6` and `policy.lr=1e-6` are the same. A list
  is `a b`, `a,b` or `[a, b]`. A mapping is `'{soft_overlong: {cache_length: 128}}'`, or one of its
  keys as `--reward.reward_params.soft_overlong.cache_length 128`.
- **Paths**: `~` is the home folder; `$NAME` and `${NAME}` are environment variables, which must be
  set. Relative paths start at the working directory. The same holds for settings of rewards called
  `path`, `file`, `folder`, `dir`, `..._path` and so on.
- Where a field takes null, `null` and `none` mean the same.

`python scripts/config_docs.py` writes this page from the docstrings in `rlsys/config/schema/`.
"""


_SFT_HEAD = """## The config of rlsys sft

It has the top level, `model`, `policy`, `tracking` and `checkpoint` as above, and of `data` what
says where rows come from. These are its own fields, and those with another default or meaning.
[sft.md](sft.md) says how they work together.
"""


_PREFERENCE_HEAD = """## The config of rlsys preference

It has the top level, `model`, `reference`, `policy`, `tracking` and `checkpoint` as above, and of
`data` what says where rows come from. These are its own fields, and those with another default or
meaning. [preference.md](preference.md) says how they work together.
"""


_REWARD_MODEL_HEAD = """## The config of rlsys reward-model

It has the top level, `model`, `policy`, `tracking` and `checkpoint` as above, and of `data` what
says where rows come from. These are its own fields, and those with another default or meaning.
[reward_model.md](reward_model.md) says how they work together.
"""


_DISTILL_HEAD = """## The config of rlsys distill

It has what the config of rlsys sft has, and `teacher` and `weight_sync` as above. These are its own
fields, and those with another meaning. [distillation.md](distillation.md) says how they work
together.
"""


def markdown() -> str:
    """The whole page."""
    fields = config_fields()
    parts = [_HEAD, "## Top level\n", _table({n: f for n, f in fields.items() if "." not in n})]
    for name, section in config_sections().items():
        parts += _section("##", name, section)
        for inside, optional in optional_sections().items():
            if inside.startswith(f"{name}."):
                parts += _section("###", inside, optional)
    parts += _parts_of(SftConfig, _SFT_HEAD)
    parts += _parts_of(PreferenceConfig, _PREFERENCE_HEAD)
    parts += _parts_of(RewardModelConfig, _REWARD_MODEL_HEAD)
    return "\n".join([*parts, *_parts_of(DistillConfig, _DISTILL_HEAD, base=SftConfig)])


def _parts_of(schema: type[RunConfig], head: str, base: type[RunConfig] | None = None) -> list[str]:
    """What a config of another command has besides, or otherwise; `base` is known by then."""
    known, own = config_fields(), config_fields(schema)
    known = known | ({} if base is None else config_fields(base))
    different = {
        name: info
        for name, info in own.items()
        if name not in known
        or (known[name].default, known[name].description) != (info.default, info.description)
    }
    parts = [head]
    for name in dict.fromkeys(field.rpartition(".")[0] for field in different):
        section = (config_sections(schema) | optional_sections(schema))[name]
        parts.append(f"### {name}\n\n{textwrap.fill(_one_line(section.__doc__ or ''), 140)}\n")
        own_fields = {n: f for n, f in different.items() if n.rpartition(".")[0] == name}
        parts.append(_table(own_fields))
    return parts


def _section(level: str, name: str, section: type[Section]) -> list[str]:
    about = textwrap.fill(_one_line(section.__doc__ or ""), 140)
    fields = {f"{name}.{field}": info for field, info in section.model_fields.items()}
    return [f"{level} {name}\n\n{about}\n", _table(fields)]


def _table(fields: dict[str, FieldInfo]) -> str:
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for name, info in fields.items():
        cells = (f"`{name}`", _type(info), _default(info), _one_line(info.description or ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _type(info: FieldInfo) -> str:
    return _plain(info.annotation)


def _plain(kind: Any) -> str:
    """`Literal["a", "b"]` as "a, b"; `list[float] | None` as "list of float, null"."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(map(str, members))
    if origin is list:
        return f"list of {_plain(members[0])}"
    if origin is dict:
        return f"mapping of {_plain(members[1])}"
    if kind is Any:
        return "any value"
    if origin is typing.Annotated:
        return _plain(members[0])
    if members:
        return ", ".join(map(_plain, members))
    if isinstance(kind, type) and issubclass(kind, Section):
        return "section"
    return "null" if kind is type(None) else kind.__name__


def _default(info: FieldInfo) -> str:
    if isinstance(info.default, Section):
        return "its fields, below"
    return "*required*" if info.default is PydanticUndefined else f"`{show_value(info.default)}`"


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(markdown(), encoding="utf-8")
