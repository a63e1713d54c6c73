"""What a run that continues another takes over from it, told before anything of it is replaced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlsys.config import Config
from rlsys.config_load import config_fields, is_saved_config
from rlsys.run_dir import RunDir
from rlsys.tracking.jsonl import read_jsonl
from rlsys.yaml_text import load_yaml

_OF_EVERY_RESUME = ("checkpoint.resume", "output_dir")


def resume_notes(config: Config, run_dir: RunDir, step: int) -> Iterator[str]:
    """Lines for the terminal: the checkpoint, steps that are taken again, settings that changed.

    Args:
        config: of the run that continues; the one before it has left its own in `run_dir`.
        run_dir: the folder of both.
        step: of the checkpoint.
    """
    yield f"continuing from {run_dir.checkpoints / f'step-{step}'}"
    recorded = [row["step"] for row in _rows(run_dir) if isinstance(row.get("step"), int)]
    if recorded and max(recorded) > step:
        yield (
            f"steps {step + 1} to {max(recorded)} came after that checkpoint: they are taken "
            "again, and what was recorded of them is dropped"
        )
    changed = list(_changes(config, run_dir))
    if changed:
        yield f"changed since then: {'; '.join(changed)}"


def _rows(run_dir: RunDir) -> Iterator[dict[str, Any]]:
    return read_jsonl(run_dir.metrics) if run_dir.metrics.exists() else iter(())


def _changes(config: Config, run_dir: RunDir) -> Iterator[str]:
    """`field before -> now`, of the fields that the older config has, too."""
    if not run_dir.config.exists() or not is_saved_config(run_dir.config):
        return
    before = load_yaml(run_dir.config.read_text(encoding="utf-8"))
    now = config.model_dump()
    for name in config_fields():
        section, _, field = name.rpartition(".")
        old, new = (values.get(section, {}) if section else values for values in (before, now))
        if name not in _OF_EVERY_RESUME and field in old and old[field] != new[field]:
            yield f"{name} {old[field]} -> {new[field]}"
