"""What `rlsys explain` says of `rlsys reward-model` alone."""

from __future__ import annotations

from rlsys.commands.explain_options import describe_megatron_kwargs
from rlsys.commands.explain_parts import Pairs, Parts
from rlsys.commands.explain_preference import order_of_rows, row_arithmetic
from rlsys.commands.explain_sft import learning_rate
from rlsys.config import RewardModelConfig
from rlsys.model.memory import MemoryEstimate, estimate_policy
from rlsys.model.shape import ModelShape
from rlsys.preflight.data import FIRST_ROWS
from rlsys.preflight.memory import gpu_warnings
from rlsys.preflight.reward_model import check_reward_model_run
from rlsys.types import Device

_ROWS = {
    "preference": "pairs: a chosen and a rejected answer, and their margin if there is one",
    "single_label_classification": "texts or conversations with the label of one class",
    "multi_label_classification": "texts or conversations with a list of classes",
    "regression": "texts or conversations with numbers",
}
_LOSSES = {
    "preference": "Bradley-Terry: -log sigmoid(chosen - rejected - margin), its mean over pairs",
    "single_label_classification": "cross-entropy of the class, its mean over rows",
    "multi_label_classification": "binary cross-entropy, its mean over rows and classes",
    "regression": "squared error, its mean over rows and numbers",
}
_LONGER = {
    "delete": "dropped, and counted",
    "left": "cut off on the left",
    "right": "cut off on the right",
    "error": "a mistake: the run does not start",
}


def _method(config: RewardModelConfig) -> list[tuple[str, Pairs]]:
    return [
        ("Training", describe_training(config)),
        ("Passed through, and not in the memory estimate", describe_megatron_kwargs(config.policy)),
        ("Batches", row_arithmetic(config, "pair" if config.has_pairs else "row")),
    ]


def describe_training(config: RewardModelConfig) -> Pairs:
    """(part, description): what the head learns, from what, and how fast."""
    section, data = config.reward_model, config.data
    outputs = str(config.num_labels)
    if section.label_names:
        outputs += f": {', '.join(section.label_names)}"
    pairs = [
        ("rows", _ROWS[section.problem_type]),
        ("loss", f"{_LOSSES[section.problem_type]} (reward_model.problem_type)"),
        ("outputs", outputs),
        ("score", "at the last token that does not pad rows, as transformers has it"),
    ]
    if section.center_rewards_coefficient:
        weight = section.center_rewards_coefficient
        pairs.append(("centring", f"+ {weight:g} x mean of (chosen + rejected)^2"))
    return [
        *pairs,
        ("longer rows", f"with a text over {data.max_length:,} tokens: "
         f"{_LONGER[data.truncation_strategy]}"),
        ("order", order_of_rows(config)),
        ("learning rate", learning_rate(config)),
    ]  # fmt: skip


def _memory(
    config: RewardModelConfig, shape: ModelShape, device: Device
) -> tuple[list[MemoryEstimate], list[str]]:
    return [estimate_policy(config, shape, device=device)], []


REWARD_MODEL_PARTS = Parts(
    problems=check_reward_model_run,
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
