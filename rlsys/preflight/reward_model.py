"""Everything about training a score head that can be checked before Ray starts; as `checks`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from rlsys.config import RewardModelConfig
from rlsys.config.passed_through import megatron_option_problems
from rlsys.data.scored import ScoreSource
from rlsys.data.scored_rows import ScoreRules
from rlsys.model.classifier import stored_label_names
from rlsys.model.families.bridged import is_bridged
from rlsys.model.folder import find_model_folder
from rlsys.model.rope import longrope_switch
from rlsys.model.shape import read_model_config, read_model_shape
from rlsys.preflight.checks import find_problems
from rlsys.preflight.data import count_rows, lacks_template, source_problems
from rlsys.preflight.devices import may_bridge
from rlsys.preflight.machine import (
    attention_problems,
    gpu_problems,
    package_problems,
    tracker_problems,
)
from rlsys.preflight.model import policy_model_problems
from rlsys.preflight.run_folder import output_dir_problems
from rlsys.problems import Problem
from rlsys.text import counted


def score_head_problems(config: RewardModelConfig) -> Iterator[Problem]:
    """Models that rlsys gives no score head, or whose scores transformers makes otherwise."""
    try:
        folder = find_model_folder(config.model.path)
        labels = config.num_labels
        shape = read_model_shape(folder, may_bridge=may_bridge(config), num_labels=labels)
    except ValueError:  # which policy_model_problems reports
        return
    if is_bridged(config, shape):
        yield Problem(
            f"model.path: `rlsys reward-model` gives a head to models that rlsys builds itself, "
            f"and mcore-bridge builds {shape.model_type}: use another model, or leave model.bridge "
            "out"
        )
    wanted, stored = config.reward_model.label_names, stored_label_names(folder, shape)
    if wanted and stored and wanted != stored:
        yield Problem(
            f"reward_model.label_names = [{', '.join(wanted)}], and the score head of model.path "
            f"{folder} has the classes [{', '.join(stored)}]: name the same ones in the same "
            "order, or start from a model without a score head"
        )
    switch, most = longrope_switch(read_model_config(folder)), config.data.max_length
    if switch is not None and most > switch:
        yield Problem(
            f"data.max_length = {most}, and transformers computes {shape.model_type} with LongRoPE "
            f"otherwise in batches with a text over {switch} tokens, so the score of a text would "
            f"depend on its batch: set data.max_length to {switch} or fewer"
        )


def scored_file_problems(config: RewardModelConfig) -> Iterator[Problem]:
    """Problems of data plugins, dataset entries, files and their first rows; too few rows."""
    no_template = config.data.prompt_template is None and lacks_template(Path(config.model.path))
    kind = partial(ScoreSource, rules=ScoreRules.of(config))
    yield from source_problems(config.data, no_template, kind)
    rows = count_rows(config.data)
    if rows is not None and 0 < rows < config.rows_per_step:
        yield too_few(config, rows)


def too_few(config: RewardModelConfig, rows: int) -> Problem:
    """Fewer rows than a step takes."""
    noun = "pair" if config.has_pairs else "row"
    return Problem(
        f"data.dataset has {counted(rows, noun)} to train on, and a step takes "
        f"{config.rows_per_step} (policy.global_batch_size): give more data, or lower it"
    )


REWARD_MODEL_CHECKS: tuple[Callable[[RewardModelConfig], Iterable[Problem]], ...] = (
    package_problems,
    megatron_option_problems,
    policy_model_problems,
    score_head_problems,
    attention_problems,
    gpu_problems,
    scored_file_problems,
    tracker_problems,
    output_dir_problems,
)


def check_reward_model_run(config: RewardModelConfig) -> list[Problem]:
    """All problems of a run that can be seen from this machine without starting it."""
    return find_problems(REWARD_MODEL_CHECKS, config)
