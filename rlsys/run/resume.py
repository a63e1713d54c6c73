"""What a run does with another one in its folder: continue it, or move it aside."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from rlsys.config import Config
from rlsys.config.fields import config_fields
from rlsys.config.load import is_saved_config
from rlsys.config.yaml_text import load_yaml
from rlsys.files import bytes_in, read_jsonl, size_text
from rlsys.run.folder import ENDED, RunDir

_OF_EVERY_RESUME = ("checkpoint.resume", "output_dir", "overwrite")


def holds_run(run: RunDir) -> bool:
    """Whether a run is going on or has left results; one that failed while starting has not.

    A config.yaml that a user wrote counts, because a run would replace it.
    """
    results = (run.metrics, run.completions, run.eval_completions)
    return (
        any(path.is_file() and path.stat().st_size > 0 for path in results)
        or any(path.exists() for path in (run.checkpoints, run.final, run.interrupted))
        or (run.status.exists() and not run.has_ended())
        or (run.config.exists() and not is_saved_config(run.config))
    )


def move_aside(run: RunDir) -> Iterator[str]:
    """Make room for a run that starts from step 0, and lose nothing.

    Yields:
        what was moved where, for the terminal; nothing where the folder holds no run.
    """
    if not holds_run(run):
        return
    taken = {path.name for path in run.path.glob("replaced-*")}
    number = next(n for n in count(1) if f"replaced-{n}" not in taken)
    target = run.path / f"replaced-{number}"
    target.mkdir()
    for path in run.files:
        if path.exists():
            path.rename(target / path.name)
    moved = RunDir(target)
    if moved.state() == "running":  # it was killed, and its lock, which shows that, is not moved
        moved.write_status(ENDED)
    yield (
        f"overwrite: moved the earlier run to {target} ({size_text(bytes_in(target))}); delete it "
        "when you no longer need it"
    )


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
