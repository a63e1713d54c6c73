"""What preference training loads, checks and says before Ray and its actors start."""

from __future__ import annotations

from transformers import AutoTokenizer

from rlsys.config import PreferenceConfig
from rlsys.data.preferences import PreferenceData, load_preferences
from rlsys.model.folder_check import model_notes
from rlsys.plugins.load import load_plugins
from rlsys.preflight.before_start import (
    find_model,
    policy_notes,
    say_what_was_found,
    step_notes,
)
from rlsys.preflight.preference import too_few
from rlsys.preflight.turn_ends import turn_end_note
from rlsys.text import counted


def load_preference_data(config: PreferenceConfig) -> PreferenceData:
    """Load the answers of a run, with the chat template of its model, and check all of them.

    Raises:
        ValueError: rows or the model's files do not fit the run.
    """
    folder, shape = find_model(config)
    load_plugins(config.data.external_plugins)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    data = load_preferences(
        config.data,
        tokenizer,
        is_paired=config.preference.is_paired,
        seed=config.seed,
        vocab_size=shape.vocab_size,
    )
    end_note = turn_end_note(folder, tokenizer, [row.answers[0] for row in data.some])
    notes = [*model_notes(folder), *policy_notes(config, folder, shape), end_note]
    say_what_was_found(notes, data)
    if not config.data.streaming:
        if len(data.train) < config.rows_per_step:
            raise ValueError(str(too_few(config, len(data.train))))
        print(f"data: {_contents(config, data)}", flush=True)
    _check_held_out(config, data)
    return data


def _check_held_out(config: PreferenceConfig, data: PreferenceData) -> None:
    """Refuse a held-out set of which KTO's KL cannot be estimated."""
    for name, rows in data.held_out_sets.items():
        if config.preference.estimates_kl and config.eval_steps is not None and len(rows) == 1:
            raise ValueError(
                f"{name or 'the held-out set'} has 1 row, and preference.loss_type = kto estimates "
                "the KL from answers to other prompts: hold out 2 rows or more, or set eval_steps "
                "to null"
            )


def _contents(config: PreferenceConfig, data: PreferenceData) -> str:
    """What the rows are, and a warning where there is nothing to tell apart."""
    targets = sum(answer.num_targets for row in data.train for answer in row.answers)
    if config.preference.is_paired:
        return f"{counted(len(data.train), 'pair')}, {targets:,} tokens of answers"
    good = sum(row.is_chosen[0] for row in data.train)
    text = (
        f"{counted(good, 'desirable answer')} and {len(data.train) - good:,} undesirable, "
        f"{targets:,} tokens"
    )
    if good in (0, len(data.train)):
        text += ". All labels are the same, so there is nothing to tell apart"
    return text


def fit_to_preferences(config: PreferenceConfig, data: PreferenceData) -> PreferenceConfig:
    """The config with the number of steps."""
    for note in step_notes(config, len(data.train)):
        print(note, flush=True)
    return config.with_steps(len(data.train))
