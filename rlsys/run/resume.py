"""An earlier run in a run's folder: whether there is one, moving it aside, and continuing it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from rlsys.config import RunConfig
from rlsys.config.fields import MISSING, config_fields, optional_sections, value_at
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
        for the terminal, what was moved where; nothing if the folder holds no run.
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
    if moved.state() == "running":  # it was killed; its lock, which shows that, is not moved
        moved.write_status(ENDED)
    yield (
        f"overwrite: moved the earlier run to {target} ({size_text(bytes_in(target))}); delete it "
        "when you no longer need it"
    )


def resume_notes(config: RunConfig, run: RunDir, step: int) -> Iterator[str]:
    """Lines for the terminal: the checkpoint, steps that are taken again, settings that changed.

    Args:
        config: the config of the run that continues; the earlier run has left its own in `run`.
        run: the folder of both.
        step: the step of the checkpoint.
    """
    yield f"continuing from {run.checkpoints / f'step-{step}'}"
    rows = read_jsonl(run.metrics) if run.metrics.exists() else ()
    last = max((row["step"] for row in rows if isinstance(row.get("step"), int)), default=step)
    if last > step:
        yield (
            f"steps {step + 1} to {last} came after that checkpoint: they are taken again, and "
            "what was recorded of them is dropped"
        )
    changed = list(_changes(config, run))
    if changed:
        yield f"changed since then: {'; '.join(changed)}"


def _changes(config: RunConfig, run: RunDir) -> Iterator[str]:
    """`field before -> now`, for the fields that the older config has too."""
    if not run.config.exists() or not is_saved_config(run.config):
        return
    before = load_yaml(run.config.read_text(encoding="utf-8"))
    now = config.model_dump()
    for name in config_fields(type(config)):
        old, new = value_at(before, name), value_at(now, name)
        if name in optional_sections(type(config)) and isinstance(old, dict) and new is not None:
            continue  # its fields follow
        if name not in _OF_EVERY_RESUME and MISSING not in (old, new) and old != new:
            yield f"{name} {old} -> {new}"
