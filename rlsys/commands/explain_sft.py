"""What `rlsys explain` says of supervised training alone."""

from __future__ import annotations

from collections.abc import Iterator

from rlsys.commands.explain_batches import (
    evaluations_text,
    micro_batches,
    optimizer_steps_text,
    per_rank,
    steps_of_epochs_text,
)
from rlsys.commands.explain_options import describe_megatron_kwargs
from rlsys.commands.explain_parts import Pairs, Parts
from rlsys.config import RunConfig, SftConfig
from rlsys.data.samples import long_rows
from rlsys.model.memory import MemoryEstimate, estimate_policy
from rlsys.model.shape import ModelShape
from rlsys.preflight.data import FIRST_ROWS, count_rows
from rlsys.preflight.memory import gpu_warnings
from rlsys.preflight.sft import check_sft_run
from rlsys.text import counted
from rlsys.types import Device

_LOSS_ON = {
    "all": "every answer (turn of the assistant), up to the token that ends it",
    "last": "the last answer of a row, up to the token that ends it",
    "flag": "answers whose message has `loss: true`, up to the token that ends them",
}
_THINKING = {
    "train": "trained on, where the chat template keeps it",
    "ignore": "left out of the loss",
    "ignore_empty": "trained on, and left out of the loss where it is empty",
}
_LONGER = {
    "delete": "dropped, and counted",
    "left": "cut off on the left",
    "right": "cut off on the right",
    "split": "cut into several samples",
    "error": "a mistake: the run does not start",
}


def _method(config: SftConfig) -> list[tuple[str, Pairs]]:
    return [
        ("Training", describe_training(config)),
        ("Passed through, and not in the memory estimate", describe_megatron_kwargs(config.policy)),
        ("Batches", sample_arithmetic(config)),
    ]


def describe_training(config: SftConfig) -> Pairs:
    """(part, description): what is learned from a row, in which order, and how fast."""
    data, sft = config.data, config.sft
    is_sft = sft.objective == "sft"
    title = "supervised fine-tuning" if is_sft else "continued pre-training"
    pairs = [("objective", f"{title} (sft.objective)")]
    if is_sft:
        template = "the model's chat template"
        if data.prompt_template is not None:
            template = "data.prompt_template"
        pairs += [
            ("rendered by", template),
            ("trained on", f"{_LOSS_ON[sft.loss_on]} (sft.loss_on); prompts, system and tools' "
             "turns never are"),
            ("thinking", f"{_THINKING[sft.thinking]} (sft.thinking)"),
        ]  # fmt: skip
    else:
        pairs.append(("trained on", "every token of a text, and the EOS token behind it"))
    pairs += [
        (
            "loss",
            "negative log-likelihood in nats, its mean over all tokens of a step that are trained "
            "on: it does not depend on micro-batches, packing or ranks",
        ),
        ("longer rows", f"over data.max_length {data.max_length:,} tokens: {_longer(config)}"),
        ("order", _order(config)),
        ("learning rate", learning_rate(config)),
    ]
    return pairs


def _longer(config: SftConfig) -> str:
    return f"{_LONGER[long_rows(config.data, config.sft.objective)]} (data.truncation_strategy)"


def _order(config: SftConfig) -> str:
    data = config.data
    if data.streaming:
        return f"as streamed, shuffled within {data.shuffle_buffer_size:,} rows"
    if not data.shuffle:
        order = "as in the files (data.shuffle is off)"
    else:
        order = f"a new permutation in every epoch, by seed {config.seed}"
    if config.sft.group_by_length:
        order += "; samples of similar length in one step (sft.group_by_length)"
    return order


def learning_rate(config: RunConfig) -> str:
    """What becomes of the learning rate over the steps."""
    policy = config.policy
    warmup = f"from 0 to {policy.lr:g} over {policy.warmup_ratio:.0%} of the steps, then "
    text = warmup if policy.warmup_ratio else ""
    if policy.lr_scheduler_type == "constant":
        return f"{text}{policy.lr:g}"
    return f"{text}{policy.lr_scheduler_type} from {policy.lr:g} to {policy.min_lr:g}"


# --- numbers -------------------------------------------------------------------------------------


def sample_arithmetic(config: SftConfig) -> Pairs:
    """(quantity, value and formula) for every number that follows from the batch sizes."""
    policy, samples = config.policy, config.global_batch_size
    by_default = "" if policy.global_batch_size else f" = {config.default_batch_size}"
    return [
        ("samples per step", f"{samples} = policy.global_batch_size{by_default}"),
        ("  of these, a rank has", per_rank(config)),
        ("  in micro-batches", micro_batches(config, "sample")),
        ("tokens a sample, at most", f"{config.longest_row:,} = {config.longest_row_is}"),
        ("tokens per step, at most", f"{samples * config.longest_row:,}"),
        *_run_length(config),
    ]


def _run_length(config: SftConfig) -> Iterator[tuple[str, str]]:
    """Steps and epochs of the run, which may depend on the number of samples."""
    # The pieces of long texts are counted when the texts are tokenized.
    splits = long_rows(config.data, config.sft.objective) == "split"
    rows = None if splits else count_rows(config.data)
    less = "" if splits else " (less those over data.max_length)"
    if config.num_train_epochs is not None:
        noun = "pieces of texts, not counted yet" if splits else None
        yield (
            "num_train_epochs",
            steps_of_epochs_text(
                config, rows, f"{less} / samples per step {config.rows_per_step}", noun
            ),
        )
    num_steps = config.max_steps
    if num_steps is None and rows is not None:
        num_steps = config.steps_of_epochs(rows)
    if num_steps is None:
        yield "the whole run", "known when the samples are counted, at the start of the run"
        return
    taken = num_steps * config.rows_per_step
    yield (
        "the whole run",
        f"{optimizer_steps_text(config, num_steps)}: {counted(taken, 'sample')}, at most "
        f"{taken * config.longest_row:,} tokens",
    )
    yield "evaluations", _evaluations(config, num_steps)
    if rows:
        yield "epochs", f"{taken / rows:.2f} = {counted(taken, 'sample')} / {counted(rows, 'row')}"
    else:
        yield "epochs", "no rows" if rows == 0 else "unknown: samples not counted"


def _evaluations(config: SftConfig, num_steps: int) -> str:
    if config.eval_steps is not None:
        limit = config.data.max_eval_samples
        most = "" if limit is None else f"; {limit:,} samples of each set (data.max_eval_samples)"
        return f"{evaluations_text(config.eval_steps, num_steps)}{most}"
    return "none: eval_steps is null"


# --- memory --------------------------------------------------------------------------------------


def _memory(
    config: SftConfig, shape: ModelShape, device: Device
) -> tuple[list[MemoryEstimate], list[str]]:
    return [estimate_policy(config, shape, device=device)], []


SFT_PARTS = Parts(
    problems=check_sft_run,
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
