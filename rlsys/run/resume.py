"""An earlier run in a run's folder: whether there is one, moving it aside, and continuing it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from rlsys.config import RunConfig
from rlsys.config.fields import MISSING, config_fields, optional_sections, value_at
from rlsys.config.load import is_saved_config
from rlsys.config.schema import AnyConfig
from rlsys.config.yaml_text import read_yaml
from rlsys.files import bytes_in, read_jsonl, size_text
from rlsys.model.weight_files import RUN_CONFIG_FILE
from rlsys.redact import without_secrets
from rlsys.run.folder import ENDED, RunDir
from rlsys.run.kept import checkpoint_steps

_OF_EVERY_RESUME = ("checkpoint.resume", "output_dir", "overwrite")
_LORA = "policy.lora"
_OF_THE_TRAINED = (
    "policy.freeze_parameters",
    "policy.freeze_parameters_regex",
    "policy.freeze_parameters_ratio",
    "policy.trainable_parameters",
    "policy.trainable_parameters_regex",
)
"""Fields that decide which parameters have a state of the optimizer, beside those of `_LORA`."""
_SECTIONS_BESIDE_TRAINING = ("checkpoint.", "eval.", "tracking.")
_BESIDE_TRAINING = ("eval_steps", "placement_timeout", "rendezvous_ports")
"""Fields that say where a run computes, what it shows and what it keeps."""


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
    target = _unused_replaced(run)
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


def _unused_replaced(run: RunDir) -> Path:
    taken = {path.name for path in run.path.glob("replaced-*")}
    number = next(n for n in count(1) if f"replaced-{n}" not in taken)
    return run.path / f"replaced-{number}"


def resume_notes(
    config: RunConfig, run: RunDir, step: int, damaged: Mapping[int, str] | None = None
) -> Iterator[str]:
    """Lines for the terminal: the checkpoint, steps that are taken again, settings that changed.

    Args:
        config: the config of the run that continues; the earlier run has left its own in `run`.
        run: the folder of both.
        step: the step of the checkpoint.
        damaged: step -> what is wrong, of checkpoints that were passed over.
    """
    checkpoint = run.checkpoints / f"step-{step}"
    for other, problem in (damaged or {}).items():
        yield (
            f"warning: the checkpoint of step {other} cannot be continued from: {problem}; step "
            f"{step} is taken instead"
        )
    yield f"continuing from {checkpoint}"
    rows = read_jsonl(run.metrics) if run.metrics.exists() else ()
    last = max((row["step"] for row in rows if isinstance(row.get("step"), int)), default=step)
    if last > step:
        yield (
            f"steps {step + 1} to {last} came after that checkpoint: they are taken again, and "
            "what was recorded of them is dropped"
        )
    changed = list(_changes(config, run, checkpoint))
    for head, is_listed in (
        ("changed since then", lambda name: not _is_beside_training(name)),
        ("changed since then, safe: nothing that is trained depends on it", _is_beside_training),
    ):
        listed = [text for name, text in changed if is_listed(name)]
        if listed:
            yield f"{head}: {'; '.join(listed)}"


def refused_change(config: RunConfig, run: RunDir, checkpoint: Path) -> str | None:
    """What cannot change between a checkpoint and the run that continues from it, if it did."""
    refused = [
        text
        for name, text in _changes(config, run, checkpoint)
        if name in _OF_THE_TRAINED or name.startswith(_LORA)
    ]
    if not refused:
        return None
    return (
        f"checkpoint.resume: {'; '.join(refused)} since {checkpoint}, whose optimizer state is for "
        "the parameters that were trained then: set it back, or begin another run with its weights "
        "(--model.path and another --output_dir)"
    )


def with_threads_of(config: AnyConfig, run: RunDir, step: int) -> AnyConfig:
    """`config` with the threads of the run that it continues, where policy.cpu_threads is auto.

    Sums of another number of threads round differently.
    """
    before = value_at(_config_before(run, run.checkpoints / f"step-{step}"), "policy.cpu_threads")
    if config.policy.cpu_threads != "auto" or not isinstance(before, int):
        return config
    policy = config.policy.model_copy(update={"cpu_threads": before})
    return config.model_copy(update={"policy": policy})


def set_aside_later(run: RunDir, step: int) -> Iterator[str]:
    """Move checkpoints of later steps out of the way of a run that continues from `step`.

    It comes to those steps again, and its own checkpoints have to be the newest.

    Yields:
        for the terminal, what was moved where.
    """
    later = [number for number in checkpoint_steps(run.checkpoints) if number > step]
    if not later:
        return
    target = _unused_replaced(run) / run.checkpoints.name
    target.mkdir(parents=True)
    for number in later:
        (run.checkpoints / f"step-{number}").rename(target / f"step-{number}")
    names = ", ".join(map(str, later))
    size = size_text(bytes_in(target))
    yield (
        f"the checkpoints of the later steps {names} were moved to {target} ({size}); delete them "
        "when you no longer need them"
    )


def _is_beside_training(name: str) -> bool:
    return name in _BESIDE_TRAINING or name.startswith(_SECTIONS_BESIDE_TRAINING)


def _config_before(run: RunDir, checkpoint: Path) -> Any:
    """What a run wrote of its config, with a checkpoint; None where it wrote nothing."""
    saved = checkpoint / RUN_CONFIG_FILE
    if not saved.is_file():  # an older rlsys wrote the checkpoint
        saved = run.config
    if not saved.exists() or not is_saved_config(saved):
        return None
    return read_yaml(saved)


def _changes(config: RunConfig, run: RunDir, checkpoint: Path) -> Iterator[tuple[str, str]]:
    """(field, `field before -> now`), for the fields that the older config has too."""
    before = _config_before(run, checkpoint)
    now = config.model_dump()
    for name in config_fields(type(config)):
        old, new = value_at(before, name), value_at(now, name)
        if name in optional_sections(type(config)) and isinstance(old, dict) and new is not None:
            continue  # its fields follow
        if name not in _OF_EVERY_RESUME and MISSING not in (old, new) and old != new:
            shown = without_secrets([old, new], name.rpartition(".")[2])
            yield name, f"{name} {shown[0]} -> {shown[1]}"
