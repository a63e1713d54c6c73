"""What a run loads, checks and says before Ray and its actors start."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlsys.config import Config, RunConfig
from rlsys.data import PromptData, load_prompts
from rlsys.data.load import Loaded
from rlsys.data.sources import raise_if_any
from rlsys.model.detokenize import Detokenizer
from rlsys.model.folder import resolve_model_path
from rlsys.model.folder_check import check_model_folder, model_notes
from rlsys.model.shape import ModelShape, read_model_shape
from rlsys.model.stop_tokens import read_stop_rules
from rlsys.plugins.load import load_plugins, load_what_loads
from rlsys.preflight.data import check_prompt_tokens
from rlsys.preflight.hub import use_cache_without_hub
from rlsys.preflight.model import recompute_note
from rlsys.preflight.rewards import reachable_rewards
from rlsys.preflight.tokenizers import check_tokenizers
from rlsys.preflight.trained import base_note
from rlsys.problems import Problem, ProblemsError
from rlsys.rewards.columns import column_problems_of_run, row_check, unread_columns
from rlsys.rewards.reachable import GOLD_REMEDY, look_at_rows
from rlsys.text import counted


def load_data(config: Config) -> PromptData:
    """Load the prompts of a run, with the chat template of its model, and check all of them.

    Raises:
        ValueError: rows, columns, right answers or the model's files do not fit the run.
    """
    folder, shape = find_model(config)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    data = load_checked_prompts(config, tokenizer)
    check_prompt_tokens(folder, tokenizer, [*data.train, *data.held_out])
    stops = read_stop_rules(folder, tokenizer, config.rollout)
    say_what_was_found([*model_notes(folder), *policy_notes(config, folder, shape)], data)
    check_prompts(config, data)
    note = Detokenizer(tokenizer, config.rollout.skip_special_tokens, stops.eos_token_ids).note()
    if note is not None:
        print(f"note: {note}", flush=True)
    sets = data.held_out_sets.values()
    held_out = [column for prompts in sets for prompt in prompts[:1] for column in prompt.columns]
    unread = unread_columns(config, dict.fromkeys([*data.columns, *held_out]))
    if unread is not None:
        print(f"data: {unread}", flush=True)
    raise_if_any(data.refused)
    check_right_answers(config, data, tokenizer)
    return data


def find_model(config: RunConfig) -> tuple[Path, ModelShape]:
    """The folder of the model that is trained, which comes from the hub if need be, and its shape.

    Raises:
        ValueError: the model's files do not fit together.
    """
    use_cache_without_hub(config)
    folder = resolve_model_path(config.model.path)
    shape = read_model_shape(folder, may_bridge=True, num_labels=config.num_labels)
    if folder != Path(config.model.path):  # preflight saw only the config of a hub model
        check_model_folder(folder, shape, has_prompts=True)
    if config.teacher_path is not None:
        teacher = resolve_model_path(config.teacher_path)
        if teacher != Path(config.teacher_path):
            teacher_shape = read_model_shape(teacher, may_bridge=True)
            check_model_folder(teacher, teacher_shape, has_prompts=False)
        check_tokenizers(folder, teacher)
    return folder, shape


def policy_notes(config: RunConfig, folder: Path, shape: ModelShape) -> list[str | None]:
    """What the policy's options do not do, or may do wrongly, with its model."""
    return [recompute_note(config.policy, shape), base_note(config, folder)]


def say_what_was_found(notes: Iterable[str | None], data: Loaded[Any]) -> None:
    """Print the notes that there are, and what became of each row."""
    for text in notes:
        if text is not None:
            print(f"note: {text}", flush=True)
    for line in data.summary():
        print(line, flush=True)


def load_checked_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptData:
    """Load the prompts of a run; `refused` has the rows that its reward functions refuse.

    Raises:
        ValueError: as `load_prompts`; a plugin that cannot be loaded.
    """
    reward = config.reward
    load_what_loads(config.data.external_plugins)  # `load_prompts` reports the others
    load_plugins(reward.external_plugins)
    check = row_check(reward.names_that_check_rows, reward.params, config.run_values)
    return load_prompts(config.data, tokenizer, seed=config.seed, check=check)


def check_prompts(config: Config, data: PromptData) -> None:
    """Refuse data with too few prompts for a step, or without the columns of a reward function.

    Raises:
        ValueError: fewer prompts than a step needs; a column that a reward function needs and no
            row has; streamed rows that no checkpoint can hold.
    """
    ahead = config.num_prompts_ahead
    if not config.data.streaming and len(data.train) < config.num_prompts + ahead:
        needed, remedy = "", "lower generation_batch_size"
        if ahead:
            needed = f" and {ahead} ahead of it (rollout.oversample_prompts, max_staleness)"
            remedy += ", oversample_prompts or max_staleness"
        raise ValueError(
            f"a step needs {counted(config.num_prompts, 'prompt')} "
            f"(rollout.generation_batch_size / rollout.num_generations){needed}, but the training "
            f"data has {len(data.train)}. Give more data or {remedy}."
        )
    if ahead and isinstance(config.checkpoint.save_steps, int) and data.unsaveable:
        raise ProblemsError("the data", list(map(Problem, data.unsaveable)))
    load_plugins(config.reward.external_plugins)
    problems: dict[str, None] = {}
    for prompts in data.held_out_sets.values() or [[]]:
        held_out = {column: None for prompt in prompts for column in prompt.columns}
        found = column_problems_of_run(config, data.columns, held_out if prompts else None)
        problems |= dict.fromkeys(found)
    if problems:
        raise ProblemsError("the data", list(map(Problem, problems)))


def check_right_answers(
    config: Config, data: PromptData, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Warn of rows whose right answer a reward function cannot use, or no completion could give.

    Raises:
        ValueError: a function that scores every completion cannot use the right answer of any row.
    """
    streamed = [prompt for stream in data.streams for prompt in stream.first]
    prompts = [*data.train, *streamed, *data.held_out]
    useless = []
    for finding in look_at_rows(reachable_rewards(config, tokenizer), prompts):
        if finding.kills_reward and finding.name in config.reward.names_that_check_rows:
            useless.append(finding.text)
        else:
            print(f"warning: {finding.text}; `rlsys data preview` shows them", flush=True)
    if useless:
        raise ValueError("\n".join(f"{text}. {GOLD_REMEDY}" for text in useless))


def fit_to_data(config: Config, data: PromptData) -> Config:
    """The config with the number of steps, and without checkpoints if the data allows none."""
    for note in step_notes(config, len(data.train)):
        print(note, flush=True)
    config = config.with_steps(len(data.train))
    if not config.num_prompts_ahead or config.checkpoint.save_steps is None or not data.unsaveable:
        return config
    print("note: no checkpoints are written:\n" + "\n".join(data.unsaveable), flush=True)
    checkpoint = config.checkpoint.model_copy(update={"save_steps": None})
    return config.model_copy(update={"checkpoint": checkpoint})


def step_notes(config: RunConfig, num_rows: int) -> Iterator[str]:
    """How many steps num_train_epochs makes, or that max_steps overrides it; no evaluations."""
    if config.data.has_held_out and config.eval_steps is None:
        yield "note: rows are held out, and the run evaluates nothing: eval_steps is not set"
    steps = config.steps_of_epochs(num_rows)
    if steps is None or steps == config.max_steps:
        return
    epochs = (
        f"num_train_epochs {config.num_train_epochs:g} x {counted(num_rows, config.row_noun)} / "
        f"{config.rows_per_step} per step = {counted(steps, 'step')}"
    )
    if config.max_steps is None:
        yield epochs
    else:
        yield f"note: max_steps = {config.max_steps} overrides {epochs}"
