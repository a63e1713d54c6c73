"""Optimizer steps that are not finite: all ranks find them alike, and take none of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from rlsys.algo.finite import KINDS, PREFIX, found_text
from rlsys.config import RunConfig
from rlsys.engines.step_dump import DUMPS, WEIGHTS, Fault, Step, write_step
from rlsys.files import flush_to_disk, free_bytes, size_text, unused_folder
from rlsys.model.shape import ModelShape
from rlsys.problems import NonFiniteWeights
from rlsys.text import counted


def find_nonfinite(
    metrics: dict[str, float],
    grad_norm: float,
    chunks: Sequence[DistributedDataParallel],
    *,
    found_inf: bool,
) -> dict[str, int]:
    """What of an optimizer step has NaNs or infinities, and how many; {} if all is finite.

    All ranks get the same answer, in one reduction: the loss is known on the last pipeline stage
    only, and a gradient may be damaged on one rank only. The norm does not show every such
    gradient, since it counts a parameter that several tensor-parallel ranks hold on one of them.

    Args:
        metrics: of this rank; the counts of `count_nonfinite` are taken out of them.
        grad_norm: of the whole gradient.
        chunks: of this rank's model, with its gradients.
        found_inf: whether megatron-core's loss scaling found an overflow.
    """
    own = {kind: metrics.pop(PREFIX + kind, 0.0) for kind in KINDS}
    buffers = [b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    if found_inf or not (math.isfinite(grad_norm) and all_finite(b.grad_data for b in buffers)):
        own["gradient"] = 1.0
    counts = torch.tensor(list(own.values()), dtype=torch.float64)
    if buffers:
        counts = counts.to(buffers[0].grad_data.device)
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    return {kind: int(count) for kind, count in zip(KINDS, counts.tolist(), strict=True) if count}


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether no number is NaN or infinite.

    Each tensor is read once: a sum passes on what is not finite. Only where it is not finite, which
    large numbers could cause as well, the numbers are looked at.
    """
    tensors = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not tensors:
        return True
    sums: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:  # those of an offloaded optimizer are on the CPU
        sums.setdefault(tensor.device, []).append(tensor.sum(dtype=torch.float32))
    finite = all(bool(torch.stack(of_device).isfinite().all()) for of_device in sums.values())
    return finite or all(tensor.isfinite().all() for tensor in tensors)


def check_finite(what: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse to save what is not finite; every rank calls, and all raise alike.

    Args:
        what: for the error: "a checkpoint of version 7".
        tensors: all that this rank holds of it, by name.

    Raises:
        NonFiniteWeights: the text names the first tensors.
    """
    by_rank = nonfinite_by_rank(tensors)
    names = list(dict.fromkeys(name for of_rank in by_rank.values() for name in of_rank))
    if names:
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        raise NonFiniteWeights(
            f"{what} is not written, because it would hold NaNs or infinities: in "
            f"{', '.join(names[:3])}{more}. What was saved before stays; continue from that, with "
            "a lower policy.lr or policy.max_grad_norm"
        )


def nonfinite_by_rank(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[int, list[str]]:
    """Rank -> names of its tensors that are not finite, where there are such; for every rank."""
    tensors = list(tensors)
    bad: list[str] = []
    if not all_finite(tensor for _, tensor in tensors):
        bad = [name for name, tensor in tensors if not all_finite([tensor])]
    by_rank = [bad] * dist.get_world_size()
    dist.all_gather_object(by_rank, bad)
    return {rank: names for rank, names in enumerate(by_rank) if names}


class NonFiniteSteps:
    """What becomes of optimizer steps that are not finite, by policy.on_nonfinite.

    Args:
        config: of the run.
        shape: of its model.
    """

    def __init__(self, config: RunConfig, shape: ModelShape):
        self._config = config
        self._shape = shape
        self.num_in_row = 0
        """Steps that were skipped since the last one that was taken."""
        self.last = ""
        """What was found in the last one that was skipped."""

    @property
    def rolls_back(self) -> bool:
        """Whether the policy has to go back before it takes another step."""
        policy = self._config.policy
        return policy.on_nonfinite == "rollback" and self.num_in_row >= policy.max_nonfinite_steps

    def skip(
        self,
        step: Step,
        found: dict[str, int],
        metrics: dict[str, float],
        weights: Iterable[tuple[str, torch.Tensor]],
        *,
        write_model: Callable[[Path], None],
    ) -> None:
        """Dump a step, and say that it is not applied; every rank calls.

        Args:
            step: the step.
            found: see `find_nonfinite`.
            metrics: of the step, with grad_norm; all others are known on the last stage only.
            weights: all that this rank trains, by name.
            write_model: writes the weights into a new folder.

        Raises:
            FloatingPointError: policy.on_nonfinite says that this one ends the run.
        """
        policy = self._config.policy
        self.num_in_row += 1
        metrics = _of_last_stage(metrics)
        fault = Fault(found, metrics, nonfinite_by_rank(weights))
        what = found_text(found)
        for rank, names in fault.weights.items():
            what += f", weights of rank {rank} ({names[0]}{' ...' if len(names) > 1 else ''})"
        dump = self._dump(step, fault, write_model)
        values = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
        self.last = (
            f"the update of policy version {step.policy_version} has a gradient of norm "
            f"{metrics['grad_norm']:g}, which was not applied: the weights are as before this "
            f"optimizer step ({step.number}). Not finite: {what}. Its metrics: {values}. {dump}"
        )
        if policy.on_nonfinite == "raise":
            raise FloatingPointError(self.last)
        if policy.on_nonfinite == "skip" and self.num_in_row >= policy.max_nonfinite_steps:
            raise FloatingPointError(
                f"{counted(self.num_in_row, 'optimizer step')} in a row were not finite "
                f"(policy.max_nonfinite_steps). The last one: {self.last}"
            )
        if dist.get_rank() == 0:
            print(
                f"warning: skipped optimizer step {step.number} of policy version "
                f"{step.policy_version}, in a row: {self.num_in_row}. Not finite: {what}. {dump}",
                flush=True,
            )

    def _dump(self, step: Step, fault: Fault, write_model: Callable[[Path], None]) -> str:
        """Write a dump, the first rank decides whether; returns where it is, or why it is not."""
        # Until the first optimizer step, the weights are those of model.path.
        has_weights = step.policy_version > 0 or not step.number.startswith("1 ")
        answer: list[Any] = [None, None]
        """The folder that is being written, and else why nothing is."""
        if dist.get_rank() == 0:
            try:
                answer = [self._begin(step, fault, has_weights=has_weights), None]
            except (OSError, ValueError) as error:
                answer = [None, f"Not dumped: {error}"]
        dist.broadcast_object_list(answer, 0)
        partial, why_not = answer
        if partial is None:
            return str(why_not)
        failure = None
        try:
            if has_weights:
                write_model(partial / WEIGHTS)
            if dist.get_rank() == 0:
                flush_to_disk(partial)
                partial.rename(partial.with_suffix(""))
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            failure = f"Not dumped: {error}"
        answer = [failure or f"`rlsys replay {partial.with_suffix('')}` takes this step again"]
        dist.broadcast_object_list(answer, 0)
        return str(answer[0])

    def _begin(self, step: Step, fault: Fault, *, has_weights: bool) -> Path:
        """Write all but the weights; the folder's name ends in .partial until it is whole."""
        limit, folder = self._config.policy.nonfinite_dumps, Path(self._config.output_dir) / DUMPS
        name = f"step-{step.policy_version + 1}"
        if not step.number.endswith(" of 1"):
            name += "-" + step.number.partition(" ")[0]
        place = folder.absolute() / name
        if place.exists():
            place = unused_folder(place)
        if sum(path.suffix == "" for path in folder.glob("step-*")) >= limit:
            raise ValueError(f"policy.nonfinite_dumps allows {limit}")
        room, needed = free_bytes(folder), 2 * 4 * self._shape.num_params if has_weights else 0
        if room < needed:
            raise ValueError(
                f"{folder} has {size_text(room)} left, and weights need {size_text(needed)}"
            )
        partial = place.with_name(place.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights, version = WEIGHTS if has_weights else None, step.policy_version
        write_step(partial, step, fault, self._config, weights=weights, weights_version=version)
        return partial


def _of_last_stage(metrics: dict[str, float]) -> dict[str, float]:
    """The metrics of an optimizer step, which the last pipeline stage has, on every rank."""
    shared = [metrics]
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast_object_list(
            shared,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return shared[0]
