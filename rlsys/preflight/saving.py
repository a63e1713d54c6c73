"""What a run will save: how often, where, and how much disk that takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlsys.config import RunConfig
from rlsys.config.local_paths import is_in_job_copy
from rlsys.files import bytes_in, free_bytes, size_text
from rlsys.model.folder import resolve_model_path
from rlsys.model.policy_memory import bytes_per_weight
from rlsys.model.shape import ModelShape, read_model_shape
from rlsys.preflight.devices import guess_device
from rlsys.preflight.trained import num_saved
from rlsys.redact import names_of_secrets
from rlsys.run.folder import RunDir
from rlsys.text import counted
from rlsys.types import Device


@dataclass(frozen=True, slots=True)
class DiskUse:
    """Bytes that a run needs on the disk at most, without logs."""

    weights: int
    """A Hugging Face folder, as final/ and the model of each checkpoint."""
    optimizer: int
    """The optimizer's state of a checkpoint."""
    reference: int
    """The reference of a checkpoint, if it changes during the run."""
    num_checkpoints: int
    num_models: int = 0
    """Hugging Face folders of checkpoint.save_hf_steps."""

    @property
    def checkpoint(self) -> int:
        """One checkpoint."""
        return self.weights + self.optimizer + self.reference

    @property
    def total(self) -> int:
        """All checkpoints, the models that are kept, and the final one."""
        return self.num_checkpoints * self.checkpoint + (self.num_models + 1) * self.weights


def disk_use(config: RunConfig, shape: ModelShape, *, device: Device) -> DiskUse:
    """Estimate, exact except for small files: weights, and for each weight an fp32 copy and the two
    moments of AdamW."""
    width = bytes_per_weight(config, device)
    has_copy = width < 4 or config.policy.use_distributed_optimizer
    saved, trained = num_saved(config, shape)
    return DiskUse(
        weights=saved * width,
        optimizer=trained * (12 if has_copy else 8),
        reference=shape.num_params * width if config.reference_changes else 0,
        num_checkpoints=_num_checkpoints(config),
        num_models=_num_models(config),
    )


def _num_checkpoints(config: RunConfig) -> int:
    """Checkpoints at most: the newest, one that is being written, the best, and every n-th."""
    checkpoint = config.checkpoint
    if checkpoint.save_steps is None:
        return 0
    number = checkpoint.save_total_limit + 1  # the oldest goes when the newest is whole
    number += checkpoint.best_metric is not None
    if config.max_steps is None:
        return number
    interval = checkpoint.interval(config.max_steps, config.eval_steps)
    assert interval is not None
    retained = checkpoint.save_retain_interval
    kept = 0 if retained is None else config.max_steps // retained
    return min(-(-config.max_steps // interval), number) + kept


def checkpoint_bytes_of(config: RunConfig, device: Device) -> int:
    """Bytes of one checkpoint of a run."""
    folder = resolve_model_path(config.model.path)
    shape = read_model_shape(folder, may_bridge=True, num_labels=config.num_labels)
    return disk_use(config, shape, device=device).checkpoint


def _num_models(config: RunConfig) -> int:
    """Folders of checkpoint.save_hf_steps at most; without a limit and max_steps, one."""
    steps, limit = config.checkpoint.save_hf_steps, config.checkpoint.save_hf_total_limit
    if steps is None:
        return 0
    most = 1 if limit is None else limit + 1  # the oldest goes when the newest is whole
    if config.max_steps is None:
        return most
    number = config.max_steps // steps
    return number if limit is None else min(number, most)


def describe_saving(config: RunConfig, use: DiskUse | None) -> list[tuple[str, str]]:
    """(what, how often, where or how much) for `rlsys explain` and the start of a run.

    Args:
        config: of the run.
        use: None where the model's config.json cannot be read.
    """
    checkpoint, run = config.checkpoint, RunDir(Path(config.output_dir))
    if checkpoint.save_steps is None:
        saved = (
            "none, so nothing can be resumed (checkpoint.save_steps is null); on Ctrl-C or a "
            f"failure, the weights in {run.interrupted}"
        )
    else:
        saved = (
            f"{_how_often(config)}, and on Ctrl-C or a failure, in {run.checkpoints}; only the "
            f"newest {counted(checkpoint.save_total_limit, 'checkpoint')} kept "
            f"(checkpoint.save_total_limit){_kept_besides(config)}"
        )
        if use is not None and checkpoint.async_save:
            size = size_text(use.checkpoint)
            saved += f"; written meanwhile, from copies of {size} in the memory of policy hosts"
    pairs = [("checkpoints", saved)]
    if checkpoint.save_hf_steps is not None:
        limit = checkpoint.save_hf_total_limit
        kept = "all kept" if limit is None else f"only the newest {limit:,} kept"
        kept += " (checkpoint.save_hf_total_limit)"
        if config.max_steps is not None and config.max_steps < checkpoint.save_hf_steps:
            kept = f"none in this run, since max_steps is {config.max_steps:,}"
        pairs.append(
            (
                "Hugging Face folders",
                f"every {counted(checkpoint.save_hf_steps, 'step')}, without optimizer, in "
                f"{run.hf}; {kept}",
            )
        )
    final = "final model" if config.policy.lora is None else "final adapter"
    pairs.append((final, f"in {run.final}"))
    secrets = list(names_of_secrets(config.model_dump()))
    if secrets:
        pairs.append(
            (
                "secrets",
                f"{', '.join(secrets)}: in {run.config}, which you alone may read, and hidden from "
                "trackers. Whoever lists processes sees what stands on a command line",
            )
        )
    if use is not None:
        parts = [f"{final} {size_text(use.weights)}"]
        if use.num_checkpoints:
            of_each = f"weights {size_text(use.weights)} + optimizer {size_text(use.optimizer)}"
            of_each += f" + reference {size_text(use.reference)}" if use.reference else ""
            parts.insert(0, f"{counted(use.num_checkpoints, 'checkpoint')} x ({of_each})")
        if use.num_models:
            parts.insert(-1, f"{counted(use.num_models, 'folder')} x {size_text(use.weights)}")
        free = size_text(free_bytes(run.path))
        pairs.append(("disk", f"{size_text(use.total)} at most = {' + '.join(parts)}; {free} free"))
    return pairs


def _kept_besides(config: RunConfig) -> str:
    checkpoint = config.checkpoint
    besides = ""
    if checkpoint.save_retain_interval is not None:
        besides += f", besides those of every {counted(checkpoint.save_retain_interval, 'step')}"
    if checkpoint.best_metric is not None:
        order = "largest" if checkpoint.best_is_greatest else "smallest"
        besides += f", besides the one with the {order} {checkpoint.best_metric}"
    return besides


def disk_warning(config: RunConfig, use: DiskUse) -> str | None:
    """What to do if the disk is too small for the run; None if it is large enough.

    What the resumed run left counts as free: this run replaces it.
    """
    run = RunDir(Path(config.output_dir))
    own = 0
    if config.checkpoint.resume:
        own = sum(bytes_in(folder) for folder in (run.checkpoints, run.hf, run.final))
    free = free_bytes(run.path)
    if free + own >= use.total:
        return None
    remedies = ["free some"]
    if use.num_checkpoints > 1:
        remedies.append("lower checkpoint.save_total_limit")
    if use.num_models > 1:
        remedies.append("lower checkpoint.save_hf_total_limit")
    if use.num_checkpoints:
        remedies.append("set checkpoint.save_steps to null")
    return (
        f"the disk of output_dir has {size_text(free)} free, and the run may save "
        f"{size_text(use.total)}: {', '.join(remedies)}, or choose another output_dir"
    )


def _how_often(config: RunConfig) -> str:
    save_steps, max_steps = config.checkpoint.save_steps, config.max_steps
    if max_steps is None:
        every = "5% of the steps" if save_steps == "auto" else f"{save_steps:,} steps"
    else:
        interval = config.checkpoint.interval(max_steps, config.eval_steps)
        assert interval is not None
        if interval >= max_steps:
            set_to = f" (checkpoint.save_steps is {interval:,})" if interval > max_steps else ""
            return f"after the last step only, of {max_steps:,}{set_to}"
        every = "step" if interval == 1 else f"{interval:,} of {max_steps:,} steps"
    rarer = ", or less often where saving takes more than a tenth of the time"
    return f"every {every}{rarer if save_steps == 'auto' else ''}, after the last step"


def saving_lines(config: RunConfig) -> Iterator[str]:
    """What the run saves, how often, where, and how much disk that takes."""
    folder = resolve_model_path(config.model.path)
    shape = read_model_shape(folder, may_bridge=True, num_labels=config.num_labels)
    use = disk_use(config, shape, device=guess_device(config))
    yield "saving: " + "; ".join(f"{what} {text}" for what, text in describe_saving(config, use))
    warning = disk_warning(config, use)
    if warning is not None:
        yield f"warning: {warning}"
    folder = Path(config.output_dir).resolve()
    if is_in_job_copy(folder):
        yield (
            f"note: {folder} is in this Ray job's copy of the working directory, which Ray may "
            "delete after the job. Give an absolute --output_dir to keep what the run writes."
        )
