"""What `rlsys explain` says of distillation alone."""

from __future__ import annotations

from rlsys.commands.explain_options import describe_megatron_kwargs
from rlsys.commands.explain_parts import Pairs, Parts
from rlsys.commands.explain_sft import describe_training, sample_arithmetic
from rlsys.config import DistillConfig
from rlsys.model.memory import MemoryEstimate
from rlsys.model.shape import ModelShape
from rlsys.preflight.data import FIRST_ROWS
from rlsys.preflight.distill import check_distill_run
from rlsys.preflight.memory import estimate_trained, gpu_warnings
from rlsys.types import Device


def _method(config: DistillConfig) -> list[tuple[str, Pairs]]:
    return [
        ("Training", describe_distillation(config)),
        ("Passed through, and not in the memory estimate", describe_megatron_kwargs(config.policy)),
        ("Batches", sample_arithmetic(config)),
    ]


def describe_distillation(config: DistillConfig) -> Pairs:
    """(part, description): what the student learns, from whom, in which order, and how fast."""
    distill = config.distill
    kinds = {0.0: "forward KL, KL(teacher || student)", 1.0: "reverse KL, KL(student || teacher)"}
    kind = kinds.get(distill.beta, "generalised Jensen-Shannon divergence")
    top_k = distill.loss_top_k
    over = f"the teacher's {top_k} likeliest tokens and the rest" if top_k else "all tokens"
    own = {
        "objective": "distillation (GKD)",
        "loss": f"{kind} (distill.beta {distill.beta:g}) over {over}, at temperature "
        f"{distill.temperature:g}; its mean over all tokens of a step that are trained on",
    }
    pairs = [(part, own.get(part, text)) for part, text in describe_training(config)]
    pairs.insert(1, ("teacher", f"{config.teacher_path} (teacher.path)"))
    pairs.insert(2, ("completions", _completions(config)))
    return pairs


def _completions(config: DistillConfig) -> str:
    lmbda, rollout = config.distill.lmbda, config.rollout
    if not lmbda:
        return "the rows' own answers (distill.lmbda 0)"
    share = "all steps" if lmbda == 1 else f"a share of {lmbda:g} of the steps"
    return (
        f"in {share} the student's own (distill.lmbda), at temperature {rollout.temperature:g}, of "
        f"at most {rollout.max_completion_length:,} tokens"
    )


def _memory(
    config: DistillConfig, shape: ModelShape, device: Device
) -> tuple[list[MemoryEstimate], list[str]]:
    return estimate_trained(config, shape, device), []


DISTILL_PARTS = Parts(
    problems=check_distill_run,
    method=_method,
    absent_actors=lambda config: [],
    experts=lambda config, shape: [],
    weights=lambda config, shape, device: [],
    memory=_memory,
    warnings=gpu_warnings,
    phases=lambda *_: ([], []),
    to_fit="policy.micro_batch_size or data.max_length",
    looked_at=f"The first {FIRST_ROWS} rows of each text file were read, without their tokens.",
)
