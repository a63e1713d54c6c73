"""Rules between the fields of an evaluation: what is held out, and how it is sampled."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.config.gates import parse_gate
from rlsys.problems import Problem
from rlsys.registry import did_you_mean
from rlsys.text import counted

if TYPE_CHECKING:
    from rlsys.config.schema import Config, RunConfig

_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@-]*")
_OWN_KEYS = ("reward", "rewards", "completions", "logged")
"""Metrics of evaluations begin with these, behind eval/."""


def held_out_problems(config: RunConfig) -> Iterator[Problem]:
    """Every rule about rows that are held out."""
    if config.eval_steps is not None and not config.data.has_held_out:
        yield Problem(
            f"eval_steps = {config.eval_steps}, but there is nothing to evaluate on: set "
            "data.val_dataset, data.val_sets or data.split_dataset_ratio (0.05 holds out 5 % of "
            "data.dataset), or leave eval_steps out"
        )
    yield from _set_problems(config)


def eval_problems(config: Config) -> Iterator[Problem]:
    """Every rule about sampled evaluations that `config` breaks."""
    yield from _sampling_problems(config)


def _sampling_problems(config: Config) -> Iterator[Problem]:
    evaluation, n = config.eval, config.eval.num_generations
    if evaluation.temperature == 0 and n > 1:
        yield Problem(
            f"eval.temperature = 0 is greedy, so eval.num_generations = {n} completions of a "
            "prompt would be equal: set one of the two"
        )
    too_many = [k for k in evaluation.pass_at_k if k > n]
    if too_many:
        yield Problem(
            f"eval.pass_at_k has {', '.join(map(str, too_many))}, and pass@k needs at least k "
            f"completions of a prompt, eval.num_generations = {n}: raise it, or lower k"
        )
    if evaluation.correct is None:
        return
    try:
        name = parse_gate(evaluation.correct).by
    except ValueError:
        yield Problem(
            f"eval.correct = {evaluation.correct!r}: write the name of a reward function, or NAME "
            ">= NUMBER"
        )
        return
    names = config.reward.names
    if name not in names:
        yield Problem(
            f"eval.correct = {evaluation.correct!r} names {name}, which is not one of "
            f"reward.reward_funcs ({', '.join(names)}).{did_you_mean(name, names)} Add it there, "
            "with weight 0 in reward.reward_weights if it should not train"
        )


def _set_problems(config: RunConfig) -> Iterator[Problem]:
    data = config.data
    for name, paths in data.val_sets.items():
        if not _SET_NAME.fullmatch(name) or name in _OWN_KEYS:
            yield Problem(
                f"data.val_sets: {name!r} is not a name of a set, which stands in metrics as "
                f"eval/NAME/reward: use letters, digits and _ . @ -, and none of "
                f"{', '.join(_OWN_KEYS)}"
            )
        if not paths:
            yield Problem(f"data.val_sets: {name} has no files: name one, or take it out")
    if not data.val_sets:
        return
    for field, names in (
        ("data.val_preprocessor", data.val_preprocessor),
        ("data.preprocessor", [] if data.val_preprocessor else data.preprocessor),
    ):
        if len(names) > 1:
            yield Problem(
                f"{field} has {counted(len(names), 'name')}, and data.val_sets take one for all: "
                "set data.val_preprocessor to one name (none leaves rows as they are)"
            )
