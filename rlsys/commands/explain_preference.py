"""What `rlsys explain` says of preference training alone."""

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
from rlsys.commands.explain_sft import learning_rate
from rlsys.config import PreferenceConfig, RunConfig
from rlsys.model.memory import MemoryEstimate
from rlsys.model.shape import ModelShape
from rlsys.preflight.data import FIRST_ROWS, count_rows
from rlsys.preflight.memory import estimate_preference, gpu_warnings
from rlsys.preflight.preference import check_preference_run
from rlsys.text import counted
from rlsys.types import Device

LOSSES = {
    "sigmoid": "DPO: -log sigmoid(beta x difference of the log ratios)",
    "sigmoid_norm": "DPO of the mean log ratio of a token",
    "hinge": "max(0, 1 - beta x difference of the log ratios)",
    "ipo": "IPO: (difference of the mean log ratios of a token - 1 / (2 beta))^2",
    "robust": "robust DPO, where a share label_smoothing of the labels is flipped",
    "exo_pair": "EXO of two answers",
    "nca_pair": "NCA of two answers",
    "bco_pair": "BCO of two answers",
    "sppo_hard": "SPPO with winning probabilities of 1 and 0",
    "apo_zero": "APO-zero, for answers better than the model's own",
    "apo_down": "APO-down, for answers worse than the model's own",
    "cpo": "CPO: -log sigmoid(beta x difference of the log-probs)",
    "simpo": "SimPO: of the mean log-probs of a token, with the margin simpo_gamma",
    "orpo": "ORPO: -beta log sigmoid(log of the odds ratio)",
    "kto": "KTO: 1 - sigmoid(+-beta x (log ratio - KL))",
    "apo_zero_unpaired": "APO-zero of single answers",
}


def _method(config: PreferenceConfig) -> list[tuple[str, Pairs]]:
    return [
        ("Training", describe_training(config)),
        ("Passed through, and not in the memory estimate", describe_megatron_kwargs(config.policy)),
        ("Batches", row_arithmetic(config, "pair" if config.preference.is_paired else "answer")),
    ]


def describe_training(config: PreferenceConfig) -> Pairs:
    """(part, description): what is compared, with what, and how fast."""
    section, data = config.preference, config.data
    rows = "pairs: a chosen and a rejected answer to one prompt"
    if not section.is_paired:
        rows = "single answers with a label, true or false"
    pairs = [
        ("rows", rows),
        ("loss", f"{LOSSES[section.loss_type]}, its mean over a step (preference.loss_type)"),
        ("beta", f"{section.scale:g}"),
    ]
    if section.f_divergence_type != "reverse_kl":
        pairs.append(("log ratios", f"through the derivative of {section.f_divergence_type}"))
    if section.nll_weight:
        pairs.append(
            ("likelihood", f"+ {section.nll_weight:g} x mean negative log-likelihood of chosen "
             "answers, over their tokens in a step"),
        )  # fmt: skip
    longer = "dropped, and counted"
    if data.truncation_strategy == "error":
        longer = "a mistake: the run does not start"
    return [
        *pairs,
        ("reference", _reference(config)),
        ("longer rows", f"with an answer over {data.max_length:,} tokens: {longer}"),
        ("order", order_of_rows(config)),
        ("learning rate", learning_rate(config)),
    ]


def order_of_rows(config: RunConfig) -> str:
    """In which order rows come."""
    data = config.data
    if data.streaming:
        return f"as streamed, shuffled within {data.shuffle_buffer_size:,} rows"
    if not data.shuffle:
        return "as in the files (data.shuffle is off)"
    return f"a new permutation in every epoch, by seed {config.seed}"


def _reference(config: PreferenceConfig) -> str:
    section = config.preference
    if not section.has_reference:
        return f"none: {section.no_reference_because}"
    model = config.reference_path
    if config.reference_is_base:
        model = "the policy with its adapter off"
    when = "in every step"
    if section.precompute_ref_log_probs:
        when = "once, before the first step (preference.precompute_ref_log_probs)"
    return f"{model}, asked {when}"


def row_arithmetic(config: RunConfig, noun: str) -> Pairs:
    """(quantity, value and formula) for every number that follows from the batch sizes."""
    by_default = "" if config.policy.global_batch_size else f" = {config.default_batch_size}"
    most = config.rows_together * config.longest_row
    return [
        (f"{noun}s per step", f"{config.rows_per_step} = policy.global_batch_size{by_default}"),
        ("  of these, a rank has", per_rank(config)),
        ("  in micro-batches", micro_batches(config, noun)),
        (f"tokens a {noun}, at most", f"{most:,} = {config.rows_together} x data.max_length"),
        ("tokens per step, at most", f"{config.rows_per_step * most:,}"),
        *_run_length(config, noun),
    ]


def _run_length(config: RunConfig, noun: str) -> Iterator[tuple[str, str]]:
    rows = count_rows(config.data)
    if config.num_train_epochs is not None:
        less = f" (less those over data.max_length) / rows per step {config.rows_per_step}"
        yield "num_train_epochs", steps_of_epochs_text(config, rows, less)
    num_steps = config.max_steps
    if num_steps is None and rows is not None:
        num_steps = config.steps_of_epochs(rows)
    if num_steps is None:
        yield "the whole run", "known when the rows are counted, at the start of the run"
        return
    taken = num_steps * config.rows_per_step
    steps = optimizer_steps_text(config, num_steps)
    yield "the whole run", f"{steps}: {counted(taken, noun)}"
    every, text = config.eval_steps, "none: eval_steps is null"
    yield "evaluations", text if every is None else evaluations_text(every, num_steps)
    if rows:
        yield "epochs", f"{taken / rows:.2f} = {counted(taken, noun)} / {counted(rows, 'row')}"
    else:
        yield "epochs", "no rows" if rows == 0 else "unknown: rows not counted"


def _memory(
    config: PreferenceConfig, shape: ModelShape, device: Device
) -> tuple[list[MemoryEstimate], list[str]]:
    return estimate_preference(config, shape, device), []


def _absent(config: PreferenceConfig) -> Pairs:
    return [] if config.has_reference_model else [("reference x 0", _reference(config))]


PREFERENCE_PARTS = Parts(
    problems=check_preference_run,
    method=_method,
    absent_actors=_absent,
    experts=lambda config, shape: [],
    weights=lambda config, shape, device: [],
    memory=_memory,
    warnings=gpu_warnings,
    phases=lambda *_: ([], []),
    to_fit="policy.micro_batch_size or data.max_length",
    looked_at=f"The first {FIRST_ROWS} rows of each text file were read, without their tokens.",
)
