"""What differs between the configs of runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlsys.redact import without_secrets

OWN = ("output_dir",)
"""Fields that differ between any two runs and say nothing."""


def config_differences(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Fields by their dotted names: those that differ, and those that all runs share.

    Secrets are hidden. A run of another version may lack a field: then the field differs, and the
    run has no value for it.

    Args:
        configs: run -> its config; runs without a config are left out.
    """
    flat = {run: dict(_flat(without_secrets(dict(config)))) for run, config in configs.items()}
    names = dict.fromkeys(name for fields in flat.values() for name in fields if name not in OWN)
    differences, common = {}, {}
    for name in names:
        values = {run: fields[name] for run, fields in flat.items() if name in fields}
        first = next(iter(values.values()))
        if len(values) == len(flat) and all(value == first for value in values.values()):
            common[name] = first
        else:
            differences[name] = values
    return {"differences": differences, "common": common}


def _flat(config: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{start}{key}.")
        else:
            yield f"{start}{key}", value
