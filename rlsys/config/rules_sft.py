"""Rules between fields of a config for supervised training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rlsys.config.rules import rows_problems, run_problems
from rlsys.problems import Problem

if TYPE_CHECKING:
    from rlsys.config.sft import SftConfig


def sft_problems(config: SftConfig) -> list[Problem]:
    """Every rule between fields that `config` breaks; empty when it can run."""
    return [*run_problems(config), *rows_problems(config.data), *_sample_problems(config)]


def _sample_problems(config: SftConfig) -> Iterator[Problem]:
    policy, data, sft = config.policy, config.data, config.sft
    tokens = policy.max_tokens_per_micro_batch
    if tokens is not None and tokens < data.max_length:
        yield Problem(
            f"policy.max_tokens_per_micro_batch = {tokens} does not hold the longest sample, "
            f"data.max_length = {data.shown('max_length')}: use {data.max_length} or more, or set "
            f"data.max_length to {tokens} or fewer"
        )
    if sft.objective == "pretrain":
        for name, value, default in (
            ("sft.loss_on", sft.loss_on, "all"),
            ("sft.thinking", sft.thinking, "train"),
            ("data.prompt_template", data.prompt_template, None),
            ("data.system", data.system, None),
            ("data.chat_template_kwargs", data.chat_template_kwargs, {}),
        ):
            if value != default:
                yield Problem(
                    f"{name} = {value} is about conversations, and sft.objective = pretrain trains "
                    "on every token of a text: leave it out, or set sft.objective to sft"
                )
    elif data.truncation_strategy == "split":
        yield Problem(
            "data.truncation_strategy = split cuts texts into several samples, and an answer "
            "without its prompt teaches something else: use delete, left, right or error, or set "
            "sft.objective to pretrain"
        )
    if data.prompt_template is not None and sft.loss_on == "flag":
        yield Problem(
            "sft.loss_on = flag trains on messages with `loss: true`, and data.prompt_template "
            "makes rows of one prompt and one answer: leave sft.loss_on out, which trains on the "
            "answer"
        )
    if sft.group_by_length and data.streaming:
        yield Problem(
            "sft.group_by_length needs all samples at once, which data.streaming does not have: "
            "leave one of them out"
        )
