"""Rules between fields of a config for reward models and classifiers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.config.rules import rows_problems, run_problems
from rlsys.problems import Problem

if TYPE_CHECKING:
    from rlsys.config.reward_model import RewardModelConfig


def reward_model_problems(config: RewardModelConfig) -> list[Problem]:
    """Every rule between fields that `config` breaks; empty when it can run."""
    return [
        *run_problems(config),
        *rows_problems(config.data),
        *_head_problems(config),
        *_batch_problems(config),
        *_option_problems(config),
    ]


def _head_problems(config: RewardModelConfig) -> Iterator[Problem]:
    section = config.reward_model
    kind, number, names = section.problem_type, section.num_labels, section.label_names
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        yield Problem(
            f"reward_model.label_names has {', '.join(twice)} twice: name each class once"
        )
    if kind == "preference":
        if number not in (None, 1) or names:
            given = (
                f"num_labels = {number}" if number not in (None, 1) else f"label_names = {names}"
            )
            yield Problem(
                f"reward_model.{given} is for classes, and with reward_model.problem_type = "
                "preference a model gives one number, the reward: leave it out, or set "
                "problem_type to single_label_classification or multi_label_classification"
            )
    elif section.center_rewards_coefficient is not None:
        yield Problem(
            f"reward_model.center_rewards_coefficient = {section.center_rewards_coefficient:g} "
            f"centres the rewards of pairs, and reward_model.problem_type is {kind}: leave it out"
        )
    if kind == "regression" and names:
        yield Problem(
            f"reward_model.label_names = {names} names classes, and reward_model.problem_type = "
            "regression learns numbers: leave it out, or use num_labels for several numbers a row"
        )
    if kind.endswith("classification"):
        yield from _class_problems(kind, number, names)


def _class_problems(kind: str, number: int | None, names: list[str]) -> Iterator[Problem]:
    if number is None and not names:
        yield Problem(
            f"reward_model.problem_type = {kind} needs the number of classes: set "
            "reward_model.num_labels, or name the classes in reward_model.label_names"
        )
    elif number is not None and names and number != len(names):
        yield Problem(
            f"reward_model.num_labels = {number}, and reward_model.label_names has {len(names)} "
            f"({', '.join(names)}): name as many, or leave num_labels out"
        )
    elif kind.startswith("single") and (number or len(names)) == 1:
        yield Problem(
            f"reward_model.problem_type = {kind} with one class has nothing to choose: give two "
            "classes or more, or set problem_type to regression"
        )


def _batch_problems(config: RewardModelConfig) -> Iterator[Problem]:
    tokens, longest = config.policy.max_tokens_per_micro_batch, config.data.max_length
    needed = longest * config.rows_together
    if tokens is not None and tokens < needed:
        what = "both answers of the longest pair" if config.has_pairs else "the longest row"
        yield Problem(
            f"policy.max_tokens_per_micro_batch = {tokens} does not hold {what}, {needed} tokens "
            f"with data.max_length = {longest}: use {needed} or more, or lower data.max_length"
        )


def _option_problems(config: RewardModelConfig) -> Iterator[Problem]:
    if config.has_pairs and config.data.prompt_template is not None:
        yield Problem(
            "data.prompt_template makes one text of a row, and reward_model.problem_type = "
            "preference reads two answers: leave it out; pairs of plain texts have columns chosen "
            "and rejected"
        )
    if not config.policy.recompute_logits:
        yield Problem(
            "policy.recompute_logits = false keeps the logits of a vocabulary, and a score head "
            "has none: leave it out"
        )
    if config.checkpoint.load_best_model_at_end and config.policy.lora is not None:
        yield Problem(
            "checkpoint.load_best_model_at_end with policy.lora would make the final model an "
            "adapter, since checkpoints are, and a reward model is one whole folder: leave one of "
            "them out"
        )
