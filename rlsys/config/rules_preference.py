"""Rules between fields of a config for preference training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.config.rules import reference_rank_problems, rows_problems, run_problems
from rlsys.config.rules_adapters import base_reference_problems, unread_reference_problems
from rlsys.problems import Problem

if TYPE_CHECKING:
    from rlsys.config.preference import PreferenceConfig

LOSSES_OF_FIELD = {
    "label_smoothing": ("robust", "exo_pair", "cpo", "simpo"),
    "f_divergence_type": ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair"),
    "f_alpha_divergence_coef": ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair"),
    "rpo_alpha": (
        *("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair"),
        *("bco_pair", "sppo_hard", "apo_zero", "apo_down"),
    ),
    "reference_free": (
        *("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair"),
        *("bco_pair", "sppo_hard", "apo_zero", "apo_down", "kto", "apo_zero_unpaired"),
    ),
    "cpo_alpha": ("cpo", "simpo"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto", "apo_zero_unpaired"),
    "undesirable_weight": ("kto", "apo_zero_unpaired"),
}
"""Fields of `preference` that only some losses read."""


def preference_problems(config: PreferenceConfig) -> list[Problem]:
    """Every rule between fields that `config` breaks; empty when it can run."""
    return [
        *run_problems(config),
        *rows_problems(config.data),
        *_loss_problems(config),
        *_row_problems(config),
        *_reference_problems(config),
    ]


def _loss_problems(config: PreferenceConfig) -> Iterator[Problem]:
    section = config.preference
    loss, fields = section.loss_type, type(section).model_fields
    for name, losses in LOSSES_OF_FIELD.items():
        value = getattr(section, name)
        # A run's saved config names the defaults too.
        if value != fields[name].default and loss not in losses:
            yield Problem(
                f"preference.{name} = {value} is not read by preference.loss_type = {loss}: leave "
                f"it out, or choose one of {', '.join(losses)}"
            )
    if loss == "exo_pair" and section.label_smoothing == 0:
        yield Problem(
            "preference.loss_type = exo_pair takes the logarithm of preference.label_smoothing, "
            "and that is 0: set it to a small number, such as 0.001"
        )
    if loss == "robust" and section.label_smoothing == 0:
        yield Problem(
            "preference.loss_type = robust with preference.label_smoothing = 0 is sigmoid: set "
            "label_smoothing to the share of pairs with a wrong label, such as 0.1, or choose "
            "sigmoid"
        )
    if (
        section.f_alpha_divergence_coef != fields["f_alpha_divergence_coef"].default
        and section.f_divergence_type != "alpha_divergence"
    ):
        yield Problem(
            f"preference.f_alpha_divergence_coef = {section.f_alpha_divergence_coef:g} is for "
            f"preference.f_divergence_type = alpha_divergence, and that is "
            f"{section.f_divergence_type}: set it, or leave f_alpha_divergence_coef out"
        )


def _row_problems(config: PreferenceConfig) -> Iterator[Problem]:
    policy, data, section = config.policy, config.data, config.preference
    tokens, longest = policy.max_tokens_per_micro_batch, config.rows_together * data.max_length
    if tokens is not None and tokens < longest:
        answers = "two answers of a pair" if section.is_paired else "longest answer"
        yield Problem(
            f"policy.max_tokens_per_micro_batch = {tokens} does not hold the {answers}, "
            f"{config.rows_together} x data.max_length {data.shown('max_length')} = {longest} "
            f"tokens: use {longest} or more, or lower data.max_length"
        )
    if section.estimates_kl and config.rows_per_step == 1:
        yield Problem(
            "preference.loss_type = kto estimates the KL from answers to other prompts of a step, "
            "and a step has one row: set policy.global_batch_size to 2 or more"
        )
    if data.prompt_template is not None:
        yield Problem(
            "data.prompt_template makes rows of one prompt and one answer, and `rlsys preference` "
            "does not read it: leave it out, and give rows a column `prompt`"
        )
    if section.precompute_ref_log_probs and data.streaming:
        yield Problem(
            "preference.precompute_ref_log_probs needs all rows at once, which data.streaming does "
            "not have: leave one of them out"
        )
    if section.precompute_ref_log_probs and section.estimates_kl:
        yield Problem(
            "preference.precompute_ref_log_probs cannot work with preference.loss_type = kto, "
            "whose KL needs the reference in every step: leave it out, or use apo_zero_unpaired"
        )


def _reference_problems(config: PreferenceConfig) -> Iterator[Problem]:
    reference, section = config.reference, config.preference
    if reference.sync_steps is not None:
        yield Problem(
            f"reference.sync_steps = {reference.sync_steps} copies the policy's weights into the "
            "reference, which `rlsys preference` does not do: leave it out"
        )
    if config.has_reference_model:
        if reference.mixup_alpha != 1:
            yield Problem(
                f"reference.mixup_alpha = {reference.mixup_alpha:g} is for copies of the policy's "
                "weights, which `rlsys preference` does not make: leave it out"
            )
        yield from reference_rank_problems(config, config.rows_per_step, "policy.global_batch_size")
    elif section.has_reference:
        yield from base_reference_problems(reference)
    else:
        why = section.no_reference_because
        if section.precompute_ref_log_probs:
            yield Problem(f"preference.precompute_ref_log_probs is set, and {why}: leave it out")
        yield from unread_reference_problems(reference, f"{why}: leave it out")
