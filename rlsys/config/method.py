"""Which training method a config file is for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from rlsys.config.fields import config_sections
from rlsys.config.schema import Config
from rlsys.config.sft import SftConfig
from rlsys.config.yaml_text import load_yaml


def schema_of(path: str | Path, overrides: Sequence[str] = ()) -> type[Config] | type[SftConfig]:
    """The class of a config: `SftConfig` if no section of GRPO alone is in the file or the words.

    A file that cannot be read is GRPO's, whose loading reports what is wrong with it.
    """
    try:
        values = load_yaml(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return Config
    if not isinstance(values, dict):
        return Config
    names = [str(name) for name in values]
    names += [word.lstrip("-") for word in overrides]
    sections = {name.partition(".")[0] for name in names}
    if "sft" in sections:
        return SftConfig
    own = set(config_sections(Config)) - set(config_sections(SftConfig))
    return Config if own & sections else SftConfig
